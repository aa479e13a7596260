//! Reconciliation of the database and the host.
//!
//! Owns one task, which makes a pass once per
//! [`ControlConfig::poll_interval`](crate::ControlConfig). A pass reads the states of the rows that
//! are not in a final status (few columns; a whole row is read only when there is something to
//! write), *then* asks the host for its sandboxes, and takes the steps that `reconcile` returns. It
//! never acts on a sandbox whose lifecycle lock is taken or whose create is in progress in this
//! process, nor on a row that changed since it was read: its view of such a sandbox is stale, and
//! the next pass follows soon. While the host does not answer, nothing is changed, and this is
//! logged once.
//!
//! | row \ host | nothing | starting | running | pausing, resuming | paused | error | stopping |
//! |---|---|---|---|---|---|---|---|
//! | any, create in progress here | – | – | – | – | – | – | – |
//! | any, on another host | – | – | – | – | – | – | – |
//! | `pending`, `starting` | → `error` (3) | – | → `running` | – | → `paused` | fail | – |
//! | `running` | → `error` (3) | – | refresh or reap | – | → `paused` | fail | – |
//! | `pausing` | → `error` (3) | – | → `running` (3) | – | → `paused` (3) | fail | – |
//! | `paused` | – | – | → `running` | – | – (4) | fail | – |
//! | `resuming` | → `error` (3) | – | → `running` (3) | – | → `paused` (3) | fail | – |
//! | `stopping` | → `stopped` | destroy | destroy | destroy | destroy | destroy | – |
//! | `stopped` | – | destroy | destroy | destroy | destroy | destroy | – |
//! | `error` | – | keep | destroy | destroy | keep | destroy | – |
//! | no row | – | keep | keep | keep | keep | keep | – |
//!
//! - (3): only if `MIN_STEADY_PASSES` consecutive passes saw the row and the host like this. A
//!   sandbox may be absent from one answer, and another control plane may have written the row and
//!   not called the host yet.
//! - (4): The row takes a warning of the host if it has none: after a restart, the agent may find
//!   that it cannot load the memory of a paused sandbox.
//! - "reap": an idle sandbox is paused or destroyed, as requested at its creation. Idle times are
//!   measured by the monotonic clock (`lifecycle::idle_time`), and only a bounded number of
//!   sandboxes is reaped at the same time; the others follow in later passes.
//! - "fail": the row becomes `error`, and the sandbox is destroyed at the host.
//! - "keep": the sandbox is left unchanged, and this is logged once. A sandbox without a row
//!   belongs to another database: the current one is empty, restored from an older copy, or not the
//!   intended one. Such sandboxes are listed by `GET /v1/unknown-sandboxes`. Only a client's call
//!   adopts or destroys them.
//! - A row on another host: the control plane was started with another data directory, or several
//!   hosts share the database. The agent of this host cannot have the sandbox.
//! - "destroy" of a sandbox in `error` acknowledges the loss; the agent then forgets the sandbox.
//!   An agent that has just started reports a sandbox as `starting` until it knows its VM. It may
//!   be paused, which is kept.
//! - `pending` and `starting` rows without a create were left by a process that died. If the host
//!   reports `starting`, that process had sent the create, and the reconciler waits for its end.
//!   The same holds for `pausing` and `resuming` rows whose lock is free.
//! - A paused sandbox consists of files only. If the host does not report it, the disk with the
//!   files may not be mounted yet. The row therefore stays, and a resume reports the missing files.
//! - A step that fails is repeated in the next pass. Every step is idempotent.
//!
//! This module decides whether a sandbox is acted on in this pass. `lifecycle::settle` decides on
//! the new status of a row, for this module, after a failed call, and for an adopted sandbox. Its
//! documentation contains the table for failed calls.

mod retention;
mod steps;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use wrenn_model::{SandboxId, SandboxStatus};

use crate::lifecycle::{Cause, Decision, HostReport, HostState, is_within, settle};

pub use steps::Reconciler;

/// Number of consecutive passes that must see the same row and host before a sandbox counts as
/// lost, or a pause or resume as abandoned.
pub(crate) const MIN_STEADY_PASSES: u32 = 3;

/// Row of a sandbox, and the state of the sandbox in this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowView {
    pub(crate) status: SandboxStatus,
    /// True if a create of the sandbox is in progress in this process.
    pub(crate) creating: bool,
    /// True if a client is using the sandbox.
    pub(crate) in_use: bool,
    /// Time since the last activity.
    pub(crate) idle: Duration,
    /// Idle timeout, in seconds; 0 means none.
    pub(crate) timeout_sec: u32,
    /// True if the sandbox is not reaped now, because an attempt failed.
    pub(crate) is_reap_delayed: bool,
    /// Number of consecutive passes, this one included, in which the row had this version and the
    /// host reported this state.
    pub(crate) steady_passes: u32,
    /// True if another host has the sandbox.
    pub(crate) on_other_host: bool,
    /// True if the row has a warning.
    pub(crate) is_warned: bool,
}

/// Step that the reconciler takes for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Changes the status of the row. No operation on the sandbox is in progress any more.
    Settle(Box<Decision>),
    /// Updates the row from the host's report.
    Refresh,
    /// Records the host's warning of a paused sandbox in the row.
    Warn(String),
    /// Frees the host's resources of a sandbox whose row is in a final status.
    DestroyOrphan,
    /// Leaves a sandbox unchanged that has no row, or whose row is `error`.
    Keep,
    /// Pauses or destroys an idle sandbox.
    Reap { idle_sec: u64 },
}

/// Returns the step for each sandbox that has a row or exists on the host and needs one.
pub(crate) fn reconcile(
    rows: &BTreeMap<SandboxId, RowView>,
    host: &BTreeMap<SandboxId, HostReport>,
) -> BTreeMap<SandboxId, Action> {
    let ids: BTreeSet<_> = rows.keys().chain(host.keys()).collect();
    ids.into_iter()
        .filter_map(|id| Some((id.clone(), one(rows.get(id), host.get(id))?)))
        .collect()
}

/// Returns one cell of the table in the module documentation.
fn one(row: Option<&RowView>, host: Option<&HostReport>) -> Option<Action> {
    use SandboxStatus as S;
    let Some(row) = row else {
        return unknown(host);
    };
    if row.creating || row.on_other_host {
        return None;
    }
    let state = host.map(|report| &report.state);
    match (row.status, host) {
        (S::Stopped, _) if state == Some(&HostState::Paused) => return Some(Action::DestroyOrphan),
        (S::Error, _) if state == Some(&HostState::Starting) => return Some(Action::Keep),
        (S::Stopped | S::Error, host) => return orphan(host),
        (S::Running, Some(report)) if report.state == HostState::Running => {
            return Some(idle(row).unwrap_or(Action::Refresh));
        }
        (S::Paused, Some(report)) if report.state == HostState::Paused => {
            let warns = !row.is_warned && !report.warning.is_empty();
            return warns.then(|| Action::Warn(report.warning.clone()));
        }
        (status, _)
            if row.steady_passes < MIN_STEADY_PASSES && needs_steady_passes(status, state) =>
        {
            return None;
        }
        _ => {}
    }
    settle(row.status, host, Cause::Pass).map(|decision| Action::Settle(decision.into()))
}

/// True if the row and the host may match again without a step, so that one pass does not suffice.
fn needs_steady_passes(status: SandboxStatus, state: Option<&HostState>) -> bool {
    use SandboxStatus as S;
    match (status, state) {
        (S::Stopping, _) => false,
        // Another control plane may have written the row and not called the host yet.
        (S::Pausing | S::Resuming, Some(HostState::Running | HostState::Paused)) => true,
        (_, state) => state.is_none(),
    }
}

/// Returns the step for a sandbox without a row, which is never destroyed.
fn unknown(host: Option<&HostReport>) -> Option<Action> {
    match host?.state {
        HostState::Stopping => None,
        _ => Some(Action::Keep),
    }
}

/// Returns the step for a sandbox whose row is in a final status.
fn orphan(host: Option<&HostReport>) -> Option<Action> {
    match host?.state {
        HostState::Stopping => None,
        HostState::Paused => Some(Action::Keep),
        _ => Some(Action::DestroyOrphan),
    }
}

/// Returns [`Action::Reap`] if the sandbox has been idle for longer than its timeout.
fn idle(row: &RowView) -> Option<Action> {
    if row.in_use || row.is_reap_delayed || is_within(row.timeout_sec, row.idle) {
        return None;
    }
    let idle_sec = row.idle.as_secs();
    Some(Action::Reap { idle_sec })
}

#[cfg(test)]
mod tests;
