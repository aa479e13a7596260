//! Failures of a create and losses of a running sandbox: the errors that the caller sees, and
//! complete cleanup. The rows are those of the table in `sandbox.rs`.

use std::{
    fs,
    time::{Duration, Instant},
};

use connectrpc::ErrorCode;
use wrenn_agent::Deadlines;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, faulty, on_private_host, request},
    private_host::{self, Footprint},
};

/// Runs a test with an agent, and checks that nothing is left at its end.
fn with_agent(test: impl AsyncFnOnce(&TestAgent)) {
    with_deadlines(agent::deadlines(), test);
}

fn with_deadlines(deadlines: Deadlines, test: impl AsyncFnOnce(&TestAgent)) {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start_with(agent::config(data.path()), deadlines).await;
        let before = Footprint::now();
        test(&agent).await;
        assert!(agent.list().await.is_empty());
        let sandbox_dirs = fs::read_dir(data.path().join("sandboxes"))
            .expect("directories")
            .count();
        assert_eq!(sandbox_dirs, 0);
        assert_eq!(Footprint::now(), before);
        assert!(!cgroups_exist(), "a cgroup is left");
        agent.stop().await;
    });
}

/// True if a cgroup of any test's `sb-fail` exists. Only the tests of this binary use that name.
fn cgroups_exist() -> bool {
    let instances = ["memory", "cpu", "pids", "blkio", "unified", ""]
        .into_iter()
        .flat_map(|hierarchy| {
            fs::read_dir(format!("/sys/fs/cgroup/{hierarchy}/wrenn"))
                .into_iter()
                .flatten()
        });
    let of_this_process = format!("sb-fail{}", std::process::id());
    instances
        .flatten()
        .any(|dir| dir.path().join(&of_this_process).exists())
}

fn id() -> String {
    format!("sb-fail{}", std::process::id())
}

/// Checks that a create with a fault fails with this code and text, and leaves nothing.
fn fails(fault: &str, code: ErrorCode, text: &str) {
    fails_by(agent::deadlines(), fault, code, text);
}

fn fails_by(deadlines: Deadlines, fault: &str, code: ErrorCode, text: &str) {
    with_deadlines(deadlines, async |agent| {
        let error = agent
            .create_with(faulty(&id(), fault))
            .await
            .expect_err("it must fail");
        assert_eq!(error.code, code, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    });
}

#[test]
fn supervisor_that_exits_at_start_is_reported_with_its_reason() {
    fails(
        "die-at-start",
        ErrorCode::Internal,
        "the disk is not readable",
    );
}

#[test]
fn vm_that_never_starts_times_out() {
    let mut deadlines = agent::deadlines();
    deadlines.machine = Duration::from_secs(1);
    fails_by(
        deadlines,
        "never-ready",
        ErrorCode::Internal,
        "did not start within 1s",
    );
}

#[test]
fn vm_that_exits_during_its_boot_is_detected_at_once() {
    fails("die-in-boot", ErrorCode::Internal, "the guest powered off");
}

#[test]
fn silent_guest_times_out() {
    let mut deadlines = agent::deadlines();
    deadlines.guest = Duration::from_secs(1);
    fails_by(
        deadlines,
        "silent-guest",
        ErrorCode::DeadlineExceeded,
        "did not answer within 1s",
    );
}

/// Boots that the agent counted: started, retried, stalled.
async fn boots(agent: &TestAgent) -> [u64; 3] {
    let request = pb::GetHostRequest::default();
    let host = agent.client.get_host(request).await.expect("a host");
    let host = host.into_owned();
    [host.boots, host.boots_retried, host.boots_stalled]
}

#[test]
fn guest_that_hangs_at_boot_is_booted_again() {
    with_agent(async |agent| {
        let id = id();
        let began = Instant::now();
        let sandbox = agent.create_with(faulty(&id, "hang-once")).await;
        let sandbox = sandbox.expect("the second attempt boots");
        assert_eq!(
            sandbox.state.as_known(),
            Some(pb::SandboxState::SANDBOX_STATE_RUNNING)
        );
        // Detection takes 6 s; the deadline of a guest is far beyond this.
        assert!(began.elapsed() < Duration::from_secs(30));
        assert_eq!(boots(agent).await, [1, 1, 0]);
        assert_eq!(
            agent.sh(&id, "echo hi").await.expect("runs").stdout,
            b"hi\n"
        );
        agent.destroy(&id).await.expect("destroyed");
    });
}

#[test]
fn guest_that_hangs_at_every_boot_fails_within_seconds() {
    with_agent(async |agent| {
        for (fault, text) in [
            ("hang", "the guest is idle after it started the guest agent"),
            (
                "report-failure",
                "the guest's init reported a failure: no timer",
            ),
        ] {
            let began = Instant::now();
            let create = agent.create_with(faulty(&id(), fault));
            let error = create.await.expect_err("no attempt boots");
            assert_eq!(error.code, ErrorCode::Internal, "{error}");
            assert!(error.to_string().contains(text), "{error}");
            assert!(began.elapsed() < Duration::from_secs(30));
        }
        // One more attempt after a hang, four after a rejection.
        assert_eq!(boots(agent).await, [2, 5, 2]);
    });
}

/// The agent is killed while an attempt hangs. The next agent detects this, and boots the guest
/// again.
#[test]
fn a_hung_boot_that_is_adopted_is_booted_again() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let id = id();
        let create = agent.create_with(faulty(&id, "hang-once"));
        let stop = async {
            agent::until("the first attempt", async || {
                // A supervisor that has not reported its start would end with the agent.
                agent.sandbox_dir(&id).join("asked").exists().then_some(())
            })
            .await;
        };
        tokio::select! {
            made = create => panic!("the first attempt hangs: {made:?}"),
            () = stop => {}
        }
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        agent
            .wait_for(&id, pb::SandboxState::SANDBOX_STATE_RUNNING)
            .await;
        assert_eq!(boots(&agent).await, [1, 1, 0]);
        agent.destroy(&id).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn rejection_of_the_settings_is_reported_with_the_message_of_the_guest() {
    fails(
        "reject-init",
        ErrorCode::InvalidArgument,
        "settings rejected",
    );
}

#[test]
fn missing_supervisor_program_is_reported() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut config = agent::config(data.path());
        config.wrenn_exe = "/no/such/program".into();
        let agent = TestAgent::start_with(config, agent::deadlines()).await;
        let before = Footprint::now();
        let error = agent.create(&id()).await.expect_err("it must fail");
        assert_eq!(error.code, ErrorCode::Internal);
        assert!(
            error.to_string().contains("failed to start the supervisor"),
            "{error}"
        );
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn failed_network_is_undone() {
    with_agent(async |agent| {
        // The name of the first slot's link is taken.
        private_host::ip(&["link", "add", "wrenn-v1", "type", "veth", "peer", "other"]);
        let error = agent.create(&id()).await.expect_err("it must fail");
        assert_eq!(error.code, ErrorCode::Internal, "{error}");
        assert!(error.to_string().contains("network"), "{error}");
    });
}

#[test]
fn create_without_a_free_slot_is_resource_exhausted() {
    with_agent(async |agent| {
        for slot in 1..=32_767 {
            fs::write(format!("/run/wrenn/slots/{slot}"), "").expect("written");
        }
        let error = agent.create(&id()).await.expect_err("it must fail");
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
        for slot in 1..=32_767 {
            fs::remove_file(format!("/run/wrenn/slots/{slot}")).expect("removed");
        }
    });
}

#[test]
fn id_is_in_use_until_its_sandbox_is_destroyed() {
    with_agent(async |agent| {
        agent.create(&id()).await.expect("made");
        let error = agent.create(&id()).await.expect_err("taken");
        assert_eq!(error.code, ErrorCode::AlreadyExists, "{error}");
        assert_eq!(agent.list().await.len(), 1);
        agent.destroy(&id()).await.expect("destroyed");
        agent.create(&id()).await.expect("made again");
        agent.destroy(&id()).await.expect("destroyed");
    });
}

/// Uses a file system with plenty of space but a limited number of files, so it is full at another
/// step each time.
#[test]
fn full_disk_at_any_step_is_reported_and_running_sandboxes_stay_usable() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let flags = nix::mount::MsFlags::empty();
        let tmpfs = Some("tmpfs");
        nix::mount::mount(tmpfs, data.path(), tmpfs, flags, Some("size=1g")).expect("mounted");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-first").await.expect("made");
        let before = Footprint::now();
        let used = count_files(data.path());
        let mut failures = 0;
        for spare in 0..30 {
            let options = format!("remount,nr_inodes={}", used + spare);
            let remount = nix::mount::MsFlags::MS_REMOUNT;
            nix::mount::mount(
                tmpfs,
                data.path(),
                tmpfs,
                remount,
                Some(options.trim_start_matches("remount,")),
            )
            .expect("remounted");
            match agent.create(&id()).await {
                Ok(_) => break,
                Err(error) => {
                    failures += 1;
                    // The very last file is the supervisor's own socket.
                    let full = error.code == ErrorCode::ResourceExhausted
                        && error.to_string().contains("disk is full");
                    assert!(
                        full || error.to_string().contains("virtual machine"),
                        "{error}"
                    );
                    assert_eq!(Footprint::now(), before, "with {spare} files to spare");
                    // Its logs are kept.
                    let _ = fs::remove_dir_all(data.path().join("logs"));
                    assert_eq!(count_files(data.path()), used);
                    let done = agent.sh("sb-first", "echo still here").await.expect("run");
                    assert_eq!(done.stdout, b"still here\n");
                }
            }
        }
        assert!(failures >= 3, "only {failures} steps failed");
        agent.destroy(&id()).await.expect("made in the end");
        agent.destroy("sb-first").await.expect("destroyed");
        agent.stop().await;
    });
}

fn count_files(dir: &std::path::Path) -> usize {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    // Plus the directory itself.
    1 + entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count_files(&entry.path()),
            _ => 1,
        })
        .sum::<usize>()
}

#[test]
fn destroy_aborts_a_create_and_leaves_nothing() {
    with_agent(async |agent| {
        for fault in ["never-ready", "silent-guest"] {
            let id = id();
            let create = agent.create_with(faulty(&id, fault));
            let destroy = async {
                // The create proceeds as far as the fault permits.
                agent::until("a machine", async || {
                    agent
                        .sandbox_dir(&id)
                        .join("machine.pid")
                        .exists()
                        .then_some(())
                })
                .await;
                agent.destroy(&id).await
            };
            let (created, destroyed) = tokio::join!(create, destroy);
            destroyed.expect("destroyed");
            let error = created.expect_err("destroyed");
            assert_eq!(error.code, ErrorCode::Aborted, "{error}");
            assert!(error.to_string().contains("was destroyed"), "{error}");
            assert!(agent.list().await.is_empty());
        }
    });
}

/// The caller's connection ends at varying times, from the first to the last millisecond of the
/// create.
#[test]
fn disconnect_at_any_step_leaves_nothing_after_a_destroy() {
    with_agent(async |agent| {
        let began = Instant::now();
        agent.create(&id()).await.expect("made");
        let whole = began.elapsed();
        agent.destroy(&id()).await.expect("destroyed");
        for step in 0..12 {
            let id = id();
            let create = agent.create(&id);
            let gone = tokio::time::timeout(whole * step / 10, create)
                .await
                .is_err();
            match agent.destroy(&id).await {
                Ok(()) => {}
                // The caller disconnected before its request was read.
                Err(error) => assert!(gone && error.code == ErrorCode::NotFound, "{error}"),
            }
        }
        // The last request may have been read after its destroy.
        for sandbox in agent.list().await {
            agent.destroy(&sandbox.id).await.expect("destroyed");
        }
    });
}

#[test]
fn killed_supervisor_is_an_error_within_a_second_and_affects_no_other() {
    with_agent(async |agent| {
        agent.create("sb-other").await.expect("made");
        let before = Footprint::now();
        agent.create(&id()).await.expect("made");
        let machine = agent.machine_pid(&id());
        let lost_id = id();
        let running_stream = agent.sh(&lost_id, "sleep 100");
        let kill = async {
            agent::until("a command in the guest", async || {
                let calls = fs::read_to_string(agent.sandbox_dir(&id()).join("calls.log"));
                calls
                    .is_ok_and(|calls| calls.contains("start"))
                    .then_some(())
            })
            .await;
            agent::kill_9(agent.supervisor_pid(&id()));
            let began = Instant::now();
            let lost = agent
                .wait_for(&id(), pb::SandboxState::SANDBOX_STATE_ERROR)
                .await;
            // Takes milliseconds on an idle host, but this host may be busy.
            assert!(began.elapsed() < Duration::from_secs(1));
            lost
        };
        let (command, lost) = tokio::join!(running_stream, kill);
        assert!(
            lost.reason
                .contains("supervisor process ended unexpectedly"),
            "{}",
            lost.reason
        );
        let error = command.expect_err("its guest is gone");
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        agent::until("all freed", async || {
            (Footprint::now() == before).then_some(())
        })
        .await;
        assert!(
            !agent::is_alive(machine),
            "the machine outlives its supervisor"
        );
        let spec = agent.spec(&id());
        assert!(spec.cgroups.iter().all(|dir| !dir.exists()));
        assert!(!agent.sandbox_dir(&id()).join("rootfs.qcow2").exists());

        let error = agent.sh(&id(), "true").await.expect_err("lost");
        assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
        let done = agent.sh("sb-other", "echo fine").await.expect("unharmed");
        assert_eq!(done.stdout, b"fine\n");
        agent.destroy(&id()).await.expect("destroyed");
        agent.destroy("sb-other").await.expect("destroyed");
    });
}

#[test]
fn reason_left_by_a_supervisor_is_reported() {
    with_agent(async |agent| {
        agent.create(&id()).await.expect("made");
        let status = r#"{"requested": false, "reason": "the guest powered off"}"#;
        fs::write(agent.sandbox_dir(&id()).join("status.json"), status).expect("written");
        agent::kill_9(agent.supervisor_pid(&id()));
        let lost = agent
            .wait_for(&id(), pb::SandboxState::SANDBOX_STATE_ERROR)
            .await;
        assert_eq!(lost.reason, "the guest powered off");
        agent.destroy(&id()).await.expect("destroyed");
    });
}

#[test]
fn unresponsive_supervisor_is_killed() {
    with_agent(async |agent| {
        agent
            .create_with(faulty(&id(), "deaf"))
            .await
            .expect("made");
        let (supervisor, machine) = (agent.supervisor_pid(&id()), agent.machine_pid(&id()));
        agent.destroy(&id()).await.expect("destroyed");
        assert!(!agent::is_alive(supervisor) && !agent::is_alive(machine));
    });
}

#[test]
fn invalid_request_creates_nothing_and_names_the_field() {
    with_agent(async |agent| {
        let wrong: [(&str, pb::CreateSandboxRequest); 12] = [
            ("id", request("../../etc")),
            ("id", request("")),
            (
                "template",
                pb::CreateSandboxRequest {
                    template: "../secret".into(),
                    ..request(&id())
                },
            ),
            (
                "vcpus",
                pb::CreateSandboxRequest {
                    vcpus: 0,
                    ..request(&id())
                },
            ),
            (
                "vcpus",
                pb::CreateSandboxRequest {
                    vcpus: 10_000,
                    ..request(&id())
                },
            ),
            (
                "memory_mb",
                pb::CreateSandboxRequest {
                    memory_mb: 1,
                    ..request(&id())
                },
            ),
            (
                "memory_mb",
                pb::CreateSandboxRequest {
                    memory_mb: u32::MAX,
                    ..request(&id())
                },
            ),
            (
                "timeout_sec",
                pb::CreateSandboxRequest {
                    timeout_sec: u32::MAX,
                    ..request(&id())
                },
            ),
            (
                "disk_size_mb",
                pb::CreateSandboxRequest {
                    disk_size_mb: u32::MAX,
                    ..request(&id())
                },
            ),
            (
                "egress",
                pb::CreateSandboxRequest {
                    egress: 7.into(),
                    ..request(&id())
                },
            ),
            ("envs", with_env("A=B", "x")),
            ("envs", with_env("BIG", &"x".repeat(100_000))),
        ];
        for (field, request) in wrong {
            let error = agent.create_with(request).await.expect_err(field);
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        let unknown = pb::CreateSandboxRequest {
            template: "unknown".into(),
            ..request(&id())
        };
        let error = agent.create_with(unknown).await.expect_err("unknown");
        assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    });
}

fn with_env(name: &str, value: &str) -> pb::CreateSandboxRequest {
    pb::CreateSandboxRequest {
        envs: [(name.to_owned(), value.to_owned())].into_iter().collect(),
        ..request(&id())
    }
}
