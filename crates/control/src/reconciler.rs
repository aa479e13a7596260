//! Brings the rows and the host together.
//!
//! Owns one task. Every [`ControlConfig::poll_interval`](crate::ControlConfig) it reads the rows that are not at their end,
//! *then* asks the host for its sandboxes, and takes the steps that [`reconcile`] says. Never acts on a sandbox whose
//! lifecycle lock is taken or whose create is under way here, nor on a row that changed since it was read: what it knows
//! is then old, and it will look again. While the host does not answer nothing changes, and the log says so once.
//!
//! | row \ host says | nothing | starting | running | pausing, resuming | paused | error | stopping |
//! |---|---|---|---|---|---|---|---|
//! | any, its create under way here | – | – | – | – | – | – | – |
//! | `pending`, `starting` | → `error` | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `running` | → `error` | – | refresh; if idle pause or destroy | – | → `paused` | → `error`, destroy | – |
//! | `pausing` | → `error` | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `paused` | – | – | → `running` | – | – | → `error`, destroy | – |
//! | `resuming` | → `error` | – | → `running` | – | → `paused` | → `error`, destroy | – |
//! | `stopping` | → `stopped` | destroy | destroy | destroy | destroy | destroy | – |
//! | `stopped` | – | destroy | destroy | destroy | destroy | destroy | – |
//! | `error`, no row | – | destroy | destroy | destroy | – | destroy | – |
//!
//! - "destroy" of what is in `error` is the acknowledgement after which the agent forgets it.
//! - `pending` and `starting` rows without a create were left by a process that died; what the host says "starting" of,
//!   that process had asked for, and is waited for. So with `pausing` and `resuming` rows whose lock is free.
//! - A paused sandbox is nothing but files, and nothing else has what it held. A host that does not have them now may have
//!   them again, when its disk is mounted: the row stays, and a resume says what is missing. And files without a row, which a
//!   database that was restored from an older copy does not know, are nobody's to remove: the log tells of them.
//! - A step that fails is taken again at the next look: each is safe to repeat.

mod steps;

use std::collections::{BTreeMap, BTreeSet};

use wrenn_proto::{SandboxId, rest::SandboxStatus};

pub(crate) use steps::Reconciler;

/// What the host says of one sandbox.
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
    /// Nobody should have it.
    DestroyOrphan,
    /// It is paused, and no row is known that it belongs to: a user's data, unless it was destroyed.
    Keep,
    /// Nobody uses it.
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
        return orphan(host);
    };
    if row.creating {
        return None;
    }
    let (status, found) = match (row.status, host) {
        (S::Stopped, Some(HostState::Paused)) => return Some(Action::DestroyOrphan),
        (S::Stopped | S::Error, host) => return orphan(host),
        (S::Stopping, None) => return Some(Action::FinishStop),
        (S::Stopping, Some(HostState::Stopping)) => return None,
        (S::Stopping, Some(_)) => return Some(Action::DestroyAgain),
        (S::Paused, None) => return None,
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
