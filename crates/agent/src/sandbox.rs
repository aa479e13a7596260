//! One sandbox: what it is, in which state, and who may change that.
//!
//! A task owns each sandbox ([`owner`]) and is the only one that builds, frees or changes it, so there is one lifecycle
//! operation at a time and no lock to hold across it. Everybody else has a [`Sandbox`]: reads, counts use, and asks the
//! owner to destroy.
//!
//! ```text
//!              boot done                     supervisor gone
//!  Starting ──────────────► Running ───────────────────────────► Error(reason)
//!     │                        │                                     │
//!     │ destroy, or failure    │ destroy                             │ destroy
//!     └───────────────► Stopping ◄───────────────────────────────────┘
//!                          │ all is freed         what could not be freed: Error(reason), destroy again
//!                          └─► forgotten
//! ```
//!
//! | step of a create     | failure                        | what the caller sees            | who frees what was made            |
//! |----------------------|--------------------------------|---------------------------------|------------------------------------|
//! | admission            | no memory, CPU or disk for it  | resource_exhausted              | nothing made                       |
//! | folder               | name taken                     | already_exists                  | nothing made                       |
//! | folder, disk, spec   | host's disk full               | resource_exhausted              | the owner, at once                 |
//! | slot                 | all taken                      | resource_exhausted              | the owner, at once                 |
//! | network, cgroup      | kernel or nft refuses          | internal                        | the owner, at once                 |
//! | supervisor           | dies, or is not ready in time  | internal, with its last word    | the owner; the VMM dies with it    |
//! | guest                | supervisor dies meanwhile      | internal, with its last word    | the owner, at once                 |
//! | guest                | does not answer in time        | deadline_exceeded               | the owner, at once                 |
//! | guest                | refuses its settings           | the guest agent's own code      | the owner, at once                 |
//! | any                  | caller goes away               | -                               | nobody: it runs; the caller destroys |
//! | any                  | destroy                        | failed_precondition (create)    | the owner, before destroy answers  |
//! | any                  | agent ends in order            | unavailable                     | the owner; if the supervisor runs, nobody: the next agent adopts |
//! | before `spec.json`   | agent is killed                | connection lost                 | the next agent, at its start       |
//! | after `spec.json`    | agent is killed                | connection lost                 | the next agent adopts it           |
//! | running              | supervisor or VMM dies         | state error, with the reason    | the owner, at once; the folder stays until destroy |

pub(crate) mod adopt;
mod boot;
pub(crate) mod error;
pub(crate) mod owner;
pub(crate) mod resources;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wrenn_proto::{SandboxId, TemplateName, supervise::SupervisorSpec};

use crate::{envd_client::EnvdClient, folder::BootTimes, templates::Template};

pub(crate) use error::{CreateError, DestroyError, UseError};
pub(crate) use owner::{Start, spawn};

/// What was asked for, checked.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: SandboxId,
    pub(crate) template_name: TemplateName,
    pub(crate) template: Template,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: u32,
    pub(crate) timeout_sec: u32,
    pub(crate) egress: bool,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) created_unix_ms: i64,
}

/// What never changes about a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) id: SandboxId,
    pub(crate) template: TemplateName,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: u32,
    pub(crate) timeout_sec: u32,
    pub(crate) egress: bool,
    pub(crate) created_unix_ms: i64,
}

impl From<&Plan> for Facts {
    fn from(plan: &Plan) -> Self {
        Self {
            id: plan.id.clone(),
            template: plan.template_name.clone(),
            vcpus: plan.vcpus,
            memory_mib: plan.memory_mib,
            disk_mib: plan.disk_mib,
            timeout_sec: plan.timeout_sec,
            egress: plan.egress,
            created_unix_ms: plan.created_unix_ms,
        }
    }
}

impl From<&SupervisorSpec> for Facts {
    fn from(spec: &SupervisorSpec) -> Self {
        Self {
            id: spec.id.clone(),
            template: spec.template.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            timeout_sec: spec.timeout_sec,
            egress: spec.network.egress,
            created_unix_ms: spec.created_unix_ms,
        }
    }
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone)]
pub(crate) enum State {
    /// Being built, or its guest boots.
    Starting,
    /// It can be used.
    Running(Arc<Running>),
    /// Its machine is gone; for a user: why.
    Error { reason: String },
    /// It is being destroyed.
    Stopping,
}

/// What a running sandbox has for those who use it.
#[derive(Debug)]
pub(crate) struct Running {
    /// Its guest.
    pub(crate) envd: EnvdClient,
    /// Where the time of its boot went.
    pub(crate) boot: BootTimes,
    /// Cancelled when it runs no more: whoever waits for its guest stops waiting.
    pub(crate) gone: CancellationToken,
}

/// A destroy, and who waits for it.
pub(crate) type DestroyReply = oneshot::Sender<Result<(), DestroyError>>;

/// A sandbox, for everybody but its owner.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) facts: Facts,
    /// Known as soon as the slot is.
    host_ip: OnceLock<Ipv4Addr>,
    last_active_unix_ms: AtomicI64,
    state: Mutex<State>,
    /// To the owner.
    destroy: mpsc::UnboundedSender<DestroyReply>,
}

impl Sandbox {
    /// A sandbox that starts, and what its owner is asked by.
    pub(crate) fn new(
        facts: Facts,
        now_unix_ms: i64,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<DestroyReply>) {
        let (destroy, requests) = mpsc::unbounded_channel();
        let sandbox = Self {
            facts,
            host_ip: OnceLock::new(),
            last_active_unix_ms: AtomicI64::new(now_unix_ms),
            state: Mutex::new(State::Starting),
            destroy,
        };
        (Arc::new(sandbox), requests)
    }

    pub(crate) fn state(&self) -> State {
        // Only whole values are ever stored, so one of a thread that panicked is as good as any.
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_state(&self, state: State) {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = std::mem::replace(&mut *current, state);
        drop(current);
        if let State::Running(running) = left {
            running.gone.cancel();
        }
    }

    pub(crate) fn host_ip(&self) -> Option<Ipv4Addr> {
        self.host_ip.get().copied()
    }

    fn set_host_ip(&self, ip: Ipv4Addr) {
        // A second one could only be the same.
        let _ = self.host_ip.set(ip);
    }

    pub(crate) fn last_active_unix_ms(&self) -> i64 {
        self.last_active_unix_ms.load(Ordering::Relaxed)
    }

    /// Counts as use.
    pub(crate) fn touch(&self) {
        self.last_active_unix_ms
            .fetch_max(now_unix_ms(), Ordering::Relaxed);
    }

    /// Counts as use, if the sandbox can be used.
    pub(crate) fn use_now(&self) -> Result<Arc<Running>, UseError> {
        let State::Running(running) = self.state() else {
            return Err(self.unusable());
        };
        self.touch();
        Ok(running)
    }

    /// Why it cannot be used.
    pub(crate) fn unusable(&self) -> UseError {
        let id = self.facts.id.clone();
        match self.state() {
            // It has only just begun, or ended, to run.
            State::Starting | State::Running(_) => UseError::NotRunning(id, "starting"),
            State::Stopping => UseError::NotRunning(id, "being destroyed"),
            State::Error { reason } => UseError::Lost(id, reason),
        }
    }

    /// Frees all that the sandbox has and forgets it. Goes on when the caller goes away.
    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        let (reply, answer) = oneshot::channel();
        // An owner that is gone has freed everything already, or the agent ends.
        if self.destroy.send(reply).is_err() {
            return Err(DestroyError::Gone);
        }
        answer.await.unwrap_or(Err(DestroyError::Gone))
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
