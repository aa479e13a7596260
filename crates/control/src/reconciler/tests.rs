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
        last_active_ms: 1_000_000,
        timeout_sec: 60,
        not_reaped_before_ms: 0,
        steady_passes: MIN_STEADY_PASSES,
        on_other_host: false,
    }
}

fn running() -> HostReport {
    HostReport {
        last_active_ms: 1_000_000,
        ..HostReport::in_state(HostState::Running)
    }
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
        (Some(S::Error), "-DDDKD-"),
        (None, "-KKKKK-"),
    ];
    for (status, wanted) in table {
        let row = status.map(view);
        let got: String = host_states()
            .iter()
            .map(|host| letter(one(row.as_ref(), host.as_ref(), 1_000_000).as_ref()))
            .collect();
        assert_eq!(got, wanted, "{status:?}");
    }
}

#[test]
fn create_in_progress_is_left_alone() {
    for status in S::ALL {
        for host in host_states() {
            let mut row = view(status);
            row.creating = true;
            assert_eq!(one(Some(&row), host.as_ref(), i64::MAX), None);
        }
    }
}

#[test]
fn a_row_of_another_host_is_left_alone() {
    for status in S::ALL {
        for host in host_states() {
            let mut row = view(status);
            row.on_other_host = true;
            assert_eq!(one(Some(&row), host.as_ref(), i64::MAX), None);
        }
    }
}

#[test]
fn sandbox_is_lost_only_after_several_passes() {
    for status in S::ALL {
        for passes in 0..MIN_STEADY_PASSES {
            let mut row = view(status);
            row.steady_passes = passes;
            let action = one(Some(&row), None, 1_000_000);
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
            assert_eq!(one(Some(&row), Some(&host), 1_000_000), None);
        }
    }
}

#[test]
fn only_idle_sandboxes_are_ended() {
    let host = running();
    let idle = |change: &dyn Fn(&mut RowView), now_ms| {
        let mut row = view(S::Running);
        change(&mut row);
        letter(one(Some(&row), Some(&host), now_ms).as_ref())
    };
    let end = 1_000_000 + 60_000;
    assert_eq!(idle(&|_| (), end - 1), 'r');
    assert_eq!(idle(&|_| (), end), '!');
    assert_eq!(idle(&|row| row.in_use = true, end), 'r');
    assert_eq!(idle(&|row| row.timeout_sec = 0, i64::MAX), 'r');
    assert_eq!(idle(&|row| row.last_active_ms += 1, end), 'r');
    assert_eq!(idle(&|row| row.not_reaped_before_ms = end + 1, end), 'r');
    assert_eq!(idle(&|row| row.not_reaped_before_ms = end, end), '!');
    // The clock was set back.
    assert_eq!(idle(&|_| (), 0), 'r');
    // Activity that only the host has recorded.
    let host = HostReport {
        last_active_ms: end,
        ..running()
    };
    assert_eq!(
        letter(one(Some(&view(S::Running)), Some(&host), end).as_ref()),
        'r'
    );
}

#[test]
fn reason_describes_the_cause() {
    let reason =
        |status, host: Option<HostReport>| match one(Some(&view(status)), host.as_ref(), 1_000_000)
        {
            Some(Action::Settle(Decision {
                event: Event::Lost,
                change: RowChange::Error(reason),
                ..
            })) => reason,
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
        now_ms in any::<i64>(),
    ) {
        let action = one(None, host.as_ref(), now_ms);
        prop_assert!(matches!(action, None | Some(Action::Keep)), "{action:?}");
    }

    #[test]
    fn every_step_is_one_that_the_state_machine_allows(
        status in prop::sample::select(S::ALL.to_vec()),
        host in prop::sample::select(host_states()),
        now_ms in any::<i64>(),
    ) {
        let Some(action) = one(Some(&view(status)), host.as_ref(), now_ms) else { return Ok(()) };
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
            let Some(action) = one(Some(&view(status)), host.as_ref(), 1_000_000) else { break };
            if let Action::Settle(decision) = &action {
                status = transition(status, decision.event).unwrap().0;
            }
            if matches!(letter(Some(&action)), 'E' | 'd' | 'D') {
                host = None;
            }
        }
        let left = one(Some(&view(status)), host.as_ref(), 1_000_000);
        prop_assert!(matches!(left, None | Some(Action::Refresh | Action::Keep)), "{status} {host:?} {left:?}");
    }
}
