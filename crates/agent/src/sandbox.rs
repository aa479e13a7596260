//! One sandbox: what it is, in which state, and who may change that.
//!
//! A task owns each sandbox ([`owner`]) and is the only one that builds, frees or changes it, so there is one lifecycle
//! operation at a time and no lock to hold across it. Everybody else has a [`Sandbox`]: reads, counts use, and asks the
//! owner to destroy.
//!
//! ```text
//!              boot done                     supervisor gone
//!  Starting ──────────────► Running ───────────────────────────► Error(reason)
//!                            │  ▲ ▲                                  │
//!                      pause │  │ └──────── a step failed             │ resume, if it
//!                            ▼  │                   │                │ was frozen once
//!                         Pausing ──────────────────┘                │
//!                            │ the snapshot is in its place          │
//!                            ▼             resume                    │
//!                         Paused ─────────────────────► Resuming ◄───┘
//!                            ▲                          │   │ guest answers
//!                            └──────────────────────────┘   └──────► Running
//!                                   a step failed
//!
//!  any of them ── destroy ──► Stopping ── all is freed ──► forgotten
//!                                └─ what could not be freed ──► Error(reason), destroy again
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
//!
//! Pausing and freezing: `freeze.rs`. What stands at which moment, and what the next agent makes of it: `adopt.rs`.

pub(crate) mod adopt;
mod boot;
mod boot_watch;
mod boots;
mod compact;
pub(crate) mod error;
mod freeze;
mod network;
pub(crate) mod owner;
mod recovery;
pub(crate) mod resources;
mod tunnels;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use rand::RngExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wrenn_proto::{SandboxId, TemplateName, supervise::SupervisorSpec};

use crate::{
    envd_client::EnvdClient,
    folder::BootTimes,
    network::access::Access,
    snapshots::{ImageMemory, Moment, PinnedBuild},
    templates::Template,
};

pub(crate) use boot_watch::Stall;
pub use boots::BootPolicy;
pub(crate) use boots::Boots;
pub(crate) use error::{CreateError, DestroyError, FreezeError, UseError};
pub(crate) use owner::{Start, spawn};
pub(crate) use tunnels::{Tunnel, Tunnels};

/// What was asked for, checked.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: SandboxId,
    pub(crate) template_name: TemplateName,
    pub(crate) source: Source,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_mib: u32,
    pub(crate) timeout_sec: u32,
    pub(crate) access: Access,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) created_unix_ms: i64,
    pub(crate) envd_token: GuestToken,
    /// Installation that the sandbox is created for; empty if the caller named none.
    pub(crate) installation: String,
}

/// What a machine begins with.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// A kernel and a root file system: it boots.
    Image(Template),
    /// A frozen moment: it goes on from there.
    Moment(Box<Moment>),
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
    pub(crate) created_unix_ms: i64,
    pub(crate) envd_token: GuestToken,
}

/// What a guest agent asks of its clients. Given with the sandbox and the same for its whole life; never in a log.
#[derive(Clone)]
pub(crate) struct GuestToken(String);

impl GuestToken {
    /// 256 random bits.
    pub(crate) fn random() -> Self {
        Self(hex::encode(rand::rng().random::<[u8; 32]>()))
    }

    /// The token itself.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for GuestToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GuestToken(..)")
    }
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
            created_unix_ms: plan.created_unix_ms,
            envd_token: plan.envd_token.clone(),
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
            created_unix_ms: spec.created_unix_ms,
            envd_token: GuestToken(spec.envd_token.clone()),
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
    /// It is being frozen and will be given up; if that fails it runs on.
    Pausing(Arc<Running>),
    /// It is files and nothing else.
    Paused,
    /// It is being brought back; if that fails it is paused again.
    Resuming,
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
    /// The shared memory of the image that it was restored from; held so that others of the same image find it.
    pub(crate) memory: Option<Arc<ImageMemory>>,
    /// Connections from outside to ports of the guest.
    pub(crate) tunnels: Tunnels,
}

/// What of its last moment a sandbox is brought back from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResumeFrom {
    /// All of it: it goes on where it stood.
    Memory,
    /// Its disk alone: it boots, as after a loss of power.
    Disk,
}

/// What an owner can be asked, and where the answer goes.
#[derive(Debug)]
pub(crate) enum Ask {
    /// Free everything and forget it.
    Destroy(Reply<(), DestroyError>),
    /// Save it and give back what it has on the host.
    Pause(Reply<(), FreezeError>),
    /// Bring it back.
    Resume(ResumeFrom, Reply<(), FreezeError>),
    /// Freeze this moment; it goes on as it was.
    Freeze(Reply<PinnedBuild, FreezeError>),
    /// Change what it may reach.
    SetAccess(Access, Reply<(), FreezeError>),
}

type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// A sandbox, for everybody but its owner.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) facts: Facts,
    /// Known while it has a slot; another one after each resume.
    host_ip: Mutex<Option<Ipv4Addr>>,
    last_active_unix_ms: AtomicI64,
    state: Mutex<State>,
    /// What of the world it may reach.
    access: Mutex<Access>,
    /// Installation that owns the sandbox; empty if none is known.
    installation: Mutex<String>,
    /// The last lifecycle step that failed and changed nothing; for a user.
    warning: Mutex<String>,
    /// To the owner.
    asks: mpsc::UnboundedSender<Ask>,
}

impl Sandbox {
    /// A sandbox that starts, and what its owner is asked by.
    pub(crate) fn new(
        facts: Facts,
        access: Access,
        installation: String,
        now_unix_ms: i64,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Ask>) {
        let (asks, requests) = mpsc::unbounded_channel();
        let sandbox = Self {
            facts,
            host_ip: Mutex::default(),
            last_active_unix_ms: AtomicI64::new(now_unix_ms),
            state: Mutex::new(State::Starting),
            access: Mutex::new(access),
            installation: Mutex::new(installation),
            warning: Mutex::default(),
            asks,
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

    /// Calls that wait for the guest end when it leaves `Running` for good: not while it is being frozen, for it may run on.
    fn set_state(&self, state: State) {
        let keeps = matches!(&state, State::Running(_) | State::Pausing(_));
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = std::mem::replace(&mut *current, state);
        drop(current);
        if let State::Running(running) | State::Pausing(running) = left
            && !keeps
        {
            running.gone.cancel();
        }
    }

    pub(crate) fn host_ip(&self) -> Option<Ipv4Addr> {
        *self.host_ip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_host_ip(&self, ip: Option<Ipv4Addr>) {
        *self.host_ip.lock().unwrap_or_else(PoisonError::into_inner) = ip;
    }

    /// What of the world it may reach.
    pub(crate) fn access(&self) -> Access {
        let access = self.access.lock();
        access.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_access(&self, access: Access) {
        *self.access.lock().unwrap_or_else(PoisonError::into_inner) = access;
    }

    /// Installation that owns the sandbox; empty if none is known.
    pub(crate) fn installation(&self) -> String {
        let installation = self.installation.lock();
        installation.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the installation that owns the sandbox, in memory only.
    pub(crate) fn set_installation(&self, id: String) {
        *self
            .installation
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// The last lifecycle step that failed and changed nothing; empty if the last one succeeded.
    pub(crate) fn warning(&self) -> String {
        let warning = self.warning.lock();
        warning.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_warning(&self, text: String) {
        *self.warning.lock().unwrap_or_else(PoisonError::into_inner) = text;
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
            State::Pausing(_) => UseError::NotRunning(id, "being paused"),
            State::Paused => UseError::NotRunning(id, "paused"),
            State::Resuming => UseError::NotRunning(id, "being resumed"),
            State::Error { reason } => UseError::Lost(id, reason),
        }
    }

    /// Frees all that the sandbox has and forgets it. Goes on when the caller goes away, as all that follows.
    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        self.ask(Ask::Destroy)
            .await
            .unwrap_or(Err(DestroyError::Gone))
    }

    /// Saves it and gives back what it has on the host.
    pub(crate) async fn pause(&self) -> Result<(), FreezeError> {
        self.ask(Ask::Pause).await.unwrap_or(Err(FreezeError::Gone))
    }

    /// Brings it back.
    pub(crate) async fn resume(&self, from: ResumeFrom) -> Result<(), FreezeError> {
        self.ask(|reply| Ask::Resume(from, reply))
            .await
            .unwrap_or(Err(FreezeError::Gone))
    }

    /// Freezes this moment; it goes on as it was.
    pub(crate) async fn freeze(&self) -> Result<PinnedBuild, FreezeError> {
        self.ask(Ask::Freeze)
            .await
            .unwrap_or(Err(FreezeError::Gone))
    }

    /// Changes what it may reach, now or from its resume on.
    pub(crate) async fn set_access(&self, access: Access) -> Result<(), FreezeError> {
        self.ask(|reply| Ask::SetAccess(access, reply))
            .await
            .unwrap_or(Err(FreezeError::Gone))
    }

    /// `None` if the owner is gone: it has freed everything already, or the agent ends.
    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.asks.send(ask(reply)).ok()?;
        answer.await.ok()
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
