//! State transitions of a sandbox on its host. No I/O, no clock.
//!
//! ```text
//! Starting ─CreateDone, FoundRunning─► Running ───────VmLost───────► Error(reason)
//!  │    │                               │ ▲ ▲                          │ ▲
//!  │    │                    PauseBegun │ │ └─ResumeDone─┐ ResumeBegun │ │ ResumeFailed (1)
//!  │    │                               ▼ │ RolledBack   │             ▼ │
//!  │    └─FoundInterrupted───────────► Pausing            └───────── Resuming
//!  │                                    │                              ▲ │
//!  │                          PauseDone │                  ResumeBegun │ │ ResumeFailed (1)
//!  │                                    ▼                              │ ▼
//!  └─FoundPaused────────────────────► Paused ◄─────────────────────────┴─┘
//!
//! (1) to the state in which the resume began
//!
//! any but Stopping ──DestroyBegun──► Stopping ── everything freed ──► removed from the registry
//! Starting ─────────CreateFailed───►    │
//!                                       └──DestroyFailed──► Error(reason), destroyed again
//! ```
//!
//! | event              | valid in                    | next state                                |
//! |--------------------|-----------------------------|-------------------------------------------|
//! | `CreateDone`       | Starting                    | Running                                   |
//! | `CreateFailed`     | Starting                    | Stopping                                  |
//! | `FoundRunning`     | Starting                    | Running                                   |
//! | `FoundInterrupted` | Starting                    | Pausing                                   |
//! | `FoundPaused`      | Starting                    | Paused                                    |
//! | `PauseBegun`       | Running                     | Pausing                                   |
//! | `PauseDone`        | Pausing                     | Paused                                    |
//! | `RolledBack`       | Pausing, Running            | Running                                   |
//! | `ResumeBegun`      | Paused, Error               | Resuming                                  |
//! | `ResumeDone`       | Resuming                    | Running                                   |
//! | `ResumeFailed`     | Resuming                    | the state in which the resume began       |
//! | `VmLost`           | Starting, Running, Pausing  | Paused with a snapshot, otherwise Error   |
//! | `DestroyBegun`     | any but Stopping            | Stopping                                  |
//! | `DestroyFailed`    | Stopping                    | Error                                     |
//! | `ActorPanicked`    | any                         | Paused with a snapshot, otherwise Error   |
//!
//! - A sandbox with a snapshot becomes `Paused` when its VM is lost, otherwise `Error`.
//! - `Starting` is also the state of a sandbox that an agent adopts, until its VM is examined.
//! - A step that began has exactly one outcome: after `PauseBegun` one of `PauseDone`,
//!   `RolledBack`, `VmLost` and `DestroyBegun`, after `ResumeBegun` one of `ResumeDone`,
//!   `ResumeFailed` and `DestroyBegun`. A destroy aborts a pause and a resume. The actor receives
//!   no other command meanwhile.
//! - `Running` and `Paused` are connected only by `Pausing` and `Resuming`, except after a loss.
//! - `Stopping` has two ends: the sandbox is removed, or a resource could not be freed. It is never
//!   left for `Running`.
//! - `Error` is left by a destroy, or by a resume, which succeeds only if the sandbox has a
//!   snapshot.
//! - A VM is the same from the event that starts it to the event that ends it. `RolledBack` returns
//!   to the VM that was being paused.
//! - `ActorPanicked` is the only event that is valid everywhere: the panic may have occurred at any
//!   point, and the sandbox must remain destroyable.

use std::sync::Arc;

use super::Running;

/// Lifecycle state of a sandbox. `V` is the data of a VM that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State<V = Arc<Running>> {
    /// The sandbox is being created, or its guest boots.
    Starting,
    /// The sandbox can be used.
    Running(V),
    /// A snapshot is being taken, after which the VM is ended. If that fails, the sandbox keeps
    /// running.
    Pausing(V),
    /// The sandbox consists of files only.
    Paused,
    /// The sandbox is being resumed. If that fails, the state in which the resume began returns.
    Resuming(ResumedFrom),
    /// The VM is gone. `reason` is for the user.
    Error { reason: String },
    /// The sandbox is being destroyed.
    Stopping,
}

/// State in which a resume began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ResumedFrom {
    /// The sandbox was paused.
    Paused,
    /// The sandbox was in error. `reason` is for the user.
    Error { reason: String },
}

impl<V> State<V> {
    /// Returns the VM that calls may use or may still be using.
    pub(super) fn vm(&self) -> Option<&V> {
        match self {
            Self::Running(vm) | Self::Pausing(vm) => Some(vm),
            _ => None,
        }
    }

    /// Returns the name of the state, for messages.
    const fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running(_) => "running",
            Self::Pausing(_) => "pausing",
            Self::Paused => "paused",
            Self::Resuming(_) => "resuming",
            Self::Error { .. } => "error",
            Self::Stopping => "stopping",
        }
    }
}

/// Loss of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loss {
    /// Reason, for the user.
    pub(super) reason: String,
    /// True if the sandbox has a snapshot that it can be resumed from.
    pub(super) has_snapshot: bool,
}

/// Event of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event<V = Arc<Running>> {
    /// The guest of a new sandbox answers.
    CreateDone(V),
    /// A step of the create failed, or the create was aborted. Its resources are about to be freed.
    CreateFailed,
    /// The agent found the VM running when it started.
    FoundRunning(V),
    /// The agent found the VM in the middle of a snapshot when it started.
    FoundInterrupted(V),
    /// The agent found the sandbox paused when it started.
    FoundPaused,
    /// A pause is about to drain the calls in progress.
    PauseBegun,
    /// The snapshot of a pause is published and recorded.
    PauseDone,
    /// A step of a pause or a snapshot failed, and the VM continues.
    RolledBack,
    /// A resume is about to start.
    ResumeBegun,
    /// The guest of a resumed sandbox answers.
    ResumeDone(V),
    /// A step of the resume failed.
    ResumeFailed,
    /// The VM is gone without a request.
    VmLost(Loss),
    /// The resources of the sandbox are about to be freed at a client's request.
    DestroyBegun,
    /// A resource of the sandbox could not be freed. Contains the reason, for the user.
    DestroyFailed(String),
    /// The sandbox's actor panicked. The VM is given up.
    ActorPanicked(Loss),
}

impl<V> Event<V> {
    /// Returns the name of the event, for messages.
    const fn name(&self) -> &'static str {
        match self {
            Self::CreateDone(_) => "CreateDone",
            Self::CreateFailed => "CreateFailed",
            Self::FoundRunning(_) => "FoundRunning",
            Self::FoundInterrupted(_) => "FoundInterrupted",
            Self::FoundPaused => "FoundPaused",
            Self::PauseBegun => "PauseBegun",
            Self::PauseDone => "PauseDone",
            Self::RolledBack => "RolledBack",
            Self::ResumeBegun => "ResumeBegun",
            Self::ResumeDone(_) => "ResumeDone",
            Self::ResumeFailed => "ResumeFailed",
            Self::VmLost(_) => "VmLost",
            Self::DestroyBegun => "DestroyBegun",
            Self::DestroyFailed(_) => "DestroyFailed",
            Self::ActorPanicked(_) => "ActorPanicked",
        }
    }
}

/// The event is not valid in the state. Nothing changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("event {event} is not valid for a sandbox that is `{state}`")]
pub(super) struct InvalidTransition {
    /// Current state.
    pub(super) state: &'static str,
    /// Rejected event.
    pub(super) event: &'static str,
}

/// Returns the state after an event.
///
/// # Errors
/// If the event is not valid in the state.
pub(super) fn transition<V>(
    state: State<V>,
    event: Event<V>,
) -> Result<State<V>, InvalidTransition> {
    use State as S;
    Ok(match (event, state) {
        (Event::CreateDone(vm) | Event::FoundRunning(vm), S::Starting) => S::Running(vm),
        (Event::CreateFailed, S::Starting) => S::Stopping,
        (Event::FoundInterrupted(vm), S::Starting) => S::Pausing(vm),
        (Event::FoundPaused, S::Starting) => S::Paused,

        (Event::PauseBegun, S::Running(vm)) => S::Pausing(vm),
        (Event::PauseDone, S::Pausing(_)) => S::Paused,
        (Event::RolledBack, S::Pausing(vm) | S::Running(vm)) => S::Running(vm),

        (Event::ResumeBegun, S::Paused) => S::Resuming(ResumedFrom::Paused),
        (Event::ResumeBegun, S::Error { reason }) => S::Resuming(ResumedFrom::Error { reason }),
        (Event::ResumeDone(vm), S::Resuming(_)) => S::Running(vm),
        (Event::ResumeFailed, S::Resuming(ResumedFrom::Paused)) => S::Paused,
        (Event::ResumeFailed, S::Resuming(ResumedFrom::Error { reason })) => S::Error { reason },

        (Event::VmLost(loss), S::Starting | S::Running(_) | S::Pausing(_))
        | (Event::ActorPanicked(loss), _) => after_loss(loss),

        (
            Event::DestroyBegun,
            S::Starting
            | S::Running(_)
            | S::Pausing(_)
            | S::Paused
            | S::Resuming(_)
            | S::Error { .. },
        ) => S::Stopping,
        (Event::DestroyFailed(reason), S::Stopping) => S::Error { reason },

        (event, state) => {
            return Err(InvalidTransition {
                state: state.name(),
                event: event.name(),
            });
        }
    })
}

fn after_loss<V>(loss: Loss) -> State<V> {
    if loss.has_snapshot {
        State::Paused
    } else {
        State::Error {
            reason: loss.reason,
        }
    }
}

#[cfg(test)]
mod tests;
