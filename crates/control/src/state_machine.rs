//! Which status may follow which, and what must then be done at the host. No I/O, no clock.
//!
//! ```text
//!            CreateBegun            CreateDone
//!  Pending ───────────────► Starting ──────────► Running
//!     │  │                   │    │                │  │
//!     │  │ CreateFailed      │    │ CreateFailed   │  │
//!     │  │ Lost              │    │ Lost           │  │ Lost
//!     │  └─────────┬─────────┼────┘                │  │
//!     │            │         │     ┌───────────────┼──┘
//!     │            ▼         │     ▼               │
//!     │          Error ◄─────┼─────┘               │
//!     │            │         │                     │
//!     │            │         │                     │
//!     └────────────┴─────────┴──────────┬──────────┘
//!                            DestroyAsked
//!                                       ▼
//!                                   Stopping ──Destroyed──► Stopped
//! ```
//!
//! - `Stopped` is never left; `Error` only by a destroy.
//! - Whatever may have something at the host is left only with [`Effect::DestroyAtHost`]: at a failed create, at a loss (the
//!   agent has freed the machine, and is told to forget it), at every destroy.
//! - A create that ends after its sandbox was destroyed ([`Event::CreateDone`] in `Stopping`, `Stopped` or `Error`)
//!   leaves the status as it is and destroys what came up.
//! - The reconciler speaks the same events: `CreateDone` where the host has it running, `Lost` where it has not.

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
    pub(crate) const ALL: [Self; 6] = [
        Self::CreateBegun,
        Self::CreateDone,
        Self::CreateFailed,
        Self::DestroyAsked,
        Self::Destroyed,
        Self::Lost,
    ];
}

/// What must be done because of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Call `CreateSandbox`.
    CreateAtHost,
    /// Call `DestroySandbox`; "not found" is success.
    DestroyAtHost,
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
    let refused = Err(Refused { state, event });
    let (next, effect) = match (state, event) {
        (S::Pending, Event::CreateBegun) => (S::Starting, Some(Effect::CreateAtHost)),
        (_, Event::CreateBegun) => return refused,

        (S::Pending | S::Starting | S::Running, Event::CreateDone) => (S::Running, None),
        (S::Stopping | S::Stopped | S::Error, Event::CreateDone) => {
            (state, Some(Effect::DestroyAtHost))
        }

        (S::Pending | S::Starting, Event::CreateFailed) => (S::Error, Some(Effect::DestroyAtHost)),
        (S::Running, Event::CreateFailed) => return refused,
        (S::Stopping | S::Stopped | S::Error, Event::CreateFailed) => {
            (state, Some(Effect::DestroyAtHost))
        }

        (S::Stopped, Event::DestroyAsked) => (S::Stopped, None),
        (_, Event::DestroyAsked) => (S::Stopping, Some(Effect::DestroyAtHost)),

        (S::Stopping, Event::Destroyed) => (S::Stopped, None),
        (S::Stopped | S::Error, Event::Destroyed) => (state, None),
        (S::Pending | S::Starting | S::Running, Event::Destroyed) => return refused,

        (S::Pending | S::Starting | S::Running, Event::Lost) => {
            (S::Error, Some(Effect::DestroyAtHost))
        }
        (S::Stopping | S::Stopped | S::Error, Event::Lost) => return refused,
    };
    Ok((next, effect.into_iter().collect()))
}

#[cfg(test)]
mod tests;
