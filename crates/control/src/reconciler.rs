//! Reconciliation of the database and the host.
//!
//! Owns one task. At every [`ControlConfig::poll_interval`](crate::ControlConfig) it reads the rows
//! that are not in a final status, *then* asks the host for its sandboxes, and takes the steps that
//! [`reconcile`] returns. It never acts on a sandbox whose lifecycle lock is taken or whose create is
//! in progress here, nor on a row that changed since it was read: that knowledge is outdated, and the
//! next look is soon. While the host does not answer nothing changes, and this is logged once.
//!
//! | row \ host reports  | nothing | starting | running | pausing, resuming | paused | error | stopping |
//! |---|---|---|---|---|---|---|---|
//! | any, create in progress here | – | – | – | – | – | – | – |
//! | any, of another host | – | – | – | – | – | – | – |
//! | `pending`, `starting` | → `error` (3) | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `running` | → `error` (3) | – | refresh; if idle pause or destroy | – | → `paused` | → `error`, destroy | – |
//! | `pausing` | → `error` (3) | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `paused` | – | – | → `running` | – | – | → `error`, destroy | – |
//! | `resuming` | → `error` (3) | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `stopping` | → `stopped` | destroy | destroy | destroy | destroy | destroy | – |
//! | `stopped` | – | destroy | destroy | destroy | destroy | destroy | – |
//! | `error` | – | destroy | destroy | destroy | keep | destroy | – |
//! | no row | – | keep | keep | keep | keep | keep | – |
//!
//! - (3): only after the sandbox was absent at [`ABSENT_LOOKS`] looks in a row.
//! - "keep": the sandbox stays as it is, and this is logged once. A sandbox without a row belongs to
//!   another database: this one is empty, restored from an older copy, or mistyped. Such sandboxes
//!   are listed by `GET /v1/unknown-sandboxes`, and only a command adopts or destroys them.
//! - A row of another host: the control plane was started with another data directory, or several
//!   hosts share the database. This host's agent cannot know the sandbox.
//! - "destroy" of a sandbox in `error` acknowledges the loss; the agent then forgets the sandbox.
//! - `pending` and `starting` rows without a create were left by a process that died. If the host
//!   reports `starting`, that process had requested it, and the end is awaited. The same holds for
//!   `pausing` and `resuming` rows whose lock is free.
//! - A paused sandbox consists of files only. A host that does not have them now may have them again
//!   when its disk is mounted: the row stays, and a resume reports what is missing.
//! - A step that fails is taken again at the next look: each step is safe to repeat.

mod steps;

use std::collections::{BTreeMap, BTreeSet};

use wrenn_proto::{SandboxId, rest::SandboxStatus};

pub(crate) use steps::Reconciler;

/// Looks in a row at which a sandbox must be absent before it is taken for lost.
pub(crate) const ABSENT_LOOKS: u32 = 3;

/// State that the host reports for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostState {
    Starting,
    Running {
        /// Milliseconds since 1970 of its last use, as the agent knows.
        last_active_ms: i64,
    },
    /// It is being paused or resumed.
    Changing,
    Paused,
    Error {
        reason: String,
    },
    Stopping,
}

/// What is known here of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowView {
    pub(crate) status: SandboxStatus,
    /// This process has its create under way.
    pub(crate) creating: bool,
    /// A client uses it now.
    pub(crate) in_use: bool,
    /// Milliseconds since 1970 of its last use, as known here.
    pub(crate) last_active_ms: i64,
    /// Seconds that it may be idle; 0: any.
    pub(crate) timeout_sec: u32,
    /// Milliseconds since 1970 before which its idleness is not ended: an attempt failed.
    pub(crate) not_reaped_before_ms: i64,
    /// Looks in a row, this one included, at which the host did not report the sandbox.
    pub(crate) absent_looks: u32,
    /// True if another host has the sandbox.
    pub(crate) on_other_host: bool,
}

/// A step to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// It runs, though whoever made it so is gone.
    MarkRunning,
    /// It is paused, though whoever made it so is gone.
    MarkPaused,
    /// Take over what the host knows.
    Refresh,
    /// It is lost; its resources are to be freed.
    Fail { reason: String },
    /// The host has nothing of it any more.
    FinishStop,
    /// Ask the host once more.
    DestroyAgain,
    /// Free the host's resources of a sandbox whose row says that it ended.
    DestroyOrphan,
    /// Leave a sandbox alone that the database does not know, or knows in `error`.
    Keep,
    /// End or pause an idle sandbox.
    Reap { idle_sec: u64 },
}

/// What to do, for every sandbox that is in the rows or at the host.
pub(crate) fn reconcile(
    rows: &BTreeMap<SandboxId, RowView>,
    host: &BTreeMap<SandboxId, HostState>,
    now_ms: i64,
) -> BTreeMap<SandboxId, Action> {
    let ids: BTreeSet<_> = rows.keys().chain(host.keys()).collect();
    ids.into_iter()
        .filter_map(|id| Some((id.clone(), one(rows.get(id), host.get(id), now_ms)?)))
        .collect()
}

/// One cell of the table.
fn one(row: Option<&RowView>, host: Option<&HostState>, now_ms: i64) -> Option<Action> {
    use SandboxStatus as S;
    let Some(row) = row else {
        return unknown(host);
    };
    if row.creating || row.on_other_host {
        return None;
    }
    let (status, found) = match (row.status, host) {
        (S::Stopped, Some(HostState::Paused)) => return Some(Action::DestroyOrphan),
        (S::Stopped | S::Error, host) => return orphan(host),
        (S::Stopping, None) => return Some(Action::FinishStop),
        (S::Stopping, Some(HostState::Stopping)) => return None,
        (S::Stopping, Some(_)) => return Some(Action::DestroyAgain),
        (S::Paused, None) => return None,
        (_, None) if row.absent_looks < ABSENT_LOOKS => return None,
        (status, None) => {
            let reason = lost(status).to_owned();
            return Some(Action::Fail { reason });
        }
        (status, Some(found)) => (status, found),
    };
    match (found, status) {
        (HostState::Starting | HostState::Changing | HostState::Stopping, _)
        | (HostState::Paused, S::Paused) => None,
        (HostState::Running { last_active_ms }, S::Running) => {
            Some(idle(row, *last_active_ms, now_ms).unwrap_or(Action::Refresh))
        }
        (HostState::Running { .. }, _) => Some(Action::MarkRunning),
        (HostState::Paused, _) => Some(Action::MarkPaused),
        (HostState::Error { reason }, _) => Some(Action::Fail {
            reason: reason.clone(),
        }),
    }
}

/// Why what the host has nothing of is an error.
fn lost(status: SandboxStatus) -> &'static str {
    use SandboxStatus as S;
    match status {
        S::Pending | S::Starting => "the server was restarted while it was being created",
        S::Pausing => "its host lost it while it was being paused",
        S::Resuming => "its host lost it while it was being resumed",
        S::Running | S::Paused | S::Stopping | S::Stopped | S::Error => "its host no longer has it",
    }
}

/// A sandbox without a row: never destroyed here.
fn unknown(host: Option<&HostState>) -> Option<Action> {
    match host {
        None | Some(HostState::Stopping) => None,
        Some(_) => Some(Action::Keep),
    }
}

/// A sandbox whose row says that it ended.
fn orphan(host: Option<&HostState>) -> Option<Action> {
    match host {
        None | Some(HostState::Stopping) => None,
        Some(HostState::Paused) => Some(Action::Keep),
        Some(_) => Some(Action::DestroyOrphan),
    }
}

/// Whether it has been idle for longer than it may be.
fn idle(row: &RowView, host_last_active_ms: i64, now_ms: i64) -> Option<Action> {
    if row.timeout_sec == 0 || row.in_use || now_ms < row.not_reaped_before_ms {
        return None;
    }
    let last = row.last_active_ms.max(host_last_active_ms);
    let idle_ms = u64::try_from(now_ms.saturating_sub(last)).unwrap_or(0);
    (idle_ms >= u64::from(row.timeout_sec) * 1000).then_some(Action::Reap {
        idle_sec: idle_ms / 1000,
    })
}

#[cfg(test)]
mod tests;
