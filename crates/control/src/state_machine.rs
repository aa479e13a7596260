//! Which status may follow which, and what must then be done at the host. No I/O, no clock.
//!
//! ```text
//!            CreateBegun            CreateDone             PauseBegun              PauseDone
//!  Pending ───────────────► Starting ─────────► Running ◄─────────────► Pausing ─────────────► Paused
//!     │                        │                   ▲  │   PauseFailed      │                     ▲ │
//!     │ CreateFailed           │                   │  │                    │        ResumeFailed │ │ ResumeBegun
//!     └───────────┬────────────┘        ResumeDone │  │                    │                     │ ▼
//!                 │                                └──┼────────────────────┼────────────────── Resuming
//!                 ▼                 Lost              │                    │                      │
//!               Error ◄───────────────────────────────┴────────────────────┴──────────────────────┘
//!
//!  any but Stopped ──DestroyAsked──► Stopping ──Destroyed──► Stopped
//! ```
//!
//! - `Stopped` is never left; `Error` only by a destroy.
//! - Whatever may have something at the host is left only with [`Effect::Destroy`]: at a failed create, at a loss (the
//!   agent has freed the machine, and is told to forget it), at every destroy.
//! - What ends after its sandbox was destroyed (an event of a create, pause or resume in `Stopping`, `Stopped` or `Error`)
//!   leaves the status as it is and destroys what is there.
//! - A failed pause leaves it running, a failed resume leaves it paused: nothing is lost by trying.
//! - The reconciler speaks the same events for what it finds at the host, so they are also legal where the call that they
//!   tell of was not: what is found running is `ResumeDone` even of a `Paused` one, what is found paused is `PauseDone`
//!   even of a `Running` one, what is not found is `Lost`.

use wrenn_proto::rest::SandboxStatus;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The create task is about to call the host.
    CreateBegun,
    /// The host says that it runs.
    CreateDone,
    /// The host refused, failed or did not answer in time.
    CreateFailed,
    /// The pause task is about to call the host.
    PauseBegun,
    /// The host says that it is paused.
    PauseDone,
    /// It was not paused, and runs on.
    PauseFailed,
    /// The resume task is about to call the host.
    ResumeBegun,
    /// The host says that it runs again.
    ResumeDone,
    /// It was not resumed, and is paused as before.
    ResumeFailed,
    /// A user, the reaper or a client's disappearance ends it.
    DestroyAsked,
    /// The host has nothing of it any more, and no create is under way.
    Destroyed,
    /// Its machine is gone although nobody asked for that.
    Lost,
}

impl Event {
    /// All events.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 12] = [
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

/// What must be done at the host because of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Call `CreateSandbox`.
    Create,
    /// Call `PauseSandbox`.
    Pause,
    /// Call `ResumeSandbox`.
    Resume,
    /// Call `DestroySandbox`; "not found" is success.
    Destroy,
}

/// The event does not belong to the status; nothing changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} does not belong to a sandbox that is `{state}`")]
pub(crate) struct Refused {
    /// Status that it is in.
    pub(crate) state: SandboxStatus,
    /// What was said to have happened.
    pub(crate) event: Event,
}

/// The status after an event, and what is to be done.
///
/// # Errors
/// If the event does not belong to the status.
pub(crate) fn transition(
    state: SandboxStatus,
    event: Event,
) -> Result<(SandboxStatus, Vec<Effect>), Refused> {
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
        // The reconciler found it running first, and it lives on since.
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
        ) => return Err(Refused { state, event }),
    };
    Ok((next, effect.into_iter().collect()))
}

#[cfg(test)]
mod tests;
