#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use SandboxStatus as S;
use proptest::prelude::*;

use super::*;
use crate::{
    lifecycle::{Destroy, RowChange},
    state_machine::{Event, transition},
};

fn view(status: S) -> RowView {
    RowView {
        status,
        creating: false,
        in_use: false,
        idle: Duration::ZERO,
        timeout_sec: 60,
        is_reap_delayed: false,
        steady_passes: MIN_STEADY_PASSES,
        on_other_host: false,
        is_warned: false,
    }
}

fn running() -> HostReport {
    HostReport::in_state(HostState::Running)
}

fn error(reason: &str) -> HostReport {
    HostReport::in_state(HostState::Error {
        reason: reason.to_owned(),
    })
}

fn host_states() -> Vec<Option<HostReport>> {
    vec![
        None,
        Some(HostReport::in_state(HostState::Starting)),
        Some(running()),
        Some(HostReport::in_state(HostState::Changing)),
        Some(HostReport::in_state(HostState::Paused)),
        Some(error("gone")),
        Some(HostReport::in_state(HostState::Stopping)),
    ]
}

/// Returns a letter for each step, for comparison with the module's table.
fn letter(action: Option<&Action>) -> char {
    match action {
        None => '-',
        Some(Action::Settle(decision)) => match (decision.event, decision.destroy) {
            (Event::CreateDone | Event::PauseFailed | Event::ResumeDone, _) => 'R',
            (Event::PauseDone | Event::ResumeFailed, _) => 'P',
            (Event::Lost, _) => 'E',
            (Event::Destroyed, Destroy::Nothing) => 'S',
            (Event::Destroyed, Destroy::First) => 'd',
            _ => panic!("{decision:?}"),
        },
        Some(Action::Refresh) => 'r',
        Some(Action::Warn(_)) => 'w',
        Some(Action::DestroyOrphan) => 'D',
        Some(Action::Keep) => 'K',
        Some(Action::Reap { .. }) => '!',
    }
}

#[test]
fn every_cell_of_the_table_holds() {
    let table = [
        (Some(S::Pending), "E-R-PE-"),
        (Some(S::Starting), "E-R-PE-"),
        (Some(S::Running), "E-r-PE-"),
        (Some(S::Pausing), "E-R-PE-"),
        (Some(S::Paused), "--R--E-"),
        (Some(S::Resuming), "E-R-PE-"),
        (Some(S::Stopping), "Sddddd-"),
        (Some(S::Stopped), "-DDDDD-"),
        (Some(S::Error), "-KDDKD-"),
        (None, "-KKKKK-"),
    ];
    for (status, wanted) in table {
        let row = status.map(view);
        let got: String = host_states()
            .iter()
            .map(|host| letter(one(row.as_ref(), host.as_ref()).as_ref()))
            .collect();
        assert_eq!(got, wanted, "{status:?}");
    }
}

#[test]
fn a_paused_row_takes_the_hosts_warning_once() {
    let warned = |text: &str| HostReport {
        warning: text.to_owned(),
        ..HostReport::in_state(HostState::Paused)
    };
    let mut row = view(S::Paused);
    assert_eq!(one(Some(&row), Some(&warned(""))), None);
    let action = one(Some(&row), Some(&warned("too new")));
    assert_eq!(action, Some(Action::Warn("too new".to_owned())));
    row.is_warned = true;
    assert_eq!(one(Some(&row), Some(&warned("too new"))), None);
}

#[test]
fn create_in_progress_is_left_alone() {
    for status in S::ALL {
        for host in host_states() {
            let mut row = view(status);
            row.creating = true;
            assert_eq!(one(Some(&row), host.as_ref()), None);
        }
    }
}

#[test]
fn a_row_of_another_host_is_left_alone() {
    for status in S::ALL {
        for host in host_states() {
            let mut row = view(status);
            row.on_other_host = true;
            assert_eq!(one(Some(&row), host.as_ref()), None);
        }
    }
}

#[test]
fn sandbox_is_lost_only_after_several_passes() {
    for status in S::ALL {
        for passes in 0..MIN_STEADY_PASSES {
            let mut row = view(status);
            row.steady_passes = passes;
            let action = one(Some(&row), None);
            assert!(
                matches!(letter(action.as_ref()), '-' | 'S'),
                "{status} {passes} {action:?}"
            );
        }
    }
}

#[test]
fn pause_or_resume_is_settled_only_after_several_passes() {
    for status in [S::Pausing, S::Resuming] {
        for host in [running(), HostReport::in_state(HostState::Paused)] {
            let mut row = view(status);
            row.steady_passes = MIN_STEADY_PASSES - 1;
            assert_eq!(one(Some(&row), Some(&host)), None);
        }
    }
}

#[test]
fn only_idle_sandboxes_are_ended() {
    let idle = |change: &dyn Fn(&mut RowView)| {
        let mut row = view(S::Running);
        row.idle = Duration::from_secs(60);
        change(&mut row);
        letter(one(Some(&row), Some(&running())).as_ref())
    };
    assert_eq!(idle(&|_| ()), '!');
    assert_eq!(idle(&|row| row.idle -= Duration::from_millis(1)), 'r');
    assert_eq!(idle(&|row| row.in_use = true), 'r');
    assert_eq!(idle(&|row| row.is_reap_delayed = true), 'r');
    let never = |row: &mut RowView| {
        row.timeout_sec = 0;
        row.idle = Duration::MAX;
    };
    assert_eq!(idle(&never), 'r');
}

#[test]
fn reason_describes_the_cause() {
    let reason = |status, host: Option<HostReport>| match one(Some(&view(status)), host.as_ref()) {
        Some(Action::Settle(decision)) if decision.event == Event::Lost => match decision.change {
            RowChange::Error(reason) => reason,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    assert!(reason(S::Starting, None).contains("restarted"));
    assert_eq!(
        reason(S::Running, Some(error("out of memory"))),
        "out of memory"
    );
}

proptest! {
    #[test]
    fn a_sandbox_without_a_row_is_never_destroyed(
        host in prop::sample::select(host_states()),
    ) {
        let action = one(None, host.as_ref());
        prop_assert!(matches!(action, None | Some(Action::Keep)), "{action:?}");
    }

    #[test]
    fn every_step_is_one_that_the_state_machine_allows(
        status in prop::sample::select(S::ALL.to_vec()),
        host in prop::sample::select(host_states()),
    ) {
        let Some(action) = one(Some(&view(status)), host.as_ref()) else { return Ok(()) };
        if let Action::Settle(decision) = &action {
            prop_assert!(transition(status, decision.event).is_ok(), "{status} {action:?}");
        }
    }

    #[test]
    fn rows_and_host_converge(
        status in prop::sample::select(S::ALL.to_vec()),
        host in prop::sample::select(host_states()),
    ) {
        // If the state of the host does not change, the row matches it after at most two steps.
        let (mut status, mut host) = (status, host);
        for _ in 0..3 {
            let Some(action) = one(Some(&view(status)), host.as_ref()) else { break };
            if let Action::Settle(decision) = &action {
                status = transition(status, decision.event).unwrap().0;
            }
            if matches!(letter(Some(&action)), 'E' | 'd' | 'D') {
                host = None;
            }
        }
        let left = one(Some(&view(status)), host.as_ref());
        prop_assert!(matches!(left, None | Some(Action::Refresh | Action::Keep)), "{status} {host:?} {left:?}");
    }
}
