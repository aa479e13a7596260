//! The task of the reconciler: polls the database and the host, and runs the steps that
//! [`reconcile`] returns.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::{Discriminant, discriminant},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wrenn_db::{Db, Owner, StateRow, UNKNOWN_HOST};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1::SandboxInfo;

use super::{Action, RowView, reconcile, retention::Retention};
use crate::{
    agent_client::AgentClient,
    clock,
    fleet::{Fleet, HostLink},
    lifecycle::{HostReport, HostState, Lifecycle, LifecycleError},
};

/// Statuses that may change without a request.
const ACTIVE: [SandboxStatus; 7] = [
    SandboxStatus::Pending,
    SandboxStatus::Starting,
    SandboxStatus::Running,
    SandboxStatus::Pausing,
    SandboxStatus::Paused,
    SandboxStatus::Resuming,
    SandboxStatus::Stopping,
];

/// Minimum change of a sandbox's activity time that is written to its row, in milliseconds.
const USE_GRAIN_MS: i64 = 1000;

/// Maximum precision of the activity time of a sandbox in use, in milliseconds. An open terminal
/// does not cause a write per second.
const MAX_IN_USE_GRAIN_MS: i64 = 10_000;

/// Task that compares the rows with the sandboxes of one host and corrects the differences.
pub struct Reconciler {
    db: Db,
    fleet: Fleet,
    host: HostLink,
    lifecycle: Arc<Lifecycle>,
    /// True if the host answered the last poll.
    reachable: bool,
    /// Sandboxes that are left alone and have been logged as such.
    kept: Arc<Mutex<BTreeSet<SandboxId>>>,
    /// Observations of the last passes, for each sandbox that has a row.
    seen: BTreeMap<SandboxId, Seen>,
    refreshed: Refreshed,
    retention: Retention,
}

/// Data of the host that the rows contain, with the version of the row. While both stay the same, a
/// row is not read.
type Refreshed = Arc<Mutex<BTreeMap<SandboxId, (i64, HostReport)>>>;

/// Observation of a sandbox that consecutive passes share.
#[derive(Default)]
struct Seen {
    version: i64,
    /// State at the host; `None` if the host did not report the sandbox.
    state: Option<Discriminant<HostState>>,
    /// Number of passes.
    passes: u32,
}

/// Result of one poll for one sandbox.
struct Found {
    row: Option<StateRow>,
    report: Option<HostReport>,
}

impl Reconciler {
    /// Returns the reconciler of a host of the fleet. It has not made a pass yet. Rows that ended
    /// longer than `retention` ago are removed; `None`: never.
    pub fn new(
        db: Db,
        fleet: Fleet,
        host: HostLink,
        lifecycle: Arc<Lifecycle>,
        retention: Option<Duration>,
    ) -> Self {
        Self {
            retention: Retention::new(retention),
            refreshed: Refreshed::default(),
            db,
            fleet,
            host,
            lifecycle,
            reachable: true,
            kept: Arc::default(),
            seen: BTreeMap::new(),
        }
    }

    /// Polls until shutdown.
    pub async fn run(mut self, interval: Duration, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.pass() => {}
            }
        }
    }

    async fn pass(&mut self) {
        // The rows are read first: a sandbox that was `running` before the host is called must be
        // in the host's answer.
        let rows = match self.db.states(&ACTIVE).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::error!(%error, "failed to read the rows, reconciliation skipped");
                return;
            }
        };
        let creating: Vec<bool> = rows
            .iter()
            .map(|row| self.lifecycle.is_creating(&row.id))
            .collect();
        let Some(infos) = self.ask_host().await else {
            return;
        };
        let host = reports(&infos);
        let known: BTreeSet<&SandboxId> = rows.iter().map(|row| &row.id).collect();
        self.seen.retain(|id, _| known.contains(id));
        self.lifecycle.retain_idle_times(|id| known.contains(id));
        self.refreshed.lock().retain(|id, _| known.contains(id));
        let mut rows_by_id = BTreeMap::new();
        let mut views = BTreeMap::new();
        for (row, creating) in rows.into_iter().zip(creating) {
            let report = host.get(&row.id);
            let state = report.map(|report| discriminant(&report.state));
            let steady_passes = self.count_passes(&row, state);
            let mut view = self.view(&row, creating, report);
            view.steady_passes = steady_passes;
            views.insert(row.id.clone(), view);
            rows_by_id.insert(row.id.clone(), row);
        }
        for (id, action) in reconcile(&views, &host) {
            let found = Found {
                row: rows_by_id.remove(&id),
                report: host.get(&id).cloned(),
            };
            self.begin(id, action, found);
        }
        self.remove_ended(&host).await;
    }

    /// Removes rows that ended long ago. A row whose sandbox the host still has stays: without it,
    /// the sandbox would be unknown.
    async fn remove_ended(&mut self, host: &BTreeMap<SandboxId, HostReport>) {
        let here = self.host.agent.row_host_id();
        let old = match self.fleet.serves(&self.host, UNKNOWN_HOST) {
            true => UNKNOWN_HOST,
            false => &here,
        };
        let exists = |id: &SandboxId| host.contains_key(id);
        let removed = self.retention.look(&self.db, [&here, old], exists).await;
        if let Err(error) = removed {
            tracing::warn!(%error, "failed to remove the rows of sandboxes that have ended");
        }
    }

    async fn ask_host(&mut self) -> Option<Vec<SandboxInfo>> {
        match self.host.agent.list().await {
            Ok(infos) => {
                if !self.reachable {
                    tracing::info!("host agent available again");
                }
                self.reachable = true;
                Some(infos)
            }
            Err(error) => {
                if self.reachable {
                    tracing::error!(%error, "host agent unavailable, reconciliation suspended");
                }
                self.reachable = false;
                None
            }
        }
    }

    /// Counts the consecutive passes that saw this version of a row and this state at the host.
    fn count_passes(&mut self, row: &StateRow, state: Option<Discriminant<HostState>>) -> u32 {
        let seen = self.seen.entry(row.id.clone()).or_default();
        if seen.version != row.version || seen.state != state {
            *seen = Seen {
                version: row.version,
                state,
                passes: 0,
            };
        }
        seen.passes = seen.passes.saturating_add(1);
        seen.passes
    }

    fn view(&self, row: &StateRow, creating: bool, report: Option<&HostReport>) -> RowView {
        let (in_use, _) = self.lifecycle.use_of(&row.id);
        let row_ms = row.last_active_at.max(row.started_at);
        let host_ms = report.map(|report| report.last_active_ms);
        RowView {
            status: row.status,
            creating: creating || self.lifecycle.is_creating(&row.id),
            in_use,
            idle: match row.status {
                SandboxStatus::Running => self.lifecycle.idle_time_of(&row.id, row_ms, host_ms),
                _ => Duration::ZERO,
            },
            timeout_sec: row.timeout_sec,
            is_reap_delayed: self.lifecycle.is_reap_delayed(&row.id),
            steady_passes: 0,
            on_other_host: !self.fleet.serves(&self.host, &row.host_id),
            is_warned: row.is_warned,
        }
    }

    /// Runs a step in a task of its own. A destroy takes seconds, and other sandboxes must not wait
    /// for it. An idle sandbox is left to a later pass while too many are being ended.
    fn begin(&self, id: SandboxId, action: Action, found: Found) {
        let ending = match action {
            Action::Reap { .. } => match self.lifecycle.try_begin_end() {
                Some(ending) => Some(ending),
                None => return,
            },
            _ => None,
        };
        let step = Step {
            db: self.db.clone(),
            agent: self.host.agent.clone(),
            lifecycle: Arc::clone(&self.lifecycle),
            kept: Arc::clone(&self.kept),
            refreshed: Arc::clone(&self.refreshed),
            id,
            found,
        };
        self.lifecycle.spawn(async move {
            let _ending = ending;
            if let Err(error) = step.take(action).await {
                tracing::warn!(sandbox_id = %step.id, %error, "reconciliation step failed, will be retried");
            }
        });
    }
}

/// One sandbox as found by a poll, and everything that its step needs.
struct Step {
    db: Db,
    agent: AgentClient,
    lifecycle: Arc<Lifecycle>,
    kept: Arc<Mutex<BTreeSet<SandboxId>>>,
    refreshed: Refreshed,
    id: SandboxId,
    found: Found,
}

impl Step {
    async fn take(&self, action: Action) -> Result<(), LifecycleError> {
        match action {
            Action::Refresh => return self.refresh().await,
            Action::Keep => return self.keep().await,
            _ => {}
        }
        // If the lock is taken, another task is changing the sandbox.
        let Some(lock) = self.lifecycle.try_lock(&self.id) else {
            return Ok(());
        };
        lock.give_way(self.take_locked(action)).await
    }

    async fn take_locked(&self, action: Action) -> Result<(), LifecycleError> {
        if !self.is_as_found().await? {
            return Ok(());
        }
        tracing::info!(sandbox_id = %self.id, ?action, "reconciling");
        match action {
            Action::Refresh | Action::Keep => Ok(()),
            Action::Settle(decision) => self.lifecycle.settle(&self.id, &decision).await.map(drop),
            Action::Warn(warning) => {
                self.lifecycle.note_paused_warning(&self.id, &warning).await;
                Ok(())
            }
            Action::DestroyOrphan => Ok(self.agent.destroy(self.id.as_str()).await?),
            Action::Reap { idle_sec } => self.lifecycle.reap_locked(&self.id, idle_sec).await,
        }
    }

    /// Leaves a sandbox without an active row alone. If it was destroyed here in the meantime,
    /// frees its resources on the host.
    async fn keep(&self) -> Result<(), LifecycleError> {
        let row = self.db.sandbox(Owner::Any, &self.id).await?;
        let status = row.map(|row| row.status);
        // The destroy that follows a loss may have failed.
        let is_lost = status == Some(SandboxStatus::Error)
            && self
                .found
                .report
                .as_ref()
                .is_some_and(|report| matches!(report.state, HostState::Error { .. }));
        if status == Some(SandboxStatus::Stopped) || is_lost {
            return Ok(self.agent.destroy(self.id.as_str()).await?);
        }
        let mut kept = self.kept.lock();
        if status.is_none_or(|status| !ACTIVE.contains(&status)) && kept.insert(self.id.clone()) {
            tracing::warn!(
                sandbox_id = %self.id,
                "sandbox without an active row left alone; see `wrenn sandbox ls --unknown`"
            );
        }
        Ok(())
    }

    /// True if the row is unchanged since the poll and no create is in progress. A sandbox that had
    /// no active row must still have none.
    async fn is_as_found(&self) -> Result<bool, LifecycleError> {
        if self.lifecycle.is_creating(&self.id) {
            return Ok(false);
        }
        let row = self.db.sandbox(Owner::Any, &self.id).await?;
        Ok(match (&self.found.row, row) {
            (Some(before), Some(now)) => before.version == now.version,
            (None, Some(now)) => !ACTIVE.contains(&now.status),
            (None, None) => true,
            (Some(_), None) => false,
        })
    }

    /// Writes newer data of the host to the row. A small change of the activity time alone is not
    /// written. The row is read only if there is something new.
    async fn refresh(&self) -> Result<(), LifecycleError> {
        let (Some(found), Some(report)) = (&self.found.row, &self.found.report) else {
            return Ok(());
        };
        let host_id = self.agent.row_host_id();
        let last_active_at = self.last_active_at(found, report);
        let data = HostReport {
            last_active_ms: 0,
            ..report.clone()
        };
        let refreshed = (found.version, data);
        if self.refreshed.lock().get(&self.id) == Some(&refreshed)
            && (&found.host_id, found.last_active_at) == (&host_id, last_active_at)
        {
            return Ok(());
        }
        let row = self.db.sandbox(Owner::Any, &self.id).await?;
        let Some(row) = row.filter(|row| row.version == found.version) else {
            return Ok(());
        };
        let mut new = row.clone();
        report.refresh(&mut new);
        new.host_id = host_id;
        new.last_active_at = row.last_active_at.max(last_active_at);
        if new == row || self.db.refresh_sandbox(&new).await? {
            self.refreshed.lock().insert(self.id.clone(), refreshed);
        }
        Ok(())
    }

    /// Returns the activity time that the row should have: that of the row unless there is a later
    /// one that is worth a write.
    fn last_active_at(&self, row: &StateRow, report: &HostReport) -> i64 {
        // The next process must know of calls that are in progress now.
        let last_use_ms = match self.lifecycle.use_of(&self.id) {
            (true, _) => {
                let now_ms = clock::now_ms();
                now_ms - now_ms.rem_euclid(in_use_grain_ms(row.timeout_sec))
            }
            (false, last_ended_ms) => last_ended_ms,
        };
        let newest = report.last_active_ms.max(last_use_ms);
        if newest < row.last_active_at.saturating_add(USE_GRAIN_MS) {
            return row.last_active_at;
        }
        newest
    }
}

/// Returns the precision of the activity time of a sandbox in use, in milliseconds: a quarter of
/// its idle time, so that another process does not take it for idle.
fn in_use_grain_ms(timeout_sec: u32) -> i64 {
    (i64::from(timeout_sec) * 250).clamp(USE_GRAIN_MS, MAX_IN_USE_GRAIN_MS)
}

/// Returns the reports of the host, by sandbox.
fn reports(infos: &[SandboxInfo]) -> BTreeMap<SandboxId, HostReport> {
    let report = |info: &SandboxInfo| match info.id.parse() {
        Ok(id) => Some((id, HostReport::from(info))),
        Err(_) => {
            tracing::error!(id = %info.id, "host reported a sandbox with an invalid id");
            None
        }
    };
    infos.iter().filter_map(report).collect()
}
