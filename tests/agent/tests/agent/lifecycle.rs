//! Life of a sandbox through RPC calls, on a real host network with real cgroups, and with a fake
//! VM and guest.

use futures::StreamExt as _;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host::Footprint,
};

#[test]
fn longest_id_works_below_a_long_path() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        // A socket address holds 108 bytes, and this path alone is longer.
        let dir = data.path().join("d".repeat(120));
        std::fs::create_dir(&dir).expect("created");
        let agent = TestAgent::start(&dir).await;
        let id = format!("sb-{}", "z".repeat(40));
        agent.create(&id).await.expect("made");
        let done = agent.sh(&id, "echo here").await.expect("run");
        assert_eq!(&*done.stdout, b"here\n");
        agent.destroy(&id).await.expect("destroyed");
        assert!(!agent.sandbox_dir(&id).exists());
        agent.stop().await;
    });
}

#[test]
fn sandbox_is_created_used_and_destroyed_without_a_leak() {
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
            std::fs::read_to_string(agent.sandbox_dir("sb-life").join("calls.log")).expect("calls");
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
        let machine = agent.machine_pid("sb-life");
        agent.destroy("sb-life").await.expect("destroyed");
        assert!(!agent::is_alive(machine));
        assert!(agent.list().await.is_empty());
        assert!(!agent.sandbox_dir("sb-life").exists());
        assert!(spec.cgroups.iter().all(|dir| !dir.exists()));
        assert_eq!(Footprint::now(), before);
        let error = agent.destroy("sb-life").await.expect_err("gone");
        assert_eq!(error.code, connectrpc::ErrorCode::NotFound);
        agent.stop().await;
    });
}

/// Counts the file descriptors of this process and the tasks of its runtime, including the agent's.
fn own_resources() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("/proc").count();
    let tasks = tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks();
    (descriptors, tasks)
}

#[test]
fn concurrent_sandboxes_leave_no_resource_on_the_host_or_in_the_agent() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        let cycle = async |agent: &TestAgent, n: usize| {
            let id = format!("sb-{n}");
            agent.create(&id).await.expect("made");
            let done = agent.sh(&id, &format!("echo {n}")).await.expect("run");
            assert_eq!(done.stdout, format!("{n}\n").into_bytes());
            agent.destroy(&id).await.expect("destroyed");
        };
        // The first cycle fills caches that are filled once.
        cycle(&agent, 100).await;
        agent.renew_client();
        let (before, own_before) = (Footprint::now(), own_resources());
        let cycles = futures::stream::iter(0..24).map(|n| cycle(&agent, n));
        cycles.buffer_unordered(8).collect::<()>().await;
        assert!(agent.list().await.is_empty());
        assert_eq!(Footprint::now(), before);
        agent.renew_client();
        agent::until("release of the agent's own resources", async || {
            let now = own_resources();
            (now.0 <= own_before.0 && now.1 <= own_before.1).then_some(())
        })
        .await;
        agent.stop().await;
    });
}

#[test]
fn racing_calls_on_one_id_end_in_a_legal_state() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        for round in 0..6 {
            let act = async |n: usize| {
                // Different in every round, the same in every run.
                tokio::time::sleep(std::time::Duration::from_millis(
                    (n * 37 + round * 13) as u64 % 200,
                ))
                .await;
                let result = match n % 4 {
                    0 => agent.create("sb-race").await.map(drop),
                    1 => agent.destroy("sb-race").await,
                    2 => match agent.sh("sb-race", "true").await {
                        // The sandbox was replaced by one with another token.
                        Err(error) if error.code == connectrpc::ErrorCode::Unauthenticated => {
                            Ok(())
                        }
                        done => done.map(drop),
                    },
                    _ => {
                        let request = pb::PingSandboxRequest {
                            id: "sb-race".into(),
                            ..Default::default()
                        };
                        agent.client.ping_sandbox(request).await.map(drop)
                    }
                };
                if let Err(error) = result {
                    let legal = [
                        connectrpc::ErrorCode::NotFound,
                        connectrpc::ErrorCode::AlreadyExists,
                        connectrpc::ErrorCode::Aborted,
                        connectrpc::ErrorCode::FailedPrecondition,
                        connectrpc::ErrorCode::Unavailable,
                    ];
                    assert!(legal.contains(&error.code), "{error}");
                }
            };
            futures::future::join_all((0..40).map(act)).await;
        }
        if let Some(left) = agent.find("sb-race").await {
            assert_eq!(
                left.state.as_known(),
                Some(pb::SandboxState::SANDBOX_STATE_RUNNING)
            );
            agent.destroy("sb-race").await.expect("destroyed");
        }
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn call_without_the_token_is_rejected() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let unauthorized = agent::client(agent.address, "wrong");
        let error = unauthorized
            .list_sandboxes(pb::ListSandboxesRequest::default())
            .await
            .expect_err("refused");
        assert_eq!(
            error.code,
            connectrpc::ErrorCode::Unauthenticated,
            "{error}"
        );
        let (head, _) = agent::ask_tunnel(agent.address, "/tunnel/sb-1/80", "wrong")
            .await
            .expect("an answer");
        assert!(head.starts_with("HTTP/1.1 401"), "{head}");
        agent.stop().await;
    });
}

#[test]
fn host_and_sandbox_metrics_are_reported() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        let host = agent.client.get_host(pb::GetHostRequest::default()).await;
        let host = host.expect("host information").into_owned();
        assert_eq!((host.accel.as_str(), host.sandboxes), ("tcg", 1));
        assert!(host.cpu_count > 0 && host.memory_total_mib > host.memory_available_mib);
        assert_eq!(host.templates.len(), 1);
        assert_eq!(host.templates[0].name, "minimal");
        let request = pb::GetMetricsRequest {
            id: "sb-1".into(),
            ..Default::default()
        };
        let metrics = agent
            .client
            .get_metrics(request)
            .await
            .expect("metrics")
            .into_owned();
        // The fake guest's processors and memory are those of this machine.
        let age_ms = unix_ms() - metrics.timestamp_unix_ms;
        assert!((0..60_000).contains(&age_ms), "{metrics:?}");
        let cpus = std::thread::available_parallelism().expect("Linux").get();
        assert_eq!(u32::try_from(cpus), Ok(metrics.cpu_count));
        assert_eq!(metrics.mem_total_bytes >> 20, host.memory_total_mib);
        assert!((1..metrics.mem_total_bytes).contains(&metrics.mem_used_bytes));
        assert!(metrics.mem_cache_bytes > 0 && metrics.disk_total_bytes > 0);

        // A ping counts as activity, a list does not.
        let seen = agent
            .find("sb-1")
            .await
            .expect("listed")
            .last_active_unix_ms;
        let request = pb::PingSandboxRequest {
            id: "sb-1".into(),
            ..Default::default()
        };
        agent::until("a later time", async || {
            assert_eq!(
                agent
                    .find("sb-1")
                    .await
                    .expect("listed")
                    .last_active_unix_ms,
                seen
            );
            (unix_ms() > seen).then_some(())
        })
        .await;
        agent.client.ping_sandbox(request).await.expect("counted");
        assert!(
            agent
                .find("sb-1")
                .await
                .expect("listed")
                .last_active_unix_ms
                > seen
        );
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(since.expect("after 1970").as_millis()).expect("not yet")
}

#[test]
fn copy_has_the_environment_of_its_snapshot_unless_overridden() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let create = async |id: &str, template: &str, envs: &[(&str, &str)]| {
            let pairs = envs
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()));
            let request = pb::CreateSandboxRequest {
                template: template.to_owned(),
                envs: pairs.collect(),
                ..agent::request(id)
            };
            agent.create_with(request).await.expect("made");
        };
        let has = |id: &str, a: &str, b: &str| {
            let envs = agent.spec(id).envs;
            assert_eq!((&*envs["A"], &*envs["B"], envs.len()), (a, b, 2), "{id}");
        };
        create("sb-1", "minimal", &[("A", "1"), ("B", "1")]).await;
        let fork = pb::ForkSandboxRequest {
            id: "sb-1".to_owned(),
            copy_ids: vec!["sb-2".to_owned()],
            ..Default::default()
        };
        agent.client.fork_sandbox(fork).await.expect("forked");
        has("sb-2", "1", "1");
        let snapshot = agent.snapshot("sb-2", "moment").await;
        snapshot.expect("snapshot taken");
        create("sb-3", "moment", &[("B", "2")]).await;
        has("sb-3", "1", "2");
        for id in ["sb-1", "sb-2", "sb-3"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}
