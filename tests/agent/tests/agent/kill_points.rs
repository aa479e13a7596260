//! Death of the agent at each step of an operation, and the state that the next agent makes of it.
//! Steps of a pause and of a resume are tested in VMs (`wrenn-e2e`, `pause_faults`), those of a
//! change of the network access in `policy`.

use std::{fs, path::Path};

use connectrpc::ErrorCode;
use wrenn_proto::rpc::hostagent::v1::{self as pb, SandboxState};

use crate::{
    agent::{self, TestAgent, on_private_host, until},
    private_host::Footprint,
};

const ID: &str = "sb-kill";
const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const PAUSED: SandboxState = SandboxState::SANDBOX_STATE_PAUSED;

/// Starts an agent that dies at a failpoint, once it has adopted the sandbox in this state.
async fn doomed(data: &Path, point: &str, state: SandboxState) -> TestAgent {
    let agent = TestAgent::start_child_with(data, &format!("self@{point}")).await;
    agent.wait_for(ID, state).await;
    agent
}

/// Files in the snapshot store, without names and the lock.
fn stored(data: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for area in ["memory", "disks", "snapshots", "staging"] {
        let dir = data.join("snapshots").join(area);
        for entry in fs::read_dir(&dir).expect("an area of the store").flatten() {
            found.push(format!("{area}/{}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// Waits until nothing is stored, because nothing refers to a snapshot.
async fn is_collected(data: &Path, point: &str) {
    until(&format!("collection after {point}"), async || {
        stored(data).is_empty().then_some(())
    })
    .await;
}

#[test]
fn destroy_interrupted_at_any_step_can_be_repeated_and_leaves_nothing() {
    const REMOVED: &str = "agent.destroy.removed";
    let points = [
        "agent.free.stopped",
        "agent.free.killed",
        "agent.destroy.freed",
        REMOVED,
    ];
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        for point in points {
            for has_snapshot in [false, true] {
                agent.create(ID).await.expect("made");
                if has_snapshot {
                    agent.pause(ID).await.expect("paused");
                    agent.resume(ID).await.expect("resumed");
                }
                let cgroups = agent.spec(ID).cgroups;
                agent.stop().await;
                let dying = doomed(data.path(), point, RUNNING).await;
                dying.destroy(ID).await.expect_err(point);
                dying.dies(point).await;

                agent = TestAgent::start(data.path()).await;
                match agent.find(ID).await {
                    Some(_) => agent.destroy(ID).await.expect("destroyed"),
                    None => assert_eq!(point, REMOVED),
                }
                assert!(agent.find(ID).await.is_none());
                assert!(!agent.sandbox_dir(ID).exists(), "{point}");
                assert!(cgroups.iter().all(|dir| !dir.exists()), "{point}");
                assert_eq!(Footprint::now(), before, "{point}");
                is_collected(data.path(), point).await;
            }
        }
        agent.stop().await;
    });
}

/// Returns the names of all snapshots.
async fn names(agent: &TestAgent) -> Vec<String> {
    let host = agent.client.get_host(pb::GetHostRequest::default()).await;
    let templates = host.expect("a host").into_owned().templates;
    let kind = pb::TemplateKind::TEMPLATE_KIND_SNAPSHOT;
    let named = templates
        .into_iter()
        .filter(|t| t.kind.as_known() == Some(kind));
    named.map(|template| template.name).collect()
}

#[test]
fn named_snapshot_interrupted_at_any_step_has_its_name_or_leaves_nothing() {
    const NAMED: &str = "agent.name.set";
    let points = [
        "agent.snapshot.prepared",
        "agent.snapshot.captured",
        "agent.snapshot.published",
        "agent.name.published",
        NAMED,
    ];
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        for point in points {
            agent.create(ID).await.expect("made");
            agent.stop().await;
            let dying = doomed(data.path(), point, RUNNING).await;
            dying.snapshot(ID, "named").await.expect_err(point);
            dying.dies(point).await;

            agent = TestAgent::start(data.path()).await;
            agent.wait_for(ID, RUNNING).await;
            let done = agent.sh(ID, "echo here").await.expect("run");
            assert_eq!(done.stdout, b"here\n", "{point}");
            let is_named = names(&agent).await == ["named"];
            assert_eq!(is_named, point == NAMED, "{point}");
            // The call can be repeated, and its result does not depend on the sandbox.
            match agent.snapshot(ID, "named").await {
                Ok(()) => assert!(!is_named, "{point}"),
                Err(error) => {
                    assert!(is_named, "{point}: {error}");
                    assert_eq!(error.code, ErrorCode::AlreadyExists, "{error}");
                }
            }
            agent.destroy(ID).await.expect("destroyed");
            let copy = pb::CreateSandboxRequest {
                template: "named".to_owned(),
                ..agent::request(ID)
            };
            agent.create_with(copy).await.expect("made");
            agent.destroy(ID).await.expect("destroyed");
            let delete = pb::DeleteSnapshotRequest {
                name: "named".to_owned(),
                ..Default::default()
            };
            let deleted = agent.client.delete_snapshot(delete).await;
            deleted.expect("deleted");
            is_collected(data.path(), point).await;
        }
        agent.stop().await;
    });
}

/// Number of disk layers above which a resume waits for the merged copy.
const TOO_MANY_LAYERS: usize = 32;

#[test]
fn chain_merge_interrupted_at_any_step_keeps_the_sandbox_resumable() {
    let points = [
        "agent.merge.memory",
        "agent.merge.disk",
        "agent.merge.published",
        "agent.merge.noted",
    ];
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        for _ in 0..TOO_MANY_LAYERS {
            agent.pause(ID).await.expect("paused");
            agent.resume(ID).await.expect("resumed");
        }
        assert_eq!(agent.spec(ID).disk_layers.len(), TOO_MANY_LAYERS);
        agent.pause(ID).await.expect("paused");
        agent.stop().await;
        for point in points {
            let dying = doomed(data.path(), point, PAUSED).await;
            dying.resume(ID).await.expect_err(point);
            dying.dies(point).await;
        }
        let agent = TestAgent::start(data.path()).await;
        agent.wait_for(ID, PAUSED).await;
        agent.resume(ID).await.expect("resumed");
        let layers = agent.spec(ID).disk_layers.len();
        assert!(layers <= 2, "{layers} layers after the merge");
        let done = agent.sh(ID, "echo here").await.expect("run");
        assert_eq!(done.stdout, b"here\n");
        agent.destroy(ID).await.expect("destroyed");
        is_collected(data.path(), "the merges").await;
        agent.stop().await;
    });
}

#[test]
fn collection_interrupted_at_any_step_removes_garbage_only() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        // A destroyed sandbox whose snapshot is left, because its agent dies before it collects.
        agent.create(ID).await.expect("made");
        agent.pause(ID).await.expect("paused");
        agent.stop().await;
        let dying = doomed(data.path(), "agent.destroy.removed", PAUSED).await;
        dying.destroy(ID).await.expect_err("no answer");
        dying.dies("agent.destroy.removed").await;
        let garbage = stored(data.path());
        assert!(!garbage.is_empty());

        // An agent collects when it starts.
        TestAgent::dies_at_start(data.path(), "self@agent.collect.read").await;
        assert_eq!(stored(data.path()), garbage, "read only");
        TestAgent::dies_at_start(data.path(), "self@agent.collect.removed").await;
        assert_eq!(stored(data.path()), [""; 0]);

        // The same with a snapshot that is needed.
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        agent.pause(ID).await.expect("paused");
        agent.stop().await;
        let needed = stored(data.path());
        for point in ["self@agent.collect.read", "self@agent.collect.removed"] {
            TestAgent::dies_at_start(data.path(), point).await;
            assert_eq!(stored(data.path()), needed, "{point}");
        }
        let agent = TestAgent::start(data.path()).await;
        agent.wait_for(ID, PAUSED).await;
        agent.resume(ID).await.expect("resumed");
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}
