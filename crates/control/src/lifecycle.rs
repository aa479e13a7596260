//! Carries each sandbox through its states.
//!
//! Owns the tasks that create, pause, resume, copy and destroy, the lifecycle lock of each sandbox, the list of creates
//! under way and the count of uses. Never lets a request own any of it: a client that goes away in the middle of a create
//! makes it undone, in the middle of anything else changes nothing.
//!
//! A row changes in one way only, [`Lifecycle::apply`]: read it, ask `state_machine`, write it if it is still the same
//! version, else begin again. (What is no change of status is written by [`Lifecycle::note`], in the same way.)
//!
//! | what fails | what is left | who cleans up |
//! |---|---|---|
//! | the host refuses or fails a create | row `error` | the create task destroys at the host |
//! | the client leaves during a create | row `stopped` | a task started by the guard's drop |
//! | the database fails after the host created | row `starting` | the create task destroys at the host; the reconciler settles the row |
//! | the host does not answer a destroy | row `stopping` | the reconciler, each time it looks |
//! | the host fails a pause or a resume | row as before, with a `warning` | nobody needs to |
//! | the reply of a pause or a resume is lost | row as the host says when asked, else `pausing` or `resuming` | the reconciler |
//! | this process dies | any row | the next process's reconciler |

mod connect;
mod copies;
mod create;
mod creating;
mod deadline;
mod destroy;
mod locks;
mod network;
mod pause;
mod reaping;
mod requests;
mod uses;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, mpsc};
use tokio_util::task::TaskTracker;
use wrenn_proto::{
    SandboxId,
    rest::{BootTimes, SandboxStatus},
    rpc::hostagent::v1::SandboxInfo,
};
use wrenn_proxy::Cuts;

use crate::{
    agent_client::{AgentClient, AgentError, FREEZE_TIMEOUT},
    clock,
    db::{Db, DbError, sandboxes::Sandbox},
    state_machine::{Effect, Event, Refused, transition},
};

pub(crate) use connect::{Connected, Connection};
pub(crate) use copies::CopyAs;
pub(crate) use create::{Creation, NewSandbox};
pub(crate) use locks::LockGuard;
pub(crate) use pause::lost_reason;
pub(crate) use requests::{Earlier, RequestError};
pub(crate) use uses::UseGuard;

/// How often a lost race for a row is tried again. Each loss means that another writer won.
const MAX_CONFLICTS: usize = 50;

/// How often a result is written before it is given up.
const WRITE_ATTEMPTS: usize = 3;

/// Between two attempts to write.
const WRITE_PAUSE: Duration = Duration::from_millis(200);

/// How often a waiter looks at the row even if nothing was told: another process may have changed it.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Why a step of a sandbox's life was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LifecycleError {
    /// There is no such sandbox.
    #[error("there is no sandbox `{0}`")]
    NotFound(SandboxId),
    /// Its status does not allow it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It is in another status than this needs.
    #[error("sandbox `{id}` is `{status}`{}{reason}; {}", if reason.is_empty() { "" } else { ": " }, what_to_do(id, *status, wanted))]
    WrongStatus {
        /// The sandbox.
        id: SandboxId,
        /// Its status.
        status: SandboxStatus,
        /// Why it is in that status, or empty.
        reason: String,
        /// The status that this needs.
        wanted: &'static str,
    },
    /// The row keeps changing.
    #[error("sandbox `{0}` is being changed by others")]
    Busy(SandboxId),
    /// The host did not do it.
    #[error("the host failed")]
    Agent(#[from] AgentError),
    /// The database did not do it.
    #[error("the database failed")]
    Db(#[from] DbError),
    /// An attempt that others wait for too failed.
    #[error(transparent)]
    Shared(Arc<Self>),
}

impl LifecycleError {
    fn wrong_status(row: &Sandbox, wanted: &'static str) -> Self {
        Self::WrongStatus {
            id: row.id.clone(),
            status: row.status,
            reason: row.error.clone(),
            wanted,
        }
    }
}

/// What a user can do about a status.
fn what_to_do(id: &SandboxId, status: SandboxStatus, wanted: &str) -> String {
    let resumable = matches!(status, SandboxStatus::Paused | SandboxStatus::Pausing);
    if resumable && wanted == "running" {
        return format!(
            "this needs it `running`: resume it with POST /v1/sandboxes/{id}/resume (with `auto_resume` at its creation a \
             call does that by itself)"
        );
    }
    format!("this needs it `{wanted}`")
}

/// All sandboxes' lives.
pub(crate) struct Lifecycle {
    db: Db,
    agent: AgentClient,
    locks: locks::Locks,
    creating: creating::Creating,
    uses: uses::Uses,
    reaping: reaping::Reaping,
    /// Resumes that calls to paused sandboxes wait for.
    resumes: Mutex<HashMap<SandboxId, pause::SharedResume>>,
    /// Requests with an idempotency key that are under way.
    requests: Arc<requests::Requests>,
    /// Told after each change of a row.
    changed: Notify,
    /// Told when a deadline may be nearer than the nearest one was.
    deadlines: Notify,
    /// Told of sandboxes that begin to run.
    begun: mpsc::Sender<SandboxId>,
    /// Ends what clients have open to a sandbox's ports.
    cuts: Cuts,
    /// Tasks that outlive the requests which began them.
    tasks: TaskTracker,
}

impl Lifecycle {
    pub(crate) fn new(
        db: Db,
        agent: AgentClient,
        cuts: Cuts,
        begun: mpsc::Sender<SandboxId>,
    ) -> Arc<Self> {
        Arc::new(Self {
            db,
            agent,
            locks: locks::Locks::default(),
            creating: creating::Creating::default(),
            uses: uses::Uses::default(),
            reaping: reaping::Reaping::default(),
            resumes: Mutex::default(),
            requests: Arc::default(),
            changed: Notify::new(),
            deadlines: Notify::new(),
            begun,
            cuts,
            tasks: TaskTracker::new(),
        })
    }

    /// Waits until all tasks of this module have ended.
    pub(crate) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Starts a task that ends when it is done, whoever has gone meanwhile.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        self.tasks.spawn(task)
    }

    /// Whether this process has a create of it under way.
    pub(crate) fn is_creating(&self, id: &SandboxId) -> bool {
        self.creating.contains(id)
    }

    /// A sandbox that runs, marked as used until the guard is dropped. One that is about to run is waited for; a paused one is
    /// resumed if it was created so.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        id: &SandboxId,
        limit: Duration,
    ) -> Result<(Sandbox, UseGuard), LifecycleError> {
        // Marked first: one that is found running must not be reaped as idle a moment later.
        let used = UseGuard::new(Arc::clone(self), id.clone());
        match self.await_running(id, limit).await {
            Ok(row) => Ok((row, used)),
            Err(error) => {
                used.withdraw();
                Err(error)
            }
        }
    }

    /// Whether it is in use now, and when a use last ended (milliseconds since 1970; 0: not since the start).
    pub(crate) fn use_of(&self, id: &SandboxId) -> (bool, i64) {
        self.uses.of(id)
    }

    /// Takes the lifecycle lock if it is free.
    pub(crate) fn try_lock(&self, id: &SandboxId) -> Option<LockGuard<'_>> {
        self.locks.try_lock(id)
    }

    /// The row of a sandbox.
    pub(crate) async fn get(&self, id: &SandboxId) -> Result<Sandbox, LifecycleError> {
        match self.db.sandbox(id).await? {
            Some(row) => Ok(row),
            None => Err(LifecycleError::NotFound(id.clone())),
        }
    }

    /// The one way in which a row changes: by an event, through the state machine, at the version that was read.
    /// `change` sets what else is known; it may be called again if another writer was faster.
    pub(crate) async fn apply(
        &self,
        id: &SandboxId,
        event: Event,
        change: impl Fn(&mut Sandbox),
    ) -> Result<(Sandbox, Vec<Effect>), LifecycleError> {
        for _ in 0..MAX_CONFLICTS {
            let mut row = self.get(id).await?;
            let before = row.status;
            let (next, effects) = transition(before, event)?;
            if next == before {
                return Ok((row, effects));
            }
            row.status = next;
            change(&mut row);
            if next != SandboxStatus::Resuming {
                // However it went, what was asked of a resume ends with it.
                row.options.resuming = None;
            }
            row.last_updated = clock::now_ms();
            if self.db.update_sandbox(&row).await? {
                row.version += 1;
                tracing::info!(sandbox_id = %id, from = %before, to = %next, ?event, "sandbox changed");
                if !matches!(next, SandboxStatus::Running | SandboxStatus::Pausing) {
                    self.reaping.forget(id);
                }
                if next == SandboxStatus::Running {
                    // Nobody waits for this: a full queue only means a first sample that comes later.
                    let _ = self.begun.try_send(id.clone());
                    if row.expires_at > 0 {
                        self.deadlines.notify_one();
                    }
                }
                if event == Event::PauseDone
                    && let Err(error) = self.db.keep().await
                {
                    tracing::warn!(sandbox_id = %id, %error, "a power failure would lose its row");
                }
                self.changed.notify_waiters();
                if !matches!(next, SandboxStatus::Running | SandboxStatus::Pausing) {
                    // One that is about to be paused may yet run on.
                    self.cuts.forget(id);
                }
                return Ok((row, effects));
            }
        }
        Err(LifecycleError::Busy(id.clone()))
    }

    /// Changes what is not the status, and the version: what was seen of it before counts for nothing.
    pub(crate) async fn change(
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
                return Ok(row);
            }
        }
        Err(LifecycleError::Busy(id.clone()))
    }

    /// As [`change`](Self::change); a failure is only logged.
    async fn note(&self, id: &SandboxId, change: impl Fn(&mut Sandbox)) {
        if let Err(error) = self.change(id, change).await {
            tracing::warn!(sandbox_id = %id, %error, "cannot note what happened to a sandbox");
        }
    }

    /// The row of a sandbox that runs. One that boots, or that somebody resumes, is waited for within the limit. One that is
    /// paused, or about to be, is resumed if it [wakes](Sandbox::wakes).
    pub(crate) async fn await_running(
        self: &Arc<Self>,
        id: &SandboxId,
        limit: Duration,
    ) -> Result<Sandbox, LifecycleError> {
        let begun = tokio::time::Instant::now();
        let (boot_deadline, resume_deadline) = (begun + limit, begun + FREEZE_TIMEOUT);
        loop {
            let mut told = std::pin::pin!(self.changed.notified());
            // Before the row is read: a change in between is then told, not missed.
            told.as_mut().enable();
            let row = self.get(id).await?;
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

    /// Refuses what no waiting could make run, and what its user must resume first.
    pub(crate) fn require_enterable(row: &Sandbox) -> Result<(), LifecycleError> {
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
        self.resumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `DestroySandbox`, and says in the log if that did not work: the reconciler will try again.
    async fn destroy_at_host(&self, id: &SandboxId) {
        if let Err(error) = self.agent.destroy(id.as_str()).await {
            tracing::warn!(sandbox_id = %id, %error, "cannot destroy at the host now");
        }
    }
}

/// A failure of the host, in words for a row.
fn told(error: &AgentError) -> String {
    if error.connection_lost {
        return "the host agent went away".to_owned();
    }
    match error.code {
        connectrpc::ErrorCode::Unknown => "the host failed; its log says why".to_owned(),
        _ => error.message.clone(),
    }
}

/// Takes over what the host knows of a sandbox that it has brought back. The idle time begins now, and the lifetime that the
/// resume was asked for.
pub(crate) fn resumed_from_host(row: &mut Sandbox, info: &SandboxInfo) {
    let now = clock::now_ms();
    fill_from_host(row, info, now);
    // Empty, unless its machine had been lost.
    row.warning.clone_from(&info.warning);
    row.last_active_at = row.last_active_at.max(now);
    row.renew_lifetime(now);
}

/// Takes over what the host knows of a running sandbox.
pub(crate) fn fill_from_host(row: &mut Sandbox, info: &SandboxInfo, now_ms: i64) {
    refresh_from_host(row, info);
    row.options.paused_disk_only = false;
    if row.started_at == 0 {
        row.started_at = now_ms;
    }
    row.error.clear();
}

/// Takes over what may change while it runs. Times of use only go forward.
pub(crate) fn refresh_from_host(row: &mut Sandbox, info: &SandboxInfo) {
    if !info.host_ip.is_empty() {
        row.host_ip.clone_from(&info.host_ip);
    }
    if !info.guest_ip.is_empty() {
        row.guest_ip.clone_from(&info.guest_ip);
    }
    row.last_active_at = row.last_active_at.max(info.last_active_unix_ms);
    // What is known here of a failure is the same, or more.
    if row.warning.is_empty() {
        row.warning.clone_from(&info.warning);
    }
    if !info.envd_token.is_empty() {
        row.envd_token.clone_from(&info.envd_token);
    }
    if let Some(boot) = info.boot.as_option() {
        row.boot = Some(BootTimes {
            prepared_ms: boot.prepared_ms,
            vmm_started_ms: boot.vmm_started_ms,
            kernel_ms: boot.kernel_ms,
            init_ms: boot.init_ms,
            envd_ms: boot.envd_ms,
        });
    }
}
