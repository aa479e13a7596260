//! Ends of sandboxes whose guest or supervisor does not help: pauses that must succeed, and
//! destroys that do not wait for another operation. The rows of the tables in
//! `sandbox/preparation.rs` and `sandbox/pause_effort.rs`.

use std::{
    fs,
    time::{Duration, Instant},
};

use connectrpc::ErrorCode;
use wrenn_agent::{AgentConfig, HostLimits};
use wrenn_proto::rpc::hostagent::v1::{PauseEffort, SandboxState};

use crate::{
    agent::{TestAgent, config, deadlines, is_alive, on_private_host, until},
    private_host::Footprint,
};

const ID: &str = "sb-end";
const RUNNING: SandboxState = SandboxState::SANDBOX_STATE_RUNNING;
const PAUSING: SandboxState = SandboxState::SANDBOX_STATE_PAUSING;
const PAUSED: SandboxState = SandboxState::SANDBOX_STATE_PAUSED;
const ERROR: SandboxState = SandboxState::SANDBOX_STATE_ERROR;
const WITHOUT_GUEST: PauseEffort = PauseEffort::PAUSE_EFFORT_WITHOUT_GUEST;
const OR_END: PauseEffort = PauseEffort::PAUSE_EFFORT_OR_END;

/// Maximum time of a destroy that does not wait for another operation, on a busy machine. Each of
/// the waits that it must not join takes longer.
const QUICK: Duration = Duration::from_secs(4);

/// Makes the sandbox's snapshots or its guest fail in this way from now on.
fn set_fault(agent: &TestAgent, fault: &str) {
    fs::write(agent.sandbox_dir(ID).join("fault"), fault).expect("written");
}

async fn state(agent: &TestAgent) -> Option<SandboxState> {
    agent.find(ID).await.expect("it is there").state.as_known()
}

/// Checks that a guest continues, after a pause that failed or a resume.
async fn runs(agent: &TestAgent) {
    let done = agent.sh(ID, "echo here").await.expect("run");
    assert_eq!(done.stdout, b"here\n");
}

/// Destroys the sandbox, which must be quick and leave nothing.
async fn ends_quickly(agent: &TestAgent, before: &Footprint, what: &str) {
    let machine = agent.machine_pid(ID);
    let began = Instant::now();
    agent.destroy(ID).await.expect(what);
    let took = began.elapsed();
    assert!(took < QUICK, "{what}: the destroy took {took:?}");
    assert!(!is_alive(machine), "{what}");
    assert!(!agent.sandbox_dir(ID).exists(), "{what}");
    assert_eq!(&Footprint::now(), before, "{what}");
}

#[test]
fn guest_that_answers_nothing_is_noticed_within_seconds_and_keeps_running() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        set_fault(&agent, "silent");
        let began = Instant::now();
        let error = agent.pause(ID).await.expect_err("no answer");
        assert!(began.elapsed() < Duration::from_secs(25), "{error}");
        assert_eq!(error.code, ErrorCode::DeadlineExceeded, "{error}");
        assert!(error.to_string().contains("does not answer"), "{error}");
        assert_eq!(state(&agent).await, Some(RUNNING));
        set_fault(&agent, "");
        runs(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn sandbox_is_paused_without_the_help_of_its_guest() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        for fault in ["silent", "reject-prepare"] {
            agent.create(ID).await.expect("made");
            set_fault(&agent, fault);
            agent.pause_with(ID, WITHOUT_GUEST).await.expect(fault);
            let paused = agent.find(ID).await.expect("it is there");
            assert_eq!(paused.state.as_known(), Some(PAUSED), "{fault}");
            assert!(paused.warning.contains("guest agent"), "{paused:?}");
            set_fault(&agent, "");
            agent.resume(ID).await.expect("resumed");
            runs(&agent).await;
            agent.destroy(ID).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn sandbox_that_cannot_be_paused_is_ended_if_it_must() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        for has_snapshot in [true, false] {
            agent.create(ID).await.expect("made");
            if has_snapshot {
                agent.pause(ID).await.expect("paused");
                agent.resume(ID).await.expect("resumed");
            }
            let machine = agent.machine_pid(ID);
            set_fault(&agent, "reject-snapshot");
            let error = agent.pause_with(ID, WITHOUT_GUEST).await;
            error.expect_err("rejected");
            assert_eq!(state(&agent).await, Some(RUNNING));
            agent.pause_with(ID, OR_END).await.expect_err("rejected");
            assert!(!is_alive(machine));
            let ended = agent.find(ID).await.expect("it is there");
            let (expected, reason) = match has_snapshot {
                true => (PAUSED, &ended.warning),
                false => (ERROR, &ended.reason),
            };
            assert_eq!(ended.state.as_known(), Some(expected), "{ended:?}");
            assert!(reason.contains("could not be paused"), "{ended:?}");
            set_fault(&agent, "");
            if has_snapshot {
                agent.resume(ID).await.expect("resumed");
                runs(&agent).await;
            }
            agent.destroy(ID).await.expect("destroyed");
            assert_eq!(Footprint::now(), before);
        }
        agent.stop().await;
    });
}

#[test]
fn full_disk_of_the_host_ends_no_sandbox() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let first = TestAgent::start(data.path()).await;
        first.create(ID).await.expect("made");
        first.stop().await;
        let limits = HostLimits {
            disk_reserve_mib: Some(u64::MAX),
            ..HostLimits::default()
        };
        let config = AgentConfig {
            limits,
            ..config(data.path())
        };
        let agent = TestAgent::start_with(config, deadlines()).await;
        agent.wait_for(ID, RUNNING).await;
        set_fault(&agent, "full-disk");
        let error = agent.pause_with(ID, OR_END).await.expect_err("full");
        assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
        assert_eq!(state(&agent).await, Some(RUNNING));
        runs(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn full_disk_that_a_guest_or_a_vmm_claims_does_not_prolong_a_lifetime() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        for fault in ["claim-full-disk", "full-disk"] {
            set_fault(&agent, fault);
            let error = agent.pause(ID).await.expect_err(fault);
            assert_ne!(error.code, ErrorCode::ResourceExhausted, "{error}");
            assert_eq!(state(&agent).await, Some(RUNNING));
        }
        agent.pause_with(ID, OR_END).await.expect_err("rejected");
        assert_eq!(state(&agent).await, Some(ERROR));
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn busy_supervisor_of_a_failed_pause_does_not_count_as_dead() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        set_fault(&agent, "reject-prepare");
        let busy = agent.sandbox_dir(ID).join("busy");
        // The one before the pause, and the first one after it.
        fs::write(&busy, "2").expect("written");
        agent.pause(ID).await.expect_err("rejected");
        assert_eq!(fs::read_to_string(&busy).expect("written"), "0");
        assert_eq!(state(&agent).await, Some(RUNNING));
        set_fault(&agent, "");
        runs(&agent).await;
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn destroy_does_not_wait_for_a_pause_or_a_snapshot() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        for fault in ["silent", "hang-prepare", "slow-snapshot"] {
            for pauses in [true, false] {
                let what = format!("{fault}, pauses: {pauses}");
                agent.create(ID).await.expect("made");
                set_fault(&agent, fault);
                let attempt = async {
                    match pauses {
                        true => agent.pause(ID).await,
                        false => agent.snapshot(ID, "never").await,
                    }
                };
                let destroy = async {
                    until("the attempt is in progress", async || {
                        let writes = agent.sandbox_dir(ID).join("snapshotting").exists();
                        let began = match fault {
                            "slow-snapshot" => writes,
                            // The named snapshot has no state of its own.
                            _ => !pauses || state(&agent).await == Some(PAUSING),
                        };
                        began.then_some(())
                    })
                    .await;
                    ends_quickly(&agent, &before, &what).await;
                };
                let (attempt, ()) = tokio::join!(attempt, destroy);
                let error = attempt.expect_err(&what);
                // A snapshot that had not begun finds no sandbox.
                let codes = [
                    ErrorCode::Aborted,
                    ErrorCode::Unavailable,
                    ErrorCode::NotFound,
                ];
                let again = error.code == ErrorCode::FailedPrecondition;
                assert!(codes.contains(&error.code) || again, "{what}: {error}");
            }
        }
        agent.stop().await;
    });
}

#[test]
fn destroy_does_not_wait_for_the_recovery_of_an_interrupted_snapshot() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let before = Footprint::now();
        agent.stop().await;
        let first = TestAgent::start_child(data.path()).await;
        first.create(ID).await.expect("made");
        set_fault(&first, "slow-snapshot");
        let snapshotting = first.sandbox_dir(ID).join("snapshotting");
        tokio::select! {
            paused = first.pause(ID) => panic!("the pause must not complete: {paused:?}"),
            () = until("it is being written", async || snapshotting.exists().then_some(())) => {}
        }
        first.kill().await;
        let second = TestAgent::start(data.path()).await;
        second.wait_for(ID, PAUSING).await;
        ends_quickly(&second, &before, "an interrupted snapshot").await;
        second.stop().await;
    });
}
