//! Lifecycle of sandboxes: carries each sandbox through its states.
//!
//! Owns the tasks that create, pause, resume, copy and destroy sandboxes, the lifecycle lock of
//! each sandbox, the table of creates in progress, and activity tracking. A request never owns any
//! of these: a client that disconnects during a create causes the create to be undone, and during
//! any other operation changes nothing.
//!
//! A status changes only through [`Lifecycle::apply`]: read the row, ask `state_machine`, write the
//! row if its version is unchanged, otherwise start over. Changes that do not affect the status are
//! written by [`Lifecycle::change`], in the same way.
//!
//! `settle` decides on the status of a row from the host's report, and `Lifecycle::settle`
//! applies the decision: for the reconciler, after a failed call, and for an adopted sandbox.
//!
//! | failure                          | state left behind             | cleaned up by             |
//! |----------------------------------|-------------------------------|---------------------------|
//! | host rejects or fails a create   | row `error`                   | create task, at the host  |
//! | client disconnects in a create   | row `stopped`                 | task started on drop      |
//! | database fails after host create | row `starting`                | create task, at the host; |
//! |                                  |                               | reconciler, the row       |
//! | host does not answer a destroy   | row `stopping`                | reconciler, repeatedly    |
//! | host fails a pause or a resume   | row as before, with `warning` | no clean-up needed        |
//! | reply of pause or resume is lost | row as reported by the host,  | reconciler                |
//! |                                  | else `pausing` or `resuming`  |                           |
//! | this process dies                | any row                       | next process's reconciler |

mod activity;
mod connect;
mod copies;
mod create;
mod creating;
mod deadline;
mod destroy;
mod idempotency;
mod idle;
mod idle_time;
mod locks;
mod network;
mod pause;
mod report;
mod settle;
mod unknown;

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use thiserror_ext::AsReport as _;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::task::TaskTracker;
use wrenn_db::{Db, DbError, Owner, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proxy::ConnectionKillSwitch;

use crate::{
    agent_client::{AgentError, FREEZE_TIMEOUT},
    clock,
    fleet::{Fleet, FleetError, HostLink},
    guest::Guests,
    state_machine::{Effect, Event, Rejected, transition},
};

pub use activity::ActivityGuard;
pub use connect::{Connected, Connection};
pub use copies::CopyAs;
pub use create::{NewSandbox, PendingCreate};
pub use deadline::MAX_ENDS_AT_ONCE;
pub use idempotency::{PriorRequest, RequestError};
pub(crate) use idle::is_within;
pub(crate) use locks::LockGuard;
pub use network::new_traffic_token;
pub(crate) use report::{HostReport, HostState};
pub(crate) use settle::{Cause, Decision, settle};
#[cfg(test)]
pub(crate) use settle::{Destroy, RowChange};

/// Maximum number of attempts to write a row. Each lost race means that another writer succeeded.
const MAX_CONFLICTS: usize = 50;

/// Maximum number of attempts to write a result.
const WRITE_ATTEMPTS: usize = 3;

/// Delay between two write attempts.
const WRITE_PAUSE: Duration = Duration::from_millis(200);

/// Interval at which waiters re-read the row without a notification, because another process may
/// have changed it.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Failure of a lifecycle step.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The sandbox does not exist.
    #[error("there is no sandbox `{0}`")]
    NotFound(SandboxId),
    /// The sandbox's status does not allow the event.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// The sandbox is in another status than the operation requires.
    #[error("sandbox `{id}` is `{status}`{}{reason}; {}", if reason.is_empty() { "" } else { ": " }, what_to_do(id, *status, wanted))]
    WrongStatus {
        /// Sandbox id.
        id: SandboxId,
        /// Current status.
        status: SandboxStatus,
        /// Reason for the current status, or empty.
        reason: String,
        /// Required status.
        wanted: &'static str,
    },
    /// The sandbox is on a host that this control plane is not connected to.
    #[error(
        "sandbox `{id}` is on host {host}, and this control plane is connected to host {here}; start the \
         service with the data directory of host {host}"
    )]
    OtherHost {
        /// Sandbox id.
        id: SandboxId,
        /// Host that has the sandbox.
        host: String,
        /// Host of this control plane's agent.
        here: String,
    },
    /// The sandbox is in the database, so it is not unknown.
    #[error("sandbox `{0}` is in the database; use /v1/sandboxes/{0}")]
    Known(SandboxId),
    /// The row keeps changing.
    #[error("sandbox `{0}` is being changed concurrently; try again")]
    Busy(SandboxId),
    /// The call to the host agent failed.
    #[error("the host agent call failed")]
    Agent(#[from] AgentError),
    /// The database access failed.
    #[error("failed to access the database")]
    Db(#[from] DbError),
    /// An attempt that is shared with other callers failed.
    #[error(transparent)]
    Shared(Arc<Self>),
}

impl LifecycleError {
    /// Converts the reason why no agent can be called for a sandbox.
    pub fn of_fleet(id: &SandboxId, error: FleetError) -> Self {
        match error {
            FleetError::Agent(error) => error.into(),
            FleetError::OtherHost { host, here } => Self::OtherHost {
                id: id.clone(),
                host,
                here,
            },
        }
    }

    fn wrong_status(row: &Sandbox, wanted: &'static str) -> Self {
        Self::WrongStatus {
            id: row.id.clone(),
            status: row.status,
            reason: row.error.clone(),
            wanted,
        }
    }
}

/// Describes how the user can reach the required status.
fn what_to_do(id: &SandboxId, status: SandboxStatus, wanted: &str) -> String {
    let resumable = matches!(status, SandboxStatus::Paused | SandboxStatus::Pausing);
    if resumable && wanted == "running" {
        return format!(
            "this call requires status `running`; resume the sandbox with POST /v1/sandboxes/{id}/resume \
             (a sandbox created with `auto_resume` is resumed by calls)"
        );
    }
    format!("this call requires status `{wanted}`")
}

/// Lifecycle of all sandboxes.
pub struct Lifecycle {
    db: Db,
    fleet: Fleet,
    guests: Arc<Guests>,
    locks: locks::Locks,
    creating: creating::Creating,
    activity: activity::ActivityTracker,
    idle: idle::IdleReaper,
    /// Resumes that calls to paused sandboxes wait for.
    resumes: Mutex<HashMap<SandboxId, pause::SharedResume>>,
    /// Requests in progress that have an idempotency key.
    requests: Arc<idempotency::Requests>,
    /// Notified after each change of a row.
    changed: Notify,
    idle_times: idle_time::IdleTimes,
    deadlines: deadline::Deadlines,
    /// Notified when a deadline may have become the nearest one.
    deadline_changed: Notify,
    /// Rights to end sandboxes whose time is over.
    ends: Arc<Semaphore>,
    /// Receives sandboxes that start to run.
    begun: mpsc::Sender<SandboxId>,
    /// Closes the clients' connections to a sandbox's ports.
    cuts: ConnectionKillSwitch,
    /// Tasks that outlive the requests that started them.
    tasks: TaskTracker,
}

impl Lifecycle {
    /// Creates the lifecycle of the sandboxes of a database and of its hosts.
    pub fn new(
        db: Db,
        fleet: Fleet,
        guests: Arc<Guests>,
        cuts: ConnectionKillSwitch,
        begun: mpsc::Sender<SandboxId>,
    ) -> Arc<Self> {
        Arc::new(Self {
            db,
            fleet,
            guests,
            locks: locks::Locks::default(),
            creating: creating::Creating::default(),
            activity: activity::ActivityTracker::default(),
            idle: idle::IdleReaper::default(),
            resumes: Mutex::default(),
            requests: Arc::default(),
            changed: Notify::new(),
            idle_times: idle_time::IdleTimes::default(),
            deadlines: deadline::Deadlines::default(),
            deadline_changed: Notify::new(),
            ends: Arc::new(Semaphore::new(deadline::MAX_ENDS_AT_ONCE)),
            begun,
            cuts,
            tasks: TaskTracker::new(),
        })
    }

    /// Waits until all tasks of this module have ended.
    pub async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Starts a task that runs to completion, independent of its caller.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.tasks.spawn(task)
    }

    /// True if this process is creating the sandbox.
    pub fn is_creating(&self, id: &SandboxId) -> bool {
        self.creating.contains(id)
    }

    /// Returns a running sandbox, marked as in use until the guard is dropped. Waits for a sandbox
    /// that is about to run. Resumes a paused sandbox if it was created with automatic resume.
    pub async fn enter(
        self: &Arc<Self>,
        id: &SandboxId,
        limit: Duration,
    ) -> Result<(Sandbox, ActivityGuard), LifecycleError> {
        // Marked first, so that a sandbox that is found running is not reaped as idle right after.
        let used = ActivityGuard::new(Arc::clone(self), id.clone());
        match self.await_running(id, limit).await {
            Ok(row) => Ok((row, used)),
            Err(error) => {
                used.withdraw();
                Err(error)
            }
        }
    }

    /// Returns whether the sandbox is in use now, and when its last use ended (milliseconds since
    /// the Unix epoch; 0: no use since the start of this process).
    pub fn use_of(&self, id: &SandboxId) -> (bool, i64) {
        let found = self.activity.of(id);
        (found.is_open(), found.last_ended_ms)
    }

    /// Takes the lifecycle lock if it is free.
    pub(crate) fn try_lock(&self, id: &SandboxId) -> Option<LockGuard<'_>> {
        self.locks.try_lock(id)
    }

    /// Returns the row of a sandbox.
    pub async fn get(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        match self.db.sandbox(Owner::Any, id).await? {
            Some(row) => Ok(row),
            None => Err(LifecycleError::NotFound(id.clone())),
        }
    }

    /// Returns the connections to the host that has a sandbox.
    pub async fn host_of(&self, row: &Sandbox) -> Result<&HostLink, LifecycleError> {
        let found = self.fleet.host(&row.host_id).await;
        found.map_err(|error| LifecycleError::of_fleet(&row.id, error))
    }

    /// Like [`host_of`](Self::host_of), for a caller that has not read the row.
    pub async fn find_host(&self, id: &SandboxId) -> Result<&HostLink, LifecycleError> {
        self.host_of(&self.get(id).await?).await
    }

    /// Rejects a sandbox of another host: its host's agent would not know it, and what this host
    /// does not know is not lost.
    pub fn require_here(&self, row: &Sandbox) -> Result<(), LifecycleError> {
        match self.fleet.connected(&row.host_id) {
            Some(_) => Ok(()),
            None => {
                let error = self.fleet.other_host(&row.host_id);
                Err(LifecycleError::of_fleet(&row.id, error))
            }
        }
    }

    /// Changes the status of a row: by an event, through the state machine, at the version that was
    /// read. No other function changes a status. `change` sets other fields of the row. It may be
    /// called again if another writer was faster.
    pub async fn apply(
        &self,
        id: &SandboxId,
        event: Event,
        change: impl Fn(&mut Sandbox),
    ) -> Result<(Sandbox, Vec<Effect>), LifecycleError> {
        for _ in 0..MAX_CONFLICTS {
            let mut row = self.get(id).await?;
            self.require_here(&row)?;
            let before = row.status;
            let (next, effects) = transition(before, event)?;
            if next == before {
                return Ok((row, effects));
            }
            row.status = next;
            change(&mut row);
            if next != SandboxStatus::Resuming {
                // The request of a resume ends with the resume, regardless of its result.
                row.options.resuming = None;
            }
            row.last_updated = clock::now_ms();
            if self.db.update_sandbox(&row).await? {
                row.version += 1;
                self.note_deadline(&row);
                tracing::info!(sandbox_id = %id, from = %before, to = %next, ?event, "sandbox changed");
                if !matches!(next, SandboxStatus::Running | SandboxStatus::Pausing) {
                    self.idle.forget(id);
                }
                if next == SandboxStatus::Running {
                    // Best effort: a full queue only delays the first sample.
                    let _ = self.begun.try_send(id.clone());
                    if row.expires_at > 0 {
                        self.deadline_changed.notify_one();
                    }
                }
                if event == Event::PauseDone
                    && let Err(error) = self.db.keep().await
                {
                    tracing::warn!(sandbox_id = %id, %error, "row not flushed to disk, a power failure would lose it");
                }
                self.changed.notify_waiters();
                if !matches!(next, SandboxStatus::Running | SandboxStatus::Pausing) {
                    // A sandbox in `pausing` may keep running.
                    self.cuts.forget(id);
                    self.guests.forget(id);
                }
                return Ok((row, effects));
            }
        }
        Err(LifecycleError::Busy(id.clone()))
    }

    /// Changes fields other than the status, and the version. Anything read from the row before is
    /// then outdated.
    pub async fn change(
        &self,
        id: &SandboxId,
        change: impl Fn(&mut Sandbox),
    ) -> Result<Sandbox, LifecycleError> {
        for _ in 0..MAX_CONFLICTS {
            let mut row = self.get(id).await?;
            change(&mut row);
            row.last_updated = clock::now_ms();
            if self.db.update_sandbox(&row).await? {
                row.version += 1;
                self.note_deadline(&row);
                return Ok(row);
            }
        }
        Err(LifecycleError::Busy(id.clone()))
    }

    /// Like [`change`](Self::change), but a failure is only logged.
    async fn note(&self, id: &SandboxId, change: impl Fn(&mut Sandbox)) {
        if let Err(error) = self.change(id, change).await {
            tracing::warn!(sandbox_id = %id, %error, "failed to update the row");
        }
    }

    /// Records the host's warning of a paused sandbox. A failure is only logged.
    pub(crate) async fn note_paused_warning(&self, id: &SandboxId, warning: &str) {
        self.note(id, |row| {
            if row.status == SandboxStatus::Paused {
                warning.clone_into(&mut row.warning);
            }
        })
        .await;
    }

    /// Returns the row of a running sandbox. Waits, up to the limit, for a sandbox that boots or is
    /// being resumed. Resumes a sandbox that is paused, or about to be, if it
    /// [wakes](Sandbox::wakes).
    pub async fn await_running(
        self: &Arc<Self>,
        id: &SandboxId,
        limit: Duration,
    ) -> Result<Sandbox, LifecycleError> {
        let begun = tokio::time::Instant::now();
        let (boot_deadline, resume_deadline) = (begun + limit, begun + FREEZE_TIMEOUT);
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            // Enabled before the row is read, so that a change in between is not missed.
            told.as_mut().enable();
            let row = self.get(id).await?;
            self.require_here(&row)?;
            let deadline = match row.status {
                SandboxStatus::Running => return Ok(row),
                SandboxStatus::Pausing | SandboxStatus::Paused | SandboxStatus::Resuming
                    if row.wakes() =>
                {
                    resume_deadline
                }
                SandboxStatus::Pending | SandboxStatus::Starting | SandboxStatus::Resuming => {
                    boot_deadline
                }
                _ => begun,
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(LifecycleError::wrong_status(&row, "running"));
            }
            let joined = match row.status {
                SandboxStatus::Paused => Some(self.resume_shared(id)),
                SandboxStatus::Resuming if row.wakes() => self.resume_under_way(id),
                _ => None,
            };
            if let Some(resumed) = joined {
                resumed.await.map_err(LifecycleError::Shared)?;
                continue;
            }
            let next_look = deadline.min(tokio::time::Instant::now() + LOOK_AGAIN);
            let _ = tokio::time::timeout_at(next_look, told).await;
        }
    }

    /// Returns the row of a sandbox that runs, or that [`await_running`](Self::await_running) can
    /// bring to `running`. Changes nothing and waits for nothing.
    pub async fn look_up(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        let row = self.get(id).await?;
        self.require_here(&row)?;
        Self::require_enterable(&row)?;
        Ok(row)
    }

    /// Rejects a sandbox that cannot reach `running` by waiting, or that its user must resume
    /// first.
    pub fn require_enterable(row: &Sandbox) -> Result<(), LifecycleError> {
        match row.status {
            SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error => {
                Err(LifecycleError::wrong_status(row, "running"))
            }
            SandboxStatus::Pausing | SandboxStatus::Paused if !row.wakes() => {
                Err(LifecycleError::wrong_status(row, "running"))
            }
            _ => Ok(()),
        }
    }

    fn resumes(&self) -> MutexGuard<'_, HashMap<SandboxId, pause::SharedResume>> {
        self.resumes.lock()
    }

    /// Calls `DestroySandbox` and logs a failure. The reconciler tries again.
    async fn destroy_at_host(&self, id: &SandboxId) {
        let destroyed = async {
            let host = self.find_host(id).await?;
            Ok::<_, LifecycleError>(host.agent.destroy(id.as_str()).await?)
        };
        if let Err(error) = destroyed.await {
            tracing::warn!(sandbox_id = %id, error = %error.as_report(), "failed to destroy the sandbox at the host");
        }
    }
}

/// Describes a failure of the host for a row.
fn told(error: &AgentError) -> String {
    if error.connection_lost {
        return "the connection to the host agent was lost".to_owned();
    }
    match error.code {
        connectrpc::ErrorCode::Unknown => {
            "unexpected failure of the host agent; see the log of the control plane".to_owned()
        }
        _ => error.message.clone(),
    }
}
