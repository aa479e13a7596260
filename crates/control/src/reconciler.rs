//! Brings the rows and the host together.
//!
//! Owns one task. Every [`ControlConfig::poll_interval`](crate::ControlConfig) it reads the rows that are not at their end,
//! *then* asks the host for its sandboxes, and takes the steps that [`reconcile`] says. Never acts on a sandbox whose
//! lifecycle lock is taken or whose create is under way here, nor on a row that changed since it was read: what it knows
//! is then old, and it will look again. While the host does not answer nothing changes, and the log says so once.
//!
//! | row \ host says | nothing | starting | running | error | stopping |
//! |---|---|---|---|---|---|
//! | any, its create under way here | – | – | – | – | – |
//! | `pending`, `starting` | → `error` | – | → `running` | → `error`, destroy | – |
//! | `running` | → `error` | – | refresh; destroy if idle | → `error`, destroy | – |
//! | `stopping` | → `stopped` | destroy | destroy | destroy | – |
//! | `stopped`, `error` | – | destroy | destroy | destroy | – |
//! | no row | – | destroy | destroy | destroy | – |
//!
//! - "destroy" of what is in `error` is the acknowledgement after which the agent forgets it.
//! - `pending` and `starting` rows without a create were left by a process that died; what the host says "starting" of,
//!   that process had asked for, and is waited for.
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
}

/// A step to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// It came up though its create is gone.
    MarkRunning,
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
    match (row.status, host) {
        (S::Pending | S::Starting, None) => Some(Action::Fail {
            reason: "the server was restarted while it was being created".to_owned(),
        }),
        (S::Pending | S::Starting, Some(HostState::Running { .. })) => Some(Action::MarkRunning),
        (S::Running, None) => Some(Action::Fail {
            reason: "its host no longer has it".to_owned(),
        }),
        (S::Running, Some(HostState::Running { last_active_ms })) => {
            Some(idle(row, *last_active_ms, now_ms).unwrap_or(Action::Refresh))
        }
        (S::Pending | S::Starting | S::Running, Some(HostState::Error { reason })) => {
            Some(Action::Fail {
                reason: if reason.is_empty() {
                    "its machine is gone".to_owned()
                } else {
                    reason.clone()
                },
            })
        }
        (
            S::Pending | S::Starting | S::Running,
            Some(HostState::Starting | HostState::Stopping),
        ) => None,
        (S::Stopping, None) => Some(Action::FinishStop),
        (S::Stopping, Some(HostState::Stopping)) => None,
        (S::Stopping, Some(_)) => Some(Action::DestroyAgain),
        (S::Stopped | S::Error, host) => orphan(host),
    }
}

fn orphan(host: Option<&HostState>) -> Option<Action> {
    match host {
        None | Some(HostState::Stopping) => None,
        Some(_) => Some(Action::DestroyOrphan),
    }
}

/// Whether it has been idle for longer than it may be.
fn idle(row: &RowView, host_last_active_ms: i64, now_ms: i64) -> Option<Action> {
    if row.timeout_sec == 0 || row.in_use {
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
