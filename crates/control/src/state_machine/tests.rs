#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use proptest::prelude::*;
use wrenn_model::SandboxStatus as S;

use super::*;

/// True if the host may have resources of a sandbox in this status.
fn may_be_at_host(state: S) -> bool {
    !matches!(state, S::Stopped | S::Error)
}

fn is_at_rest(state: S) -> bool {
    matches!(state, S::Running | S::Paused | S::Stopped | S::Error)
}

fn any_event() -> impl Strategy<Value = Event> {
    proptest::sample::select(Event::ALL.to_vec())
}

#[test]
fn destroy_is_legal_from_every_status() {
    for state in S::ALL {
        let (next, effects) = transition(state, Event::DestroyAsked).unwrap();
        if state == S::Stopped {
            assert_eq!((next, effects), (S::Stopped, vec![]));
            continue;
        }
        assert_eq!((next, effects), (S::Stopping, vec![Effect::Destroy]));
        assert_eq!(
            transition(next, Event::Destroyed),
            Ok((S::Stopped, vec![])),
            "{state}"
        );
    }
}

#[test]
fn call_begins_from_one_status_only() {
    for (event, from, to, effect) in [
        (Event::CreateBegun, S::Pending, S::Starting, Effect::Create),
        (Event::PauseBegun, S::Running, S::Pausing, Effect::Pause),
        (Event::ResumeBegun, S::Paused, S::Resuming, Effect::Resume),
    ] {
        for state in S::ALL {
            let got = transition(state, event);
            if state == from {
                assert_eq!(got, Ok((to, vec![effect])));
            } else {
                assert_eq!(got, Err(Rejected { state, event }));
            }
        }
    }
}

#[test]
fn failed_pause_keeps_running_and_a_failed_resume_stays_paused() {
    assert_eq!(
        transition(S::Pausing, Event::PauseFailed),
        Ok((S::Running, vec![]))
    );
    assert_eq!(
        transition(S::Pausing, Event::PauseDone),
        Ok((S::Paused, vec![]))
    );
    assert_eq!(
        transition(S::Resuming, Event::ResumeFailed),
        Ok((S::Paused, vec![]))
    );
    assert_eq!(
        transition(S::Resuming, Event::ResumeDone),
        Ok((S::Running, vec![]))
    );
}

#[test]
fn live_sandbox_can_be_lost_and_is_then_freed_at_the_host() {
    for state in S::ALL {
        let got = transition(state, Event::Lost);
        if matches!(state, S::Stopping | S::Stopped | S::Error) {
            assert!(got.is_err(), "{state}");
        } else {
            assert_eq!(got, Ok((S::Error, vec![Effect::Destroy])), "{state}");
        }
    }
}

#[test]
fn every_transient_status_is_settled_by_a_report_of_the_host() {
    for state in S::ALL.into_iter().filter(|s| !is_at_rest(*s)) {
        let ends = Event::ALL.into_iter().filter_map(|event| {
            let (next, _) = transition(state, event).ok()?;
            (next != state && is_at_rest(next)).then_some(next)
        });
        assert!(ends.count() >= 1, "{state}");
    }
    // Found paused, found running, not found.
    for state in [S::Pausing, S::Resuming] {
        let after = |event| transition(state, event).map(|(next, _)| next);
        assert_eq!(
            after(if state == S::Pausing {
                Event::PauseDone
            } else {
                Event::ResumeFailed
            }),
            Ok(S::Paused)
        );
        assert_eq!(
            after(if state == S::Pausing {
                Event::PauseFailed
            } else {
                Event::ResumeDone
            }),
            Ok(S::Running)
        );
        assert_eq!(after(Event::Lost), Ok(S::Error));
    }
}

proptest! {
    #[test]
    fn no_event_leaves_resources_at_the_host(events in prop::collection::vec(any_event(), 0..60)) {
        let mut state = S::Pending;
        for event in events {
            let Ok((next, effects)) = transition(state, event) else { continue };
            // A transition from a status with possible resources to one without always frees them.
            if may_be_at_host(state) && !may_be_at_host(next) && state != S::Stopping {
                prop_assert!(effects.contains(&Effect::Destroy), "{state} {event:?}");
            }
            // No transition starts and ends an operation at once.
            prop_assert!(effects.len() <= 1);
            // A final status is never left.
            if state == S::Stopped {
                prop_assert_eq!(next, S::Stopped);
            }
            if state == S::Error {
                prop_assert!(matches!(next, S::Error | S::Stopping));
            }
            if state == S::Stopping {
                prop_assert!(matches!(next, S::Stopping | S::Stopped));
            }
            state = next;
        }
        // A destroy ends the sandbox from any status reached.
        let (next, _) = transition(state, Event::DestroyAsked).unwrap();
        if next != S::Stopped {
            prop_assert_eq!(transition(next, Event::Destroyed).unwrap().0, S::Stopped);
        }
    }

    #[test]
    fn late_result_is_destroyed_and_changes_nothing(event in any_event()) {
        for state in [S::Stopping, S::Stopped, S::Error] {
            let told = matches!(
                event,
                Event::CreateDone | Event::CreateFailed | Event::PauseDone | Event::PauseFailed
                    | Event::ResumeDone | Event::ResumeFailed
            );
            if told {
                prop_assert_eq!(transition(state, event), Ok((state, vec![Effect::Destroy])));
            }
        }
    }
}
