//! Limits of the settings, seen by a guest and by an agent that cannot keep them.

use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use wrenn_agent::CgroupPolicy;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, on_private_host},
    world::{make_world, send_zeros},
};

/// Server of the external network that sends without an end.
const SENDER: &str = "10.99.0.2:7780";

/// Opens connections to the echo server of the external network, one after the other, and prints
/// how many are open.
const OPEN_FOUR: &str = "bash -c 'n=0; for fd in 5 6 7 8; do \
    timeout 2 bash -c \"exec 3<>/dev/tcp/10.99.0.2/7778\" 2>/dev/null || break; \
    eval \"exec $fd<>/dev/tcp/10.99.0.2/7778\"; n=$((n+1)); done; echo $n'";

async fn start(
    data_dir: &std::path::Path,
    connections: u32,
    network_mbit_per_sec: u32,
) -> TestAgent {
    let mut config = agent::config(data_dir);
    config.limits.sandbox.connections = connections;
    config.limits.sandbox.network_mbit_per_sec = network_mbit_per_sec;
    TestAgent::start_with(config, agent::deadlines()).await
}

async fn create(agent: &TestAgent, id: &str) {
    let request = pb::CreateSandboxRequest {
        egress: pb::Egress::EGRESS_ALLOW.into(),
        ..agent::request(id)
    };
    agent.create_with(request).await.expect("made");
}

async fn printed(agent: &TestAgent, id: &str, script: &str) -> String {
    let done = agent.sh(id, script).await.expect("run");
    String::from_utf8(done.stdout).expect("text")
}

#[test]
fn connections_of_a_guest_are_limited_by_the_setting() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), 2, 0).await;
        create(&agent, "sb-1").await;
        // The connection of the probe before each is closed, and the table forgets it later. So
        // fewer than the limit may be open, and more never are.
        let open: u32 = printed(&agent, "sb-1", OPEN_FOUR)
            .await
            .trim()
            .parse()
            .expect("a number");
        assert!((1..=2).contains(&open), "{open} connections");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;

        let agent = start(data.path(), 0, 0).await;
        create(&agent, "sb-2").await;
        assert_eq!(printed(&agent, "sb-2", OPEN_FOUR).await, "4\n");
        agent.destroy("sb-2").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn traffic_of_a_guest_is_limited_by_the_setting() {
    on_private_host(async || {
        make_world();
        send_zeros("/run/netns/world", SENDER);
        let data = tempfile::tempdir().expect("a directory");
        let script = format!(
            "bash -c 'timeout 60 head -c 5000000 </dev/tcp/{} | wc -c'",
            SENDER.replace(':', "/")
        );
        // 5 MB at 1 MB/s, of which the first is free.
        for (mbit_per_sec, is_slow) in [(8, true), (0, false)] {
            let agent = start(data.path(), 0, mbit_per_sec).await;
            create(&agent, "sb-1").await;
            let began = Instant::now();
            assert_eq!(printed(&agent, "sb-1", &script).await.trim(), "5000000");
            let took = began.elapsed();
            assert_eq!(took > Duration::from_secs(2), is_slow, "{took:?}");
            agent.destroy("sb-1").await.expect("destroyed");
            agent.stop().await;
        }
    });
}

#[test]
fn an_agent_that_must_limit_sandboxes_does_not_start_without_controllers() {
    on_private_host(async || {
        // Hides the controllers of the host. Mounts are private to this test.
        let cgroups = "/sys/fs/cgroup";
        mount(
            Some("tmpfs"),
            cgroups,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mounted");
        let data = tempfile::tempdir().expect("a directory");
        let with = |policy| {
            let mut config = agent::config(data.path());
            config.limits.cgroups = policy;
            config
        };
        for policy in [CgroupPolicy::Required, CgroupPolicy::Auto] {
            let error = TestAgent::refusal_of(with(policy)).await;
            assert!(error.contains("limit sandboxes"), "{error}");
        }
        let optional = with(CgroupPolicy::Optional);
        let agent = TestAgent::start_with(optional, agent::deadlines()).await;
        agent.stop().await;
    });
}
