//! Access rules of a sandbox: lists of addresses, changed while the sandbox runs or is paused. Real
//! packets.

use connectrpc::{ConnectError, ErrorCode};
use wrenn_proto::rpc::hostagent::v1::{self as pb, Egress};

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host::{self, Footprint},
    world::{is_out_of_reach, make_world, receives},
};

/// Two addresses of the external network.
const A: &str = "10.99.0.2";
const B: &str = "10.99.0.3";

fn policy(allow: &[&str], deny: &[&str]) -> pb::NetworkPolicy {
    let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
    pb::NetworkPolicy {
        allow: texts(allow),
        deny: texts(deny),
        ..Default::default()
    }
}

async fn create(agent: &TestAgent, id: &str, egress: Egress, network: pb::NetworkPolicy) {
    let request = pb::CreateSandboxRequest {
        egress: egress.into(),
        network: network.into(),
        ..agent::request(id)
    };
    agent.create_with(request).await.expect("made");
}

async fn update(
    agent: &TestAgent,
    id: &str,
    egress: Egress,
    network: pb::NetworkPolicy,
) -> Result<(), ConnectError> {
    let request = pb::UpdateNetworkRequest {
        id: id.to_owned(),
        egress: egress.into(),
        network: network.into(),
        ..Default::default()
    };
    agent.client.update_network(request).await.map(drop)
}

/// Checks which of the two addresses a guest reaches.
async fn reaches(agent: &TestAgent, id: &str, wanted: (bool, bool)) {
    for (ip, wanted) in [(A, wanted.0), (B, wanted.1)] {
        let address = format!("{ip}:7777");
        if wanted {
            let heard = receives(agent, id, &address).await;
            assert!(heard.is_some(), "{id} does not reach {address}");
        } else {
            is_out_of_reach(agent, id, &address).await;
        }
    }
}

async fn pause(agent: &TestAgent, id: &str) {
    let request = pb::PauseSandboxRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    agent.client.pause_sandbox(request).await.expect("paused");
}

async fn resume(agent: &TestAgent, id: &str) {
    let request = pb::ResumeSandboxRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    agent.client.resume_sandbox(request).await.expect("resumed");
}

#[test]
fn allow_takes_precedence_over_deny_but_not_over_reserved_ranges() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let (deny, allow) = (Egress::EGRESS_DENY, Egress::EGRESS_ALLOW);
        create(&agent, "sb-some", deny, policy(&[B], &["0.0.0.0/0"])).await;
        create(&agent, "sb-most", allow, policy(&[], &["10.99.0.2/32"])).await;
        create(&agent, "sb-both", allow, policy(&[A], &["10.99.0.0/24"])).await;
        create(&agent, "sb-greedy", deny, policy(&["0.0.0.0/0"], &[])).await;
        reaches(&agent, "sb-some", (false, true)).await;
        reaches(&agent, "sb-most", (false, true)).await;
        reaches(&agent, "sb-both", (true, false)).await;
        reaches(&agent, "sb-greedy", (true, true)).await;
        for closed in ["10.11.0.1:49983", "10.12.0.3:49983", "10.99.0.1:7777"] {
            is_out_of_reach(&agent, "sb-greedy", closed).await;
        }
        // A nameserver that the guest cannot reach is not passed to the guest.
        assert!(agent.spec("sb-some").dns.is_empty());
        assert_eq!(agent.spec("sb-most").dns.len(), 1);
        for id in ["sb-some", "sb-most", "sb-both", "sb-greedy"] {
            agent.destroy(id).await.expect("destroyed");
        }
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn access_change_applies_at_once_and_keeps_open_connections() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        create(&agent, "sb-1", Egress::EGRESS_DENY, policy(&[], &[])).await;
        reaches(&agent, "sb-1", (false, false)).await;
        let change = async |egress, network| update(&agent, "sb-1", egress, network).await;
        let changed = change(Egress::EGRESS_DENY, policy(&[A], &[])).await;
        changed.expect("changed");
        reaches(&agent, "sb-1", (true, false)).await;
        let changed = change(Egress::EGRESS_ALLOW, policy(&[], &[])).await;
        changed.expect("changed");
        reaches(&agent, "sb-1", (true, true)).await;
        let listed = agent.find("sb-1").await.expect("listed");
        assert_eq!(listed.egress.as_known(), Some(Egress::EGRESS_ALLOW));

        // An echo connection that is open when access is closed stays open; a new one is not
        // established.
        let script = format!(
            "bash -c 'exec 3<>/dev/tcp/{A}/7778; echo 1 >&3; head -n1 <&3; touch open; \
             while [ ! -e closed ]; do sleep 0.02; done; echo 2 >&3; timeout 20 head -n1 <&3'"
        );
        let dir = data.path().join("talk");
        std::fs::create_dir(&dir).expect("made");
        let script = format!("cd {} && {script}", dir.display());
        let talk = agent.sh("sb-1", &script);
        let close = async {
            agent::until("an open connection", async || {
                dir.join("open").exists().then_some(())
            })
            .await;
            let changed = change(Egress::EGRESS_DENY, policy(&[], &[])).await;
            changed.expect("changed");
            reaches(&agent, "sb-1", (false, false)).await;
            std::fs::write(dir.join("closed"), "").expect("written");
        };
        let (talked, ()) = tokio::join!(talk, close);
        assert_eq!(talked.expect("run").stdout, b"1\n2\n");
        agent.destroy("sb-1").await.expect("destroyed");
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn access_lists_survive_restarts_and_pauses_and_apply_to_copies() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        create(&first, "sb-1", Egress::EGRESS_ALLOW, policy(&[], &[A])).await;
        first.stop().await;
        // As after a restart of the host's firewall: all rules are gone.
        private_host::run("nft", &["flush", "ruleset"]);
        private_host::ip(&[
            "netns",
            "exec",
            "wrenn-ns-1",
            "nft",
            "flush",
            "set",
            "ip",
            "wrenn",
            "permitted",
        ]);
        let agent = TestAgent::start(data.path()).await;
        reaches(&agent, "sb-1", (false, true)).await;

        let fork = pb::ForkSandboxRequest {
            id: "sb-1".to_owned(),
            copy_ids: vec!["sb-2".to_owned()],
            ..Default::default()
        };
        agent.client.fork_sandbox(fork).await.expect("forked");
        reaches(&agent, "sb-2", (false, true)).await;

        pause(&agent, "sb-1").await;
        resume(&agent, "sb-1").await;
        reaches(&agent, "sb-1", (false, true)).await;

        // Changed while it is paused, and across a restart.
        pause(&agent, "sb-1").await;
        let changed = update(&agent, "sb-1", Egress::EGRESS_DENY, policy(&[A], &[])).await;
        changed.expect("changed");
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        resume(&agent, "sb-1").await;
        reaches(&agent, "sb-1", (true, false)).await;
        assert!(agent.spec("sb-1").dns.is_empty());
        agent.destroy("sb-1").await.expect("destroyed");
        agent.destroy("sb-2").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn failed_access_change_changes_nothing() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        create(&agent, "sb-1", Egress::EGRESS_DENY, policy(&[A], &[])).await;
        let spec = agent.spec("sb-1");
        for (list, entry) in [("allow", "example.com"), ("deny", "10.0.0.0/33")] {
            let network = match list {
                "allow" => policy(&[entry], &[]),
                _ => policy(&[], &[entry]),
            };
            let error = update(&agent, "sb-1", Egress::EGRESS_ALLOW, network.clone()).await;
            let error = error.expect_err("refused");
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(
                error
                    .to_string()
                    .contains(&format!("`network.{list}`: `{entry}`")),
                "{error}"
            );
            let request = pb::CreateSandboxRequest {
                network: network.into(),
                ..agent::request("sb-2")
            };
            let error = agent.create_with(request).await.expect_err("refused");
            assert_eq!(error.code, ErrorCode::InvalidArgument);
        }
        let many = vec![A; 257];
        let error = update(&agent, "sb-1", Egress::EGRESS_DENY, policy(&many, &[])).await;
        assert_eq!(error.expect_err("refused").code, ErrorCode::InvalidArgument);
        // The maximum number of entries, no two of them adjacent.
        let most: Vec<String> = (0..255).map(|n| format!("20.0.{n}.1")).collect();
        let mut most: Vec<&str> = most.iter().map(String::as_str).collect();
        most.push(A);
        let changed = update(&agent, "sb-1", Egress::EGRESS_DENY, policy(&most, &[])).await;
        changed.expect("changed");
        reaches(&agent, "sb-1", (true, false)).await;
        let changed = update(&agent, "sb-1", Egress::EGRESS_DENY, policy(&[A], &[])).await;
        changed.expect("changed");

        // The set has another type, so the rules cannot be applied.
        private_host::ip(&[
            "netns",
            "exec",
            "wrenn-ns-1",
            "nft",
            "flush chain ip wrenn forward; delete set ip wrenn permitted; add set ip wrenn permitted { type inet_service; }",
        ]);
        let error = update(&agent, "sb-1", Egress::EGRESS_ALLOW, policy(&[], &[])).await;
        assert_eq!(error.expect_err("not set").code, ErrorCode::Internal);
        assert_eq!(agent.spec("sb-1"), spec);
        let listed = agent.find("sb-1").await.expect("listed");
        assert_eq!(listed.egress.as_known(), Some(Egress::EGRESS_DENY));

        agent::kill_9(agent.supervisor_pid("sb-1"));
        agent
            .wait_for("sb-1", pb::SandboxState::SANDBOX_STATE_ERROR)
            .await;
        let error = update(&agent, "sb-1", Egress::EGRESS_ALLOW, policy(&[], &[])).await;
        assert_eq!(error.expect_err("lost").code, ErrorCode::FailedPrecondition);
        let error = update(&agent, "sb-none", Egress::EGRESS_ALLOW, policy(&[], &[])).await;
        assert_eq!(error.expect_err("unknown").code, ErrorCode::NotFound);
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn access_change_interrupted_at_any_step_takes_effect_with_the_next_agent() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        create(&agent, "sb-1", Egress::EGRESS_DENY, policy(&[], &[])).await;
        for (point, list, reached) in [
            ("agent.network.noted", [A], (true, false)),
            ("agent.network.applied", [B], (false, true)),
        ] {
            agent.stop().await;
            let dying = TestAgent::start_child_with(data.path(), &format!("self@{point}")).await;
            let running = pb::SandboxState::SANDBOX_STATE_RUNNING;
            dying.wait_for("sb-1", running).await;
            let changed = update(&dying, "sb-1", Egress::EGRESS_DENY, policy(&list, &[])).await;
            changed.expect_err(point);
            dying.dies(point).await;
            agent = TestAgent::start(data.path()).await;
            agent.wait_for("sb-1", running).await;
            reaches(&agent, "sb-1", reached).await;
        }
        agent.destroy("sb-1").await.expect("destroyed");
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}
