//! Lifecycle of one sandbox on this host: its data, its states, and the operations that change
//! them.
//!
//! One task owns each sandbox, its actor ([`actor`]). Only the actor creates, frees or changes
//! anything of the sandbox, so lifecycle operations run one at a time, and no lock is held across
//! them. All other code uses a [`Sandbox`] to read data, to record activity, and to send commands
//! to the actor.
//!
//! The states and their transitions are in [`state_machine`]. A create fails as follows.
//!
//! | step of a create   | failure                  | caller sees         | resources freed by     |
//! |--------------------|--------------------------|---------------------|------------------------|
//! | admission          | too little memory, CPU   | resource_exhausted  | nothing created        |
//! |                    | or disk                  |                     |                        |
//! | directory          | name taken               | already_exists      | nothing created        |
//! | directory, disk,   | host's disk full         | resource_exhausted  | actor, at once         |
//! | spec               |                          |                     |                        |
//! | slot               | all taken                | resource_exhausted  | actor, at once         |
//! | network, cgroup    | kernel or nft refuses    | internal            | actor, at once         |
//! | supervisor         | exits, or is not ready   | internal, with its  | actor; the VMM dies    |
//! |                    | in time                  | last message        | with the supervisor    |
//! | guest              | supervisor exits         | internal, with its  | actor, at once         |
//! |                    |                          | last message        |                        |
//! | guest              | no answer in time        | deadline_exceeded   | actor, at once         |
//! | guest              | rejects its settings     | code of the guest   | actor, at once         |
//! |                    |                          | agent               |                        |
//! | any                | caller disconnects       | -                   | nothing freed: the     |
//! |                    |                          |                     | sandbox runs, the      |
//! |                    |                          |                     | caller destroys it     |
//! | any                | destroy                  | failed_precondition | actor, before destroy  |
//! |                    |                          | (for the create)    | is answered            |
//! | any                | agent shuts down         | unavailable         | actor; if the          |
//! |                    |                          |                     | supervisor runs, the   |
//! |                    |                          |                     | next agent adopts it   |
//! | before `spec.json` | agent killed             | connection lost     | next agent, when it    |
//! |                    |                          |                     | starts                 |
//! | after `spec.json`  | agent killed             | connection lost     | nothing freed: the     |
//! |                    |                          |                     | next agent adopts the  |
//! |                    |                          |                     | sandbox                |
//! | running            | supervisor or VMM dies   | state error, with   | actor, at once; the    |
//! |                    |                          | the reason          | directory by destroy   |
//!
//! Pause, snapshot and resume are described in `pause.rs`, and the states that the next agent may
//! find in `adopt.rs`.

pub(crate) mod actor;
pub(crate) mod adopt;
mod boot;
mod boot_watch;
mod boots;
mod compact;
pub(crate) mod error;
mod guest_dial;
mod hardware;
mod network;
mod pause;
mod pause_effort;
mod preparation;
mod recovery;
pub(crate) mod resources;
mod resume;
pub(crate) mod service;
mod state_machine;
mod tunnels;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rand::RngExt as _;
use thiserror_ext::AsReport as _;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use wrenn_envd_client::EnvdClient;
use wrenn_model::{CpuModel, MachineSize, SandboxId, TemplateName};
use wrenn_proto::supervise::{Accel, SupervisorSpec};

use crate::{
    network::egress::Access,
    sandbox_dir::BootTimes,
    snapshots::{ImageMemory, LocatedSnapshot, SnapshotRef},
    templates::Template,
};

pub(crate) use actor::{Start, spawn};
pub(crate) use boot_watch::Stall;
pub use boots::BootPolicy;
pub(crate) use boots::Boots;
pub(crate) use error::{CreateError, DestroyError, LifecycleError, UseError};
pub(crate) use pause_effort::PauseEffort;
pub(crate) use resume::ResumeFrom;
pub(crate) use state_machine::State;
use state_machine::{Event, transition};
pub(crate) use tunnels::{Tunnel, Tunnels};

/// Checked parameters of a create.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) id: SandboxId,
    pub(crate) template_name: TemplateName,
    pub(crate) source: Source,
    pub(crate) size: MachineSize,
    pub(crate) timeout_sec: u32,
    pub(crate) access: Access,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) created_unix_ms: i64,
    pub(crate) envd_token: GuestToken,
    /// Installation that the sandbox is created for; empty if the caller named none.
    pub(crate) installation: String,
}

/// Initial state of a VM.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// Kernel and root file system. The VM boots.
    Image(Template),
    /// Snapshot. The VM continues from it.
    Snapshot(Box<LocatedSnapshot>),
}

/// Immutable properties of a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct SandboxFacts {
    pub(crate) id: SandboxId,
    pub(crate) template: TemplateName,
    pub(crate) size: MachineSize,
    pub(crate) timeout_sec: u32,
    pub(crate) created_unix_ms: i64,
    pub(crate) envd_token: GuestToken,
}

/// Token that a guest agent requires from its clients. Chosen with the sandbox, constant for its
/// whole life, and never logged.
#[derive(Clone)]
pub(crate) struct GuestToken(String);

impl GuestToken {
    /// Returns a token of 256 random bits.
    pub(crate) fn random() -> Self {
        Self(hex::encode(rand::rng().random::<[u8; 32]>()))
    }

    /// Returns the text of the token.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for GuestToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GuestToken(..)")
    }
}

impl From<&Plan> for SandboxFacts {
    fn from(plan: &Plan) -> Self {
        Self {
            id: plan.id.clone(),
            template: plan.template_name.clone(),
            size: plan.size,
            timeout_sec: plan.timeout_sec,
            created_unix_ms: plan.created_unix_ms,
            envd_token: plan.envd_token.clone(),
        }
    }
}

impl From<&SupervisorSpec> for SandboxFacts {
    fn from(spec: &SupervisorSpec) -> Self {
        Self {
            id: spec.id.clone(),
            template: spec.template.clone(),
            size: spec.size,
            timeout_sec: spec.timeout_sec,
            created_unix_ms: spec.created_unix_ms,
            envd_token: GuestToken(spec.envd_token.clone()),
        }
    }
}

/// Data of a running sandbox, for the calls that use it.
#[derive(Debug)]
pub(crate) struct Running {
    /// Client of the guest agent.
    pub(crate) envd: EnvdClient,
    /// Durations of the phases of the boot.
    pub(crate) boot: BootTimes,
    /// CPU model of the VM.
    pub(crate) cpu: CpuModel,
    /// Execution mode of the VM. It may differ from the current setting.
    pub(crate) accel: Accel,
    /// Cancelled when the sandbox no longer runs. Calls that wait for its guest then end.
    pub(crate) gone: CancellationToken,
    /// Memory file of the snapshot that the VM was restored from. Held so that other VMs of the
    /// same snapshot share it.
    pub(crate) memory: Option<Arc<ImageMemory>>,
}

/// Command to an actor, with the channel for its reply.
#[derive(Debug)]
pub(crate) enum Command {
    /// Free everything and remove the sandbox.
    Destroy(Reply<(), DestroyError>),
    /// Take a snapshot, then end the VM and free its resources on the host.
    Pause(PauseEffort, Reply<(), LifecycleError>),
    /// Resume the sandbox.
    Resume(ResumeFrom, Reply<(), LifecycleError>),
    /// Take a snapshot. The sandbox keeps running.
    Snapshot(Reply<SnapshotRef, LifecycleError>),
    /// Change the addresses that the sandbox may reach.
    SetAccess(Access, Reply<(), LifecycleError>),
}

impl Command {
    /// Rejects a command that is not possible now.
    fn reject(self, why: &LifecycleError) {
        let why = LifecycleError::Again(why.to_string());
        // The caller may be gone.
        let _ = match self {
            Self::Destroy(reply) => reply.send(Err(DestroyError::Gone)).is_ok(),
            Self::Pause(_, reply) | Self::Resume(_, reply) | Self::SetAccess(_, reply) => {
                reply.send(Err(why)).is_ok()
            }
            Self::Snapshot(reply) => reply.send(Err(why)).is_ok(),
        };
    }
}

type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// Handle of a sandbox, for all code except its actor.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) facts: SandboxFacts,
    /// Address of the guest as seen from the host. Known while the sandbox has a slot, and another
    /// one after each resume.
    host_ip: Mutex<Option<Ipv4Addr>>,
    last_active_unix_ms: AtomicI64,
    state: Mutex<State>,
    /// Addresses that the sandbox may reach.
    access: Mutex<Access>,
    /// Installation that owns the sandbox; empty if none is known.
    installation: Mutex<String>,
    /// Last lifecycle step that failed and changed nothing, for the user.
    warning: Mutex<String>,
    /// Cancelled when a destroy is requested. The operation in progress then gives way to it.
    destroy_requested: Mutex<CancellationToken>,
    /// Cancelled once the VM of an adopted sandbox is examined. Cancelled at once for a new
    /// sandbox.
    examined: CancellationToken,
    /// Connections from outside to ports of the guest.
    pub(crate) tunnels: Tunnels,
    /// Connections of the agent itself to the guest agent.
    guest_connections: Arc<Tunnels>,
    /// Mailbox of the actor.
    mailbox: mpsc::UnboundedSender<Command>,
}

/// Maximum time that a call waits for the examination of an adopted sandbox. Below the time that a
/// control plane waits for a tunnel.
const EXAMINATION_WAIT: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Returns the handle of a sandbox that starts, and the receiver for its actor's mailbox.
    pub(crate) fn new(
        facts: SandboxFacts,
        access: Access,
        installation: String,
        now_unix_ms: i64,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Command>) {
        let (mailbox, requests) = mpsc::unbounded_channel();
        let sandbox = Self {
            facts,
            host_ip: Mutex::default(),
            last_active_unix_ms: AtomicI64::new(now_unix_ms),
            state: Mutex::new(State::Starting),
            access: Mutex::new(access),
            installation: Mutex::new(installation),
            warning: Mutex::default(),
            destroy_requested: Mutex::default(),
            examined: CancellationToken::new(),
            tunnels: Tunnels::default(),
            guest_connections: Arc::default(),
            mailbox,
        };
        (Arc::new(sandbox), requests)
    }

    /// Closes all connections to the guest, and waits until they are closed.
    async fn end_connections(&self) {
        tokio::join!(self.tunnels.end_all(), self.guest_connections.end_all());
    }

    pub(crate) fn state(&self) -> State {
        // Only complete values are stored, so the value is valid even if a thread panicked while it
        // held the lock.
        self.state.lock().clone()
    }

    /// Changes the state as the event requires. Calls that wait for the guest end when the state
    /// has no VM any more. During a pause they do not end yet, because the guest may keep running.
    ///
    /// An event that is not valid in the current state is an error of this program. It is logged,
    /// and the state stays the same.
    fn apply(&self, event: Event) {
        let mut current = self.state.lock();
        let next = match transition(current.clone(), event) {
            Ok(next) => next,
            Err(error) => {
                drop(current);
                tracing::error!(sandbox_id = %self.facts.id, error = error.to_report_string(), "event rejected");
                return;
            }
        };
        let left = std::mem::replace(&mut *current, next.clone());
        drop(current);
        if !matches!(next, State::Starting) {
            self.note_examined();
        }
        if let (Some(running), None) = (left.vm(), next.vm()) {
            running.gone.cancel();
        }
    }

    /// Notes that the state of the sandbox's VM is known.
    fn note_examined(&self) {
        self.examined.cancel();
    }

    /// Waits until the VM of an adopted sandbox is examined. Returns at once for any other sandbox,
    /// and in time if the VM's supervisor does not answer.
    pub(crate) async fn until_examined(&self) {
        let _ = tokio::time::timeout(EXAMINATION_WAIT, self.examined.cancelled()).await;
    }

    pub(crate) fn host_ip(&self) -> Option<Ipv4Addr> {
        *self.host_ip.lock()
    }

    fn set_host_ip(&self, ip: Option<Ipv4Addr>) {
        *self.host_ip.lock() = ip;
    }

    /// Returns the addresses that the sandbox may reach.
    pub(crate) fn access(&self) -> Access {
        let access = self.access.lock();
        access.clone()
    }

    fn note_access(&self, access: Access) {
        *self.access.lock() = access;
    }

    /// Returns the installation that owns the sandbox; empty if none is known.
    pub(crate) fn installation(&self) -> String {
        let installation = self.installation.lock();
        installation.clone()
    }

    /// Changes the installation that owns the sandbox, in memory only.
    pub(crate) fn set_installation(&self, id: String) {
        *self.installation.lock() = id;
    }

    /// Returns the last lifecycle step that failed and changed nothing; empty if the last one
    /// succeeded.
    pub(crate) fn warning(&self) -> String {
        let warning = self.warning.lock();
        warning.clone()
    }

    fn set_warning(&self, text: String) {
        *self.warning.lock() = text;
    }

    pub(crate) fn last_active_unix_ms(&self) -> i64 {
        self.last_active_unix_ms.load(Ordering::Relaxed)
    }

    /// Records activity.
    pub(crate) fn touch(&self) {
        self.last_active_unix_ms
            .fetch_max(now_unix_ms(), Ordering::Relaxed);
    }

    /// Records activity and returns the data of the running sandbox. Fails if the sandbox does not
    /// run.
    pub(crate) fn touch_running(&self) -> Result<Arc<Running>, UseError> {
        let State::Running(running) = self.state() else {
            return Err(self.unusable());
        };
        self.touch();
        Ok(running)
    }

    /// Returns the reason why the sandbox cannot be used.
    pub(crate) fn unusable(&self) -> UseError {
        let id = self.facts.id.clone();
        match self.state() {
            // For `Running`: the state changed after the caller read it.
            State::Starting | State::Running(_) => UseError::NotRunning(id, "starting"),
            State::Stopping => UseError::NotRunning(id, "being destroyed"),
            State::Pausing(_) => UseError::NotRunning(id, "being paused"),
            State::Paused => UseError::NotRunning(id, "paused"),
            State::Resuming(_) => UseError::NotRunning(id, "being resumed"),
            State::Error { reason } => UseError::Lost(id, reason),
        }
    }

    /// Frees everything that belongs to the sandbox and removes it. Like the operations below,
    /// continues if the caller disconnects. An operation in progress is aborted.
    pub(crate) async fn destroy(&self) -> Result<(), DestroyError> {
        self.destroy_requested().cancel();
        self.ask(Command::Destroy)
            .await
            .unwrap_or(Err(DestroyError::Gone))
    }

    /// Returns the token that a request to destroy the sandbox cancels.
    fn destroy_requested(&self) -> CancellationToken {
        let requested = self.destroy_requested.lock();
        requested.clone()
    }

    /// Forgets the request to destroy the sandbox, because the destroy failed.
    fn reset_destroy_request(&self) {
        *self.destroy_requested.lock() = CancellationToken::new();
    }

    /// Runs a step that waits for a guest, a supervisor or a disk, unless a destroy is requested
    /// before or meanwhile. The destroy frees everything that the aborted step leaves behind.
    async fn unless_destroyed<T>(
        &self,
        step: impl Future<Output = Result<T, LifecycleError>>,
    ) -> Result<T, LifecycleError> {
        let requested = self.destroy_requested();
        tokio::select! {
            biased;
            () = requested.cancelled() => Err(LifecycleError::Destroyed),
            done = step => done,
        }
    }

    /// Takes a snapshot, then ends the VM and frees its resources on the host.
    pub(crate) async fn pause(&self, effort: PauseEffort) -> Result<(), LifecycleError> {
        self.ask(|reply| Command::Pause(effort, reply))
            .await
            .unwrap_or(Err(LifecycleError::Gone))
    }

    /// Resumes the sandbox.
    pub(crate) async fn resume(&self, from: ResumeFrom) -> Result<(), LifecycleError> {
        self.ask(|reply| Command::Resume(from, reply))
            .await
            .unwrap_or(Err(LifecycleError::Gone))
    }

    /// Takes a snapshot. The sandbox keeps running.
    pub(crate) async fn snapshot(&self) -> Result<SnapshotRef, LifecycleError> {
        self.ask(Command::Snapshot)
            .await
            .unwrap_or(Err(LifecycleError::Gone))
    }

    /// Changes the addresses that the sandbox may reach, at once or from its next resume on.
    pub(crate) async fn set_access(&self, access: Access) -> Result<(), LifecycleError> {
        self.ask(|reply| Command::SetAccess(access, reply))
            .await
            .unwrap_or(Err(LifecycleError::Gone))
    }

    /// Sends a command to the actor and returns the reply. `None` if the actor has ended, because
    /// everything is freed or the agent is shutting down.
    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(ask(reply)).ok()?;
        answer.await.ok()
    }
}

/// Returns the current time in milliseconds since 1970.
pub(crate) fn now_unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
