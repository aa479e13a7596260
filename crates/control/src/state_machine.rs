//! Status transitions of a sandbox, and the action that each requires at the host. No I/O, no
//! clock.
//!
//! ```text
//!         CreateBegun          CreateDone         PauseBegun          PauseDone
//! Pending ──────────► Starting ─────────► Running ◄─────────► Pausing ────────► Paused
//!    │                    │                 ▲  │  PauseFailed    │               ▲ │
//!    │ CreateFailed       │                 │  │                 │  ResumeFailed │ │ ResumeBegun
//!    └────────┬───────────┘      ResumeDone │  │                 │               │ ▼
//!             │                             └──┼─────────────────┼──────────── Resuming
//!             ▼               Lost             │                 │                 │
//!           Error ◄────────────────────────────┴─────────────────┴─────────────────┘
//!
//! any but Stopped ──DestroyAsked──► Stopping ──Destroyed──► Stopped
//! ```
//!
//! - `Stopped` is final. `Error` is left only by a destroy.
//! - A status in which the host may have resources is left for one without only with
//!   [`Effect::Destroy`]: after a failed create, after a loss (the agent has freed the VM and must
//!   forget it), and at every destroy.
//! - An operation that ends after its sandbox was destroyed (an event of a create, pause or resume
//!   in `Stopping`, `Stopped` or `Error`) keeps the status and destroys any resources.
//! - A failed pause leaves the sandbox running, a failed resume leaves it paused. An attempt loses
//!   nothing.
//! - `lifecycle::settle` uses the same events for observations at the host. They are therefore also
//!   valid without the corresponding call: a sandbox found running is `ResumeDone`, even in
//!   `Paused`; one found paused is `PauseDone`, even in `Running`; one that is not found is `Lost`.

use wrenn_model::SandboxStatus;

/// Event of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The create task is about to call the host.
    CreateBegun,
    /// The host reports that the sandbox runs.
    CreateDone,
    /// The host rejected the create, failed, or did not answer in time.
    CreateFailed,
    /// The pause task is about to call the host.
    PauseBegun,
    /// The host reports that the sandbox is paused.
    PauseDone,
    /// The sandbox was not paused and keeps running.
    PauseFailed,
    /// The resume task is about to call the host.
    ResumeBegun,
    /// The host reports that the sandbox runs again.
    ResumeDone,
    /// The sandbox was not resumed and stays paused.
    ResumeFailed,
    /// A user, the reaper or a client's disconnect ends the sandbox.
    DestroyAsked,
    /// The host has no resources of the sandbox any more, and no create is in progress.
    Destroyed,
    /// The VM is gone without a request.
    Lost,
}

impl Event {
    /// All events.
    #[cfg(test)]
    pub const ALL: [Self; 12] = [
        Self::CreateBegun,
        Self::CreateDone,
        Self::CreateFailed,
        Self::PauseBegun,
        Self::PauseDone,
        Self::PauseFailed,
        Self::ResumeBegun,
        Self::ResumeDone,
        Self::ResumeFailed,
        Self::DestroyAsked,
        Self::Destroyed,
        Self::Lost,
    ];
}

/// Action required at the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Call `CreateSandbox`.
    Create,
    /// Call `PauseSandbox`.
    Pause,
    /// Call `ResumeSandbox`.
    Resume,
    /// Call `DestroySandbox`. "Not found" counts as success.
    Destroy,
}

/// The event is not valid in the status. Nothing changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("event {event:?} is not valid for a sandbox that is `{state}`")]
pub struct Rejected {
    /// Current status.
    pub state: SandboxStatus,
    /// Rejected event.
    pub event: Event,
}

/// Returns the status after an event, and the required actions.
///
/// # Errors
/// If the event is not valid in the status.
pub fn transition(
    state: SandboxStatus,
    event: Event,
) -> Result<(SandboxStatus, Vec<Effect>), Rejected> {
    use SandboxStatus as S;
    let ended = matches!(state, S::Stopping | S::Stopped | S::Error);
    let (next, effect) = match (event, state) {
        (Event::CreateBegun, S::Pending) => (S::Starting, Some(Effect::Create)),
        (Event::PauseBegun, S::Running) => (S::Pausing, Some(Effect::Pause)),
        (Event::ResumeBegun, S::Paused) => (S::Resuming, Some(Effect::Resume)),

        (
            Event::CreateDone
            | Event::CreateFailed
            | Event::PauseDone
            | Event::PauseFailed
            | Event::ResumeDone
            | Event::ResumeFailed,
            _,
        ) if ended => (state, Some(Effect::Destroy)),

        (Event::CreateDone, S::Pending | S::Starting) => (S::Running, None),
        // The reconciler found the sandbox running first, and it has changed since.
        (Event::CreateDone, _) => (state, None),
        (Event::CreateFailed, S::Pending | S::Starting) => (S::Error, Some(Effect::Destroy)),

        (Event::PauseDone, S::Pausing | S::Running | S::Paused | S::Starting | S::Pending) => {
            (S::Paused, None)
        }
        (Event::PauseFailed, S::Pausing | S::Running) => (S::Running, None),
        (Event::ResumeDone, S::Resuming | S::Running | S::Paused) => (S::Running, None),
        (Event::ResumeFailed, S::Resuming | S::Paused) => (S::Paused, None),

        (Event::DestroyAsked, S::Stopped) => (S::Stopped, None),
        (Event::DestroyAsked, _) => (S::Stopping, Some(Effect::Destroy)),
        (Event::Destroyed, S::Stopping | S::Stopped) => (S::Stopped, None),
        (Event::Destroyed, S::Error) => (S::Error, None),

        (Event::Lost, _) if !ended => (S::Error, Some(Effect::Destroy)),

        (
            Event::CreateBegun
            | Event::CreateFailed
            | Event::PauseBegun
            | Event::PauseDone
            | Event::PauseFailed
            | Event::ResumeBegun
            | Event::ResumeDone
            | Event::ResumeFailed
            | Event::Destroyed
            | Event::Lost,
            _,
        ) => return Err(Rejected { state, event }),
    };
    Ok((next, effect.into_iter().collect()))
}

#[cfg(test)]
mod tests;
