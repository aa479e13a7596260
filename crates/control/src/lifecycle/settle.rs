//! Decision about the status of a row, from the host's report on the sandbox. No I/O, no clock.
//!
//! [`settle`] is the only place that decides on the status of a row from the host's report: for a
//! pass of the reconciler, after a call that failed, and for a sandbox that is adopted.
//! [`Lifecycle::settle`](super::Lifecycle::settle) is the only place that applies a [`Decision`].
//!
//! The decisions for a pass ([`Cause::Pass`]) are the steps in the table of [`crate::reconciler`]
//! that change a status. After a failed call, the status of the row names the call. The decision is
//! the same as for a pass, with these differences:
//!
//! | row, call \ host | nothing | starting | running | pausing, resuming | paused | error | stopping |
//! |---|---|---|---|---|---|---|---|
//! | `pending`, `starting`: create | fail (1) | fail (1) | fail (1) | fail (1) | fail (1) | fail (1) | fail (1) |
//! | `pausing`: pause | → `error` | – | → `running` (2) | – | → `paused` | fail | – |
//! | `resuming`: resume | → `paused` (2, 3) | – | → `running` | – | → `paused` (2) | fail | – |
//!
//! - "fail", "–": as in the table of [`crate::reconciler`]. After "–", the operation is still in
//!   progress, and the reconciler sees its result.
//! - (1): A failed create is undone in any case: the client receives the failure, and may repeat
//!   the request. No report of the host is therefore needed.
//! - (2): The row's warning names the failure of the call, not an interruption.
//! - (3): A paused sandbox consists of files only, and these may become available again. The
//!   reconciler, in contrast, treats the sandbox as lost after several passes, because no call is
//!   in progress.

mod write;

use wrenn_db::Sandbox;
use wrenn_model::SandboxStatus;

use super::report::{HostReport, HostState};
use crate::state_machine::Event;

/// Reason for which a row is compared with the host.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cause<'a> {
    /// Pass of the reconciler, or an adoption: no call of this process is the cause.
    Pass,
    /// The call that the row's status names failed, or its reply was lost.
    CallFailed {
        /// Description of the failure, for the row.
        error: &'a str,
    },
}

/// Change of a row's status, and the required actions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) event: Event,
    pub(crate) change: RowChange,
    pub(crate) destroy: Destroy,
}

/// Change of the row's fields other than the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RowChange {
    Nothing,
    /// The host answered the create: the sandbox runs, and its idle time and lifetime start.
    Created(HostReport),
    /// The sandbox was found running for the first time, and its lifetime starts.
    FoundRunning(HostReport),
    /// The sandbox runs again, and its idle time and lifetime restart.
    Resumed(HostReport),
    /// The sandbox was not paused and keeps running.
    PauseFailed {
        report: HostReport,
        warning: String,
    },
    /// Like `PauseFailed`, but the cause is not known. An existing warning stays.
    PauseInterrupted(HostReport),
    /// Replaces the warning.
    Warning(String),
    /// Sets the reason of the status `error`.
    Error(String),
}

/// Destroy of the sandbox at the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destroy {
    /// The host has nothing to destroy.
    Nothing,
    /// Before the event. If the destroy fails, the event does not happen.
    First,
    /// After the event, if the state machine requires it.
    IfRequired,
}

impl Decision {
    /// Returns the decision after a create that the host answered.
    pub(super) fn created(report: HostReport) -> Self {
        Self::of(Event::CreateDone, RowChange::Created(report))
    }

    /// Returns the decision after a create that failed, regardless of the host's report.
    pub(super) fn create_failed(reason: String) -> Self {
        Self::of(Event::CreateFailed, RowChange::Error(reason))
    }

    /// Returns the decision after a pause that the host answered, possibly with a warning.
    pub(super) fn paused(warning: String) -> Self {
        Self::of(Event::PauseDone, RowChange::Warning(warning))
    }

    /// Returns the decision after a pause that was not requested from the host.
    pub(super) fn pause_withdrawn() -> Self {
        Self::of(Event::PauseFailed, RowChange::Nothing)
    }

    /// Returns the decision for a sandbox that runs again.
    pub(super) fn resumed(report: HostReport) -> Self {
        Self::of(Event::ResumeDone, RowChange::Resumed(report))
    }

    fn lost(reason: String) -> Self {
        Self::of(Event::Lost, RowChange::Error(reason))
    }

    fn destroyed(destroy: Destroy) -> Self {
        Self {
            destroy,
            ..Self::of(Event::Destroyed, RowChange::Nothing)
        }
    }

    fn of(event: Event, change: RowChange) -> Self {
        Self {
            event,
            change,
            destroy: Destroy::IfRequired,
        }
    }
}

impl RowChange {
    /// Writes the change to the row.
    pub(super) fn write_to(&self, row: &mut Sandbox, now_ms: i64) {
        match self {
            Self::Nothing => {}
            Self::Created(report) => {
                report.fill(row, now_ms);
                row.last_active_at = row.last_active_at.max(now_ms);
                row.renew_lifetime(now_ms);
            }
            Self::FoundRunning(report) => {
                report.fill(row, now_ms);
                row.renew_lifetime(now_ms);
            }
            Self::Resumed(report) => report.fill_resumed(row, now_ms),
            Self::PauseFailed { report, warning } => {
                report.fill(row, now_ms);
                row.warning.clone_from(warning);
            }
            Self::PauseInterrupted(report) => {
                report.fill(row, now_ms);
                if row.warning.is_empty() {
                    "the pause was interrupted; the sandbox keeps running"
                        .clone_into(&mut row.warning);
                }
            }
            Self::Warning(warning) => row.warning.clone_from(warning),
            Self::Error(reason) => row.error.clone_from(reason),
        }
    }
}

/// Returns the decision for a row with `status`, whose sandbox the host reports as `host`, or does
/// not report. `None` if the status is correct, or if the host is still changing the sandbox.
pub(crate) fn settle(
    status: SandboxStatus,
    host: Option<&HostReport>,
    cause: Cause<'_>,
) -> Option<Decision> {
    use SandboxStatus as S;
    match (status, cause) {
        (S::Stopped | S::Error, _) => return None,
        (S::Stopping, _) => return stopping(host),
        (S::Pending | S::Starting, Cause::CallFailed { error }) => {
            return Some(Decision::create_failed(error.to_owned()));
        }
        _ => {}
    }
    let Some(report) = host else {
        return absent(status, cause);
    };
    match (&report.state, status) {
        (HostState::Starting | HostState::Changing | HostState::Stopping, _)
        | (HostState::Running, S::Running)
        | (HostState::Paused, S::Paused) => None,
        (HostState::Running, _) => Some(found_running(status, report, cause)),
        (HostState::Paused, _) => Some(found_paused(status, report, cause)),
        (HostState::Error { reason }, _) => Some(Decision::lost(reason.clone())),
    }
}

/// Returns the decision for a row that is being destroyed.
fn stopping(host: Option<&HostReport>) -> Option<Decision> {
    match host.map(|report| &report.state) {
        None => Some(Decision::destroyed(Destroy::Nothing)),
        Some(HostState::Stopping) => None,
        Some(_) => Some(Decision::destroyed(Destroy::First)),
    }
}

/// Returns the decision for a sandbox that the host does not have.
fn absent(status: SandboxStatus, cause: Cause<'_>) -> Option<Decision> {
    use SandboxStatus as S;
    let decision = match (status, cause) {
        (S::Paused, _) => return None,
        (S::Resuming, Cause::CallFailed { .. }) => {
            let warning = "the host does not have the sandbox's files".to_owned();
            Decision::of(Event::ResumeFailed, RowChange::Warning(warning))
        }
        (S::Pausing, Cause::CallFailed { error }) => {
            Decision::lost(format!("the host lost the sandbox: {error}"))
        }
        (status, _) => Decision::lost(absence_reason(status).to_owned()),
    };
    Some(Decision {
        destroy: Destroy::Nothing,
        ..decision
    })
}

/// Returns the reason for which a sandbox that the host does not have is in `error`.
fn absence_reason(status: SandboxStatus) -> &'static str {
    use SandboxStatus as S;
    match status {
        S::Pending | S::Starting => "the control plane was restarted during the create",
        S::Pausing => "the host lost the sandbox during a pause",
        S::Resuming => "the host lost the sandbox during a resume",
        S::Running | S::Paused | S::Stopping | S::Stopped | S::Error => {
            "the host no longer has the sandbox"
        }
    }
}

/// Returns the decision for a sandbox that runs, although its row says otherwise.
fn found_running(status: SandboxStatus, report: &HostReport, cause: Cause<'_>) -> Decision {
    let report = report.clone();
    match (status, cause) {
        (SandboxStatus::Pausing, Cause::CallFailed { error }) => {
            let warning = format!("the pause failed: {error}");
            Decision::of(
                Event::PauseFailed,
                RowChange::PauseFailed { report, warning },
            )
        }
        (SandboxStatus::Pausing, Cause::Pass) => {
            Decision::of(Event::PauseFailed, RowChange::PauseInterrupted(report))
        }
        (SandboxStatus::Paused | SandboxStatus::Resuming, _) => Decision::resumed(report),
        _ => Decision::of(Event::CreateDone, RowChange::FoundRunning(report)),
    }
}

/// Returns the decision for a sandbox that is paused, although its row says otherwise. The host
/// warns if the VM was lost, and the sandbox is paused at an earlier snapshot.
fn found_paused(status: SandboxStatus, report: &HostReport, cause: Cause<'_>) -> Decision {
    let (event, warning) = match (status, cause) {
        (SandboxStatus::Resuming, Cause::CallFailed { error }) => {
            (Event::ResumeFailed, format!("the resume failed: {error}"))
        }
        (SandboxStatus::Resuming, Cause::Pass) if report.warning.is_empty() => (
            Event::ResumeFailed,
            "the resume was interrupted; the sandbox stays paused".to_owned(),
        ),
        (SandboxStatus::Resuming, Cause::Pass) => (Event::ResumeFailed, report.warning.clone()),
        _ => (Event::PauseDone, report.warning.clone()),
    };
    Decision::of(event, RowChange::Warning(warning))
}

#[cfg(test)]
mod tests;
