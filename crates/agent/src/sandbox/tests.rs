#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use wrenn_model::MachineSize;

use super::{state_machine::Loss, *};

fn sandbox() -> Arc<Sandbox> {
    let facts = SandboxFacts {
        id: "sb-state".parse().unwrap(),
        template: "minimal".parse().unwrap(),
        size: MachineSize {
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 128,
        },
        timeout_sec: 0,
        created_unix_ms: 0,
        envd_token: GuestToken::random(),
    };
    Sandbox::new(facts, Access::default(), String::new(), 0).0
}

fn running() -> Arc<Running> {
    Arc::new(Running {
        envd: EnvdClient::over_tcp((Ipv4Addr::LOCALHOST, 1).into(), "token").unwrap(),
        boot: BootTimes::default(),
        cpu: "max".parse().unwrap(),
        accel: Accel::Tcg,
        gone: CancellationToken::new(),
        memory: None,
    })
}

#[tokio::test]
async fn calls_to_the_guest_end_when_its_vm_is_gone_and_not_while_it_may_continue() {
    let (sandbox, vm) = (sandbox(), running());
    sandbox.apply(Event::CreateDone(vm.clone()));
    sandbox.apply(Event::PauseBegun);
    sandbox.apply(Event::RolledBack);
    assert!(!vm.gone.is_cancelled() && sandbox.touch_running().is_ok());
    sandbox.apply(Event::PauseBegun);
    sandbox.apply(Event::PauseDone);
    assert!(vm.gone.is_cancelled());
    let resumed = running();
    sandbox.apply(Event::ResumeBegun);
    sandbox.apply(Event::ResumeDone(resumed.clone()));
    assert!(!resumed.gone.is_cancelled());
    sandbox.apply(Event::VmLost(Loss {
        reason: "it burned".to_owned(),
        has_snapshot: false,
    }));
    assert!(resumed.gone.is_cancelled());
    assert!(matches!(sandbox.state(), State::Error { reason } if reason == "it burned"));
}

#[tokio::test]
async fn an_event_that_is_not_valid_changes_nothing() {
    let (sandbox, vm) = (sandbox(), running());
    sandbox.apply(Event::PauseDone);
    assert!(matches!(sandbox.state(), State::Starting));
    sandbox.apply(Event::CreateDone(vm.clone()));
    sandbox.apply(Event::ResumeDone(running()));
    assert!(Arc::ptr_eq(&sandbox.touch_running().unwrap(), &vm));
    assert!(!vm.gone.is_cancelled());
}

#[tokio::test]
async fn a_step_gives_way_to_a_destroy_that_is_requested_and_has_not_failed() {
    let sandbox = sandbox();
    let step = async || sandbox.unless_destroyed(async { Ok(()) }).await;
    assert!(step().await.is_ok());
    sandbox.destroy_requested().cancel();
    let aborted = step().await;
    assert!(matches!(aborted, Err(LifecycleError::Destroyed)));
    let hanging = sandbox.unless_destroyed(std::future::pending::<Result<(), _>>());
    assert!(hanging.await.is_err());
    sandbox.reset_destroy_request();
    assert!(step().await.is_ok());
}
