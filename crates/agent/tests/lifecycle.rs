//! A sandbox's life by RPC, on a real host network and real cgroups, with stand-ins for its machine and guest.

#[path = "support/agent.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod agent;
#[path = "support/private_host.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod private_host;

use agent::{TestAgent, on_private_host};
use private_host::Footprint;
use wrenn_proto::rpc::hostagent::v1 as pb;

#[test]
fn a_sandbox_is_made_used_and_gone_without_a_trace() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        let made = agent.create("sb-life").await.expect("made");
        assert_eq!(
            made.state.as_known(),
            Some(pb::SandboxState::SANDBOX_STATE_RUNNING)
        );
        assert_eq!(
            (made.host_ip.as_str(), made.guest_ip.as_str()),
            ("10.11.0.1", "169.254.0.21")
        );
        let boot = made.boot.clone();
        assert!(
            boot.prepared_ms > 0 && boot.envd_ms > boot.prepared_ms,
            "{boot:?}"
        );
        assert_eq!(boot.kernel_ms, boot.vmm_started_ms + 1);
        assert_eq!(agent.list().await, std::slice::from_ref(&made));
        let spec = agent.spec("sb-life");
        assert!(spec.cgroups.iter().all(|dir| dir.is_dir()));
        let init =
            std::fs::read_to_string(agent.folder("sb-life").join("calls.log")).expect("calls");
        assert!(
            init.contains("\"defaultUser\":\"user\"") && init.contains(&spec.envd_token),
            "{init}"
        );

        let done = agent
            .sh("sb-life", "echo out; echo err >&2; exit 3")
            .await
            .expect("run");
        assert_eq!(
            (&*done.stdout, &*done.stderr, done.exit_code),
            (&b"out\n"[..], &b"err\n"[..], 3)
        );
        let path = data.path().join("file").to_str().expect("text").to_owned();
        let write = pb::WriteFileRequest {
            meta: agent::meta("sb-life", &path).into(),
            content: b"content".to_vec(),
            ..Default::default()
        };
        agent.client.write_file(write).await.expect("written");
        let read = pb::ReadFileRequest {
            meta: agent::meta("sb-life", &path).into(),
            ..Default::default()
        };
        let read = agent
            .client
            .read_file(read)
            .await
            .expect("read")
            .into_owned();
        assert_eq!(read.content, b"content");

        let machine = agent.machine_pid("sb-life");
        agent.destroy("sb-life").await.expect("destroyed");
        assert!(!agent::is_alive(machine));
        assert!(agent.list().await.is_empty());
        assert!(!agent.folder("sb-life").exists());
        assert!(spec.cgroups.iter().all(|dir| !dir.exists()));
        assert_eq!(Footprint::now(), before);
        let error = agent.destroy("sb-life").await.expect_err("gone");
        assert_eq!(error.code, connectrpc::ErrorCode::NotFound);
        agent.stop().await;
    });
}
