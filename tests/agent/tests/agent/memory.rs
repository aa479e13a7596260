//! Memory of the host that is promised to sandboxes: creates, resumes and forks reserve it.

use connectrpc::{ConnectError, ErrorCode};
use wrenn_agent::{AgentConfig, HostLimits};
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::agent::{self, TestAgent, config, deadlines, faulty, on_private_host, request};

/// Part of the host's memory that may be promised, in percent. Small, so that it is available.
const PERCENT: u32 = 10;

/// Agent that may promise a small part of the host's memory.
async fn start(data_dir: &std::path::Path) -> TestAgent {
    let limits = HostLimits {
        memory_commit_percent: PERCENT,
        ..HostLimits::default()
    };
    let config = AgentConfig {
        limits,
        ..config(data_dir)
    };
    TestAgent::start_with(config, deadlines()).await
}

async fn host(agent: &TestAgent) -> pb::GetHostResponse {
    let host = agent.client.get_host(pb::GetHostRequest::default()).await;
    host.expect("a host").into_owned()
}

/// Memory of a sandbox of which one can be promised, and two cannot.
async fn large(agent: &TestAgent) -> u32 {
    let limit = host(agent).await.memory_promise_limit_mib;
    u32::try_from(limit * 2 / 3).expect("a small host")
}

fn of_memory(memory_mb: u32, request: pb::CreateSandboxRequest) -> pb::CreateSandboxRequest {
    pb::CreateSandboxRequest {
        memory_mb,
        ..request
    }
}

fn is_full(error: &ConnectError) {
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    let text = error.to_string();
    assert!(text.contains("promised to other sandboxes"), "{text}");
    assert!(text.contains("WRENN_MEMORY_COMMIT_PERCENT"), "{text}");
}

#[test]
fn two_creates_at_once_that_fit_only_one_at_a_time_are_not_both_admitted() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path()).await;
        let memory = large(&agent).await;
        let create = |id: &str| agent.create_with(of_memory(memory, request(id)));
        let (first, second) = tokio::join!(create("sb-1"), create("sb-2"));
        let failed = match (first, second) {
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
            other => panic!("{other:?}"),
        };
        is_full(&failed);
        assert_eq!(host(&agent).await.memory_promised_mib, u64::from(memory));
        let left = agent.list().await.remove(0).id;
        agent.destroy(&left).await.expect("destroyed");
        assert_eq!(host(&agent).await.memory_promised_mib, 0);
        agent.stop().await;
    });
}

#[test]
fn a_create_that_fails_at_any_step_releases_its_memory() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path()).await;
        let memory = large(&agent).await;
        for fault in ["die-at-start", "die-in-boot", "reject-init"] {
            let create = of_memory(memory, faulty("sb-1", fault));
            agent.create_with(create).await.expect_err(fault);
            assert_eq!(host(&agent).await.memory_promised_mib, 0, "{fault}");
        }
        agent.stop().await;
    });
}

#[test]
fn a_paused_sandbox_has_no_memory_and_reserves_it_before_its_resume() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path()).await;
        let memory = large(&agent).await;
        let create = |id: &str| agent.create_with(of_memory(memory, request(id)));
        create("sb-1").await.expect("made");
        agent.pause("sb-1").await.expect("paused");
        create("sb-2").await.expect("made");
        is_full(&agent.resume("sb-1").await.expect_err("full"));
        let paused = agent.find("sb-1").await.expect("listed");
        let state = pb::SandboxState::SANDBOX_STATE_PAUSED;
        assert_eq!(paused.state.as_known(), Some(state));
        assert!(paused.warning.contains("promised"), "{}", paused.warning);
        agent.destroy("sb-2").await.expect("destroyed");
        agent.resume("sb-1").await.expect("resumed");
        assert_eq!(host(&agent).await.memory_promised_mib, u64::from(memory));
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn a_fork_reserves_the_memory_of_all_copies_before_the_sandbox_is_paused() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path()).await;
        let limit = host(&agent).await.memory_promise_limit_mib;
        let memory = u32::try_from(limit / 4).expect("a small host");
        let made = agent.create_with(of_memory(memory, request("sb-1")));
        made.await.expect("made");
        let fork = async |copies: &[&str]| {
            let request = pb::ForkSandboxRequest {
                id: "sb-1".to_owned(),
                copy_ids: copies.iter().map(|&id| id.to_owned()).collect(),
                ..Default::default()
            };
            agent.client.fork_sandbox(request).await.map(drop)
        };
        let snapshots = || {
            let dir = std::fs::read_dir(data.path().join("snapshots/snapshots"));
            dir.map_or(0, Iterator::count)
        };
        let too_many = ["sb-2", "sb-3", "sb-4", "sb-5", "sb-6"];
        is_full(&fork(&too_many).await.expect_err("full"));
        assert_eq!(snapshots(), 0, "the sandbox was paused for nothing");
        assert_eq!(host(&agent).await.memory_promised_mib, u64::from(memory));
        fork(&["sb-2", "sb-3"]).await.expect("forked");
        assert_eq!(
            host(&agent).await.memory_promised_mib,
            u64::from(memory) * 3
        );
        for id in ["sb-1", "sb-2", "sb-3"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn the_next_agent_counts_the_sandboxes_that_run_even_beyond_its_limit() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        first.create("sb-1").await.expect("made");
        first.create("sb-2").await.expect("made");
        first.pause("sb-2").await.expect("paused");
        first.stop().await;
        let limits = HostLimits {
            memory_commit_percent: 1,
            memory_reserve_mib: u32::MAX,
            ..HostLimits::default()
        };
        let config = AgentConfig {
            limits,
            ..config(data.path())
        };
        let agent = TestAgent::start_with(config, deadlines()).await;
        let running = pb::SandboxState::SANDBOX_STATE_RUNNING;
        agent.wait_for("sb-1", running).await;
        let host = host(&agent).await;
        assert_eq!(
            (host.memory_promised_mib, host.memory_promise_limit_mib),
            (256, 0)
        );
        is_full(&agent.resume("sb-2").await.expect_err("full"));
        // A VM that is lost releases its memory.
        agent::kill_9(agent.supervisor_pid("sb-1"));
        let lost = pb::SandboxState::SANDBOX_STATE_ERROR;
        agent.wait_for("sb-1", lost).await;
        agent::until("the memory is released", async || {
            (crate::memory::host(&agent).await.memory_promised_mib == 0).then_some(())
        })
        .await;
        agent.destroy("sb-1").await.expect("destroyed");
        agent.destroy("sb-2").await.expect("destroyed");
        agent.stop().await;
    });
}
