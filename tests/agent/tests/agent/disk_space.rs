//! Disk space of the host: what is rejected when it is short, and what still works.

use connectrpc::{ConnectError, ErrorCode};
use wrenn_agent::{AgentConfig, HostLimits};
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::agent::{TestAgent, config, deadlines, on_private_host, request};

async fn start(data_dir: &std::path::Path, limits: HostLimits) -> TestAgent {
    let config = AgentConfig {
        limits,
        ..config(data_dir)
    };
    TestAgent::start_with(config, deadlines()).await
}

async fn fork(agent: &TestAgent, id: &str, copy: &str) -> Result<(), ConnectError> {
    let request = pb::ForkSandboxRequest {
        id: id.to_owned(),
        copy_ids: vec![copy.to_owned()],
        ..Default::default()
    };
    agent.client.fork_sandbox(request).await.map(drop)
}

fn is_full(error: &ConnectError, setting: &str) {
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    assert!(error.to_string().contains(setting), "{error}");
}

#[test]
fn short_disk_space_rejects_creates_snapshots_and_forks_and_never_a_pause() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = start(data.path(), HostLimits::default()).await;
        first.create("sb-1").await.expect("made");
        first.stop().await;
        let limits = HostLimits {
            disk_reserve_mib: Some(u64::MAX),
            ..HostLimits::default()
        };
        let agent = start(data.path(), limits).await;
        let running = pb::SandboxState::SANDBOX_STATE_RUNNING;
        agent.wait_for("sb-1", running).await;
        let setting = "WRENN_DISK_RESERVE_MB";
        is_full(&agent.create("sb-2").await.expect_err("full"), setting);
        is_full(
            &agent.snapshot("sb-1", "s").await.expect_err("full"),
            setting,
        );
        is_full(
            &fork(&agent, "sb-1", "sb-2").await.expect_err("full"),
            setting,
        );
        agent.wait_for("sb-1", running).await;
        agent.pause("sb-1").await.expect("paused");
        // A paused sandbox has its snapshot already, and a resume writes next to nothing.
        agent.snapshot("sb-1", "s").await.expect("named");
        agent.resume("sb-1").await.expect("resumed");
        assert_eq!(agent.spec("sb-1").disk_room_bytes, u64::MAX);
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn a_sandbox_over_its_budget_is_paused_but_not_forked() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let limits = HostLimits {
            sandbox_disk_budget_mib: Some(1),
            ..HostLimits::default()
        };
        let agent = start(data.path(), limits).await;
        let error = agent.create("sb-1").await.expect_err("a disk of 5 GiB");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert!(error.to_string().contains("`disk_size_mb`"), "{error}");
        let create = pb::CreateSandboxRequest {
            disk_size_mb: 1,
            ..request("sb-1")
        };
        agent.create_with(create).await.expect("made");
        fork(&agent, "sb-1", "sb-2")
            .await
            .expect("within the budget");
        let disk = agent.sandbox_dir("sb-1").join("rootfs.7.qcow2");
        std::fs::write(disk, vec![1; 2 << 20]).expect("written");
        let error = fork(&agent, "sb-1", "sb-3").await.expect_err("over");
        is_full(&error, "WRENN_SANDBOX_DISK_BUDGET_MB");
        agent.pause("sb-1").await.expect("paused");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.destroy("sb-2").await.expect("destroyed");
        agent.stop().await;
    });
}
