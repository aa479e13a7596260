#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use proptest::prelude::*;

use super::*;

/// Number that stands for a VM.
type Vm = u32;
type S = State<Vm>;
type E = Event<Vm>;

fn error(reason: &str) -> S {
    State::Error {
        reason: reason.to_owned(),
    }
}

fn loss(has_snapshot: bool) -> Loss {
    Loss {
        reason: "lost".to_owned(),
        has_snapshot,
    }
}

/// Returns every state, those with data once per kind of data.
fn all_states() -> [S; 8] {
    [
        S::Starting,
        S::Running(1),
        S::Pausing(1),
        S::Paused,
        S::Resuming(ResumedFrom::Paused),
        S::Resuming(ResumedFrom::Error {
            reason: "before".to_owned(),
        }),
        error("before"),
        S::Stopping,
    ]
}

/// Returns every event; those that start a VM start VM `vm`.
fn all_events(vm: Vm) -> [E; 17] {
    [
        E::CreateDone(vm),
        E::CreateFailed,
        E::FoundRunning(vm),
        E::FoundInterrupted(vm),
        E::FoundPaused,
        E::PauseBegun,
        E::PauseDone,
        E::RolledBack,
        E::ResumeBegun,
        E::ResumeDone(vm),
        E::ResumeFailed,
        E::VmLost(loss(true)),
        E::VmLost(loss(false)),
        E::DestroyBegun,
        E::DestroyFailed("kept".to_owned()),
        E::ActorPanicked(loss(true)),
        E::ActorPanicked(loss(false)),
    ]
}

fn any_event() -> impl Strategy<Value = E> {
    (2..1000_u32).prop_flat_map(|vm| proptest::sample::select(all_events(vm).to_vec()))
}

/// Strategy for sequences of events. Each is applied if it is valid and ignored otherwise.
fn any_events() -> impl Strategy<Value = Vec<E>> {
    prop::collection::vec(any_event(), 0..120)
}

/// Applies a sequence of events; returns the transitions that took place.
fn run(events: Vec<E>) -> Vec<(S, E, S)> {
    let mut state = S::Starting;
    let mut taken = Vec::new();
    for event in events {
        if let Ok(next) = transition(state.clone(), event.clone()) {
            taken.push((std::mem::replace(&mut state, next.clone()), event, next));
        }
    }
    taken
}

fn is_panic(event: &E) -> bool {
    matches!(event, E::ActorPanicked(_))
}

/// Returns the table of the module documentation, as one letter per state: Starting, Running,
/// pAusing, paused, resumiNg from paused, resuMing from error, Error, stopping. `.` is invalid.
fn table() -> [(E, &'static str); 17] {
    let [
        create_done,
        create_failed,
        found_running,
        found_interrupted,
        found_paused,
        pause_begun,
        pause_done,
        rolled_back,
        resume_begun,
        resume_done,
        resume_failed,
        lost_with_snapshot,
        lost,
        destroy_begun,
        destroy_failed,
        panicked_with_snapshot,
        panicked,
    ] = all_events(2);
    [
        //                     S R A P N M E X
        (create_done, "R......."),
        (create_failed, "X......."),
        (found_running, "R......."),
        (found_interrupted, "A......."),
        (found_paused, "P......."),
        (pause_begun, ".A......"),
        (pause_done, "..P....."),
        (rolled_back, ".RR....."),
        (resume_begun, "...N..M."),
        (resume_done, "....RR.."),
        (resume_failed, "....PE.."),
        (lost_with_snapshot, "PPP....."),
        (lost, "EEE....."),
        (destroy_begun, "XXXXXXX."),
        (destroy_failed, ".......E"),
        (panicked_with_snapshot, "PPPPPPPP"),
        (panicked, "EEEEEEEE"),
    ]
}

fn letter(state: &S) -> char {
    match state {
        S::Starting => 'S',
        S::Running(_) => 'R',
        S::Pausing(_) => 'A',
        S::Paused => 'P',
        S::Resuming(ResumedFrom::Paused) => 'N',
        S::Resuming(ResumedFrom::Error { .. }) => 'M',
        S::Error { .. } => 'E',
        S::Stopping => 'X',
    }
}

#[test]
fn every_event_has_its_result_in_every_state() {
    for (event, expected) in table() {
        let results: String = all_states()
            .into_iter()
            .map(|state| transition(state, event.clone()).map_or('.', |next| letter(&next)))
            .collect();
        assert_eq!(results, expected, "{event:?}");
    }
}

#[test]
fn a_rejection_names_state_and_event() {
    let rejected = transition(S::Paused, E::PauseBegun).unwrap_err();
    assert_eq!(
        rejected.to_string(),
        "event PauseBegun is not valid for a sandbox that is `paused`"
    );
}

#[test]
fn a_failed_resume_returns_the_reason_of_the_error_in_which_it_began() {
    let resuming = transition(error("before"), E::ResumeBegun).unwrap();
    assert_eq!(transition(resuming, E::ResumeFailed), Ok(error("before")));
}

#[test]
fn a_reason_reaches_the_error_state() {
    assert_eq!(
        transition(S::Running(1), E::VmLost(loss(false))),
        Ok(error("lost"))
    );
    assert_eq!(
        transition(S::Stopping, E::DestroyFailed("kept".to_owned())),
        Ok(error("kept"))
    );
}

/// Model of the actor: the step that is in progress. It knows nothing of states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Start,
    Pause,
    Resume,
    Destroy,
}

/// Returns the step that an event begins.
fn begun(event: &E) -> Option<Step> {
    match event {
        // An interrupted snapshot is rolled back like a pause.
        E::PauseBegun | E::FoundInterrupted(_) => Some(Step::Pause),
        E::ResumeBegun => Some(Step::Resume),
        E::CreateFailed | E::DestroyBegun => Some(Step::Destroy),
        _ => None,
    }
}

/// True if an event is an outcome of the step in progress.
fn ends(event: &E, step: Step) -> bool {
    match step {
        Step::Start => matches!(
            event,
            E::CreateDone(_)
                | E::CreateFailed
                | E::FoundRunning(_)
                | E::FoundInterrupted(_)
                | E::FoundPaused
                | E::VmLost(_)
                | E::DestroyBegun
        ),
        Step::Pause => matches!(
            event,
            E::PauseDone | E::RolledBack | E::VmLost(_) | E::DestroyBegun
        ),
        Step::Resume => matches!(event, E::ResumeDone(_) | E::ResumeFailed | E::DestroyBegun),
        Step::Destroy => matches!(event, E::DestroyFailed(_)),
    }
}

proptest! {
    #[test]
    fn every_step_has_exactly_one_outcome(events in any_events()) {
        let mut step = Some(Step::Start);
        for (before, event, after) in run(events) {
            let context = format!("{before:?} {event:?} {after:?}");
            if is_panic(&event) {
                step = None;
                continue;
            }
            if let Some(current) = step {
                prop_assert!(ends(&event, current), "{}", context);
            } else {
                // Without a step in progress, an outcome of a pause or a resume is not valid. A
                // snapshot that does not pause may be rolled back, and a running VM may be lost.
                let outcome = matches!(
                    event,
                    E::PauseDone | E::ResumeDone(_) | E::ResumeFailed | E::CreateDone(_)
                        | E::CreateFailed | E::DestroyFailed(_)
                );
                prop_assert!(!outcome, "{}", context);
            }
            step = begun(&event);
            let in_progress = match &after {
                S::Starting => Some(Step::Start),
                S::Pausing(_) => Some(Step::Pause),
                S::Resuming(_) => Some(Step::Resume),
                S::Stopping => Some(Step::Destroy),
                S::Running(_) | S::Paused | S::Error { .. } => None,
            };
            prop_assert_eq!(step, in_progress, "{}", context);
        }
    }

    #[test]
    fn a_sandbox_that_is_destroyed_never_runs_again_unless_that_fails(events in any_events()) {
        for (before, event, after) in run(events) {
            if before == S::Stopping {
                prop_assert!(
                    is_panic(&event) || matches!(event, E::DestroyFailed(_)),
                    "{:?}", event
                );
                prop_assert!(matches!(after, S::Error { .. } | S::Paused), "{:?}", after);
            }
        }
    }

    #[test]
    fn an_error_is_left_by_a_destroy_or_a_resume_only(events in any_events()) {
        for (before, event, after) in run(events) {
            if matches!(before, S::Error { .. }) && !is_panic(&event) {
                let left_on_command = matches!(
                    (&event, &after),
                    (E::DestroyBegun, S::Stopping)
                        | (E::ResumeBegun, S::Resuming(ResumedFrom::Error { .. }))
                );
                prop_assert!(left_on_command, "{:?} {:?}", event, after);
            }
        }
    }

    #[test]
    fn running_and_paused_are_connected_by_pausing_and_resuming_only(events in any_events()) {
        for (before, event, after) in run(events) {
            let is_loss = is_panic(&event) || matches!(event, E::VmLost(_));
            if matches!(before, S::Running(_)) && !is_loss {
                prop_assert!(!matches!(after, S::Paused), "{:?}", event);
            }
            if matches!(before, S::Paused) {
                prop_assert!(!matches!(after, S::Running(_)), "{:?}", event);
            }
        }
    }

    /// Model: the VM that was started last, until an event ends it.
    #[test]
    fn a_sandbox_uses_the_vm_that_was_started_last_until_it_ends(events in any_events()) {
        let mut vm: Option<Vm> = None;
        for (before, event, after) in run(events) {
            match &event {
                E::CreateDone(new) | E::FoundRunning(new) | E::FoundInterrupted(new)
                | E::ResumeDone(new) => {
                    prop_assert_eq!(vm, None, "{:?} has a VM before {:?}", before, event);
                    vm = Some(*new);
                }
                E::PauseBegun | E::RolledBack => {}
                _ => vm = None,
            }
            prop_assert_eq!(after.vm().copied(), vm, "{:?} {:?}", before, event);
        }
    }

    #[test]
    fn a_destroy_is_possible_from_every_state(events in any_events()) {
        let state = run(events).pop().map_or(S::Starting, |(_, _, after)| after);
        if state != S::Stopping {
            prop_assert_eq!(transition(state, E::DestroyBegun), Ok(S::Stopping));
        }
    }

    #[test]
    fn an_outcome_excludes_the_other_outcomes_of_its_step(events in any_events(), vm in 2..1000_u32) {
        let outcomes = [
            vec![E::PauseDone],
            vec![E::ResumeDone(vm), E::ResumeFailed],
            vec![E::CreateDone(vm), E::CreateFailed, E::FoundRunning(vm), E::FoundPaused],
            vec![E::DestroyFailed("kept".to_owned())],
        ];
        for (_, event, after) in run(events) {
            for group in &outcomes {
                let same = |other: &E| other.name() == event.name();
                if group.iter().any(same) {
                    for again in group {
                        prop_assert!(transition(after.clone(), again.clone()).is_err());
                    }
                }
            }
        }
    }
}
