//! Actor of a sandbox: the task that owns the sandbox, from its create or adoption to its end.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::FutureExt as _;
use thiserror_ext::AsReport as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_proto::supervise::SupervisorSpec;

use super::{
    Command, Plan, Reply, Running, Sandbox, State,
    boot::{Abort, Attempt, Boot},
    compact::Compaction,
    error::{CreateError, DestroyError, LifecycleError},
    recovery::{Recovery, recover_later},
    resources::{HostContext, Resources},
    state_machine::{Event, Loss},
};
use crate::{
    cgroup::Limits, memory_ledger::MemoryReservation, registry::Registry, sandbox_dir::SandboxDir,
    snapshots::SnapshotRef, supervisor::final_reason,
};

/// Interval at which resources are freed that could not be freed before, such as a process that did
/// not end when it was killed.
const FREE_INTERVAL: Duration = Duration::from_secs(30);

/// Channel to a caller that waits for a destroy.
type DestroyReply = Reply<(), DestroyError>;

/// Start of an actor.
pub(crate) enum Start {
    /// The sandbox is created. The outcome is sent to `made`.
    Create {
        plan: Box<Plan>,
        memory: MemoryReservation,
        made: oneshot::Sender<Result<(), CreateError>>,
    },
    /// The sandbox was left by an earlier agent.
    Adopted(Box<Adopted>),
}

/// Sandbox that an agent found when it started, as its directory describes it.
pub(crate) struct Adopted {
    pub(super) resources: Resources,
    pub(super) sandbox_dir: SandboxDir,
    pub(super) spec: Box<SupervisorSpec>,
    /// True if the sandbox does not run, according to its last snapshot.
    pub(super) is_paused: bool,
    /// Snapshot that the VM was restored from, and last snapshot of the sandbox.
    pub(super) pins: Pins,
}

/// Snapshots that a sandbox depends on. They are not removed as long as they are held here.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// Snapshot that the VM was restored from.
    pub(super) origin: Option<SnapshotRef>,
    /// Snapshot that the sandbox can be resumed from.
    pub(super) last: Option<SnapshotRef>,
}

/// State in which an agent found the VM of a sandbox.
pub(super) enum AdoptedMachine {
    /// The VM runs, and its guest has answered once.
    Running(Box<Running>),
    /// The guest has answered once, but the VM is paused, or its supervisor does not answer: an
    /// agent was killed during a snapshot.
    Interrupted(Box<Running>),
    /// The VM runs. The guest has not answered yet.
    Booting,
    /// The sandbox is paused and consists of files only. Other resources that are left of its VM
    /// must be freed.
    Paused,
    /// The VM is gone. Contains the reason, for the user.
    Lost(String),
}

/// Data shared by all actors.
#[derive(Clone)]
pub(crate) struct SandboxActors {
    pub(crate) host: Arc<HostContext>,
    pub(crate) registry: Arc<Registry>,
    /// Cancelled when the agent shuts down. The actors then end and leave their VMs running.
    pub(crate) shutdown: CancellationToken,
    /// Tasks of all actors, so that the agent can wait for them.
    pub(crate) tasks: TaskTracker,
    /// True while a collection of snapshots waits for its turn.
    pub(crate) collection_waits: Arc<AtomicBool>,
}

impl SandboxActors {
    /// Removes in the background the snapshots that are no longer referenced, neither by an actor
    /// nor by the directory of a sandbox. Calls before a waiting collection begins share it.
    pub(crate) fn collect_snapshots(&self) {
        if self.collection_waits.swap(true, Ordering::SeqCst) {
            return;
        }
        let waits = self.collection_waits.clone();
        let (host, shutdown) = (self.host.clone(), self.shutdown.clone());
        let kept = move |host: &HostContext| {
            let noted = host.sandbox_dirs.last_snapshots();
            let noted = noted.inspect_err(|error| {
                tracing::warn!(
                    error = error.to_report_string(),
                    "snapshot collection skipped"
                );
            });
            // An agent that shuts down drops its actors and their references. The sandboxes stay,
            // and the snapshots that they depend on must stay too.
            let noted = noted.ok().filter(|_| !shutdown.is_cancelled())?;
            Some(
                noted
                    .iter()
                    .filter_map(|last| last.build.parse().ok())
                    .collect(),
            )
        };
        self.tasks.spawn_blocking(move || {
            waits.store(false, Ordering::SeqCst);
            host.snapshots.collect(|| kept(&host))
        });
    }
}

/// Starts the actor of a sandbox, which must already be in the registry.
pub(crate) fn spawn(
    actors: &SandboxActors,
    sandbox: Arc<Sandbox>,
    mailbox: mpsc::UnboundedReceiver<Command>,
    start: Start,
) {
    let resources = Resources::none(sandbox.facts.id.clone());
    let mut actor = SandboxActor {
        lost: None,
        kept_memory: None,
        compaction: None,
        copying: Arc::default(),
        recovery: None,
        actors: actors.clone(),
        sandbox,
        resources,
        pins: Pins::default(),
        mailbox,
        resumes: Vec::new(),
    };
    actors.tasks.spawn(async move {
        // `resources` is accurate at every await point, so the actor can still free everything
        // after a panic.
        let first = AssertUnwindSafe(actor.run(start)).catch_unwind().await;
        if first.is_err() {
            let recover = AssertUnwindSafe(actor.recover()).catch_unwind().await;
            if recover.is_err() {
                tracing::error!("sandbox actor panicked twice, clean-up left to the next agent");
            }
        }
    });
}

pub(super) struct SandboxActor {
    pub(super) actors: SandboxActors,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) resources: Resources,
    pub(super) pins: Pins,
    mailbox: mpsc::UnboundedReceiver<Command>,
    /// Callers that wait for the sandbox to run.
    pub(super) resumes: Vec<Reply<(), LifecycleError>>,
    /// Memory of the VM while it is paused and resumed in one step.
    pub(super) kept_memory: Option<MemoryReservation>,
    /// Reason for a loss of the VM since the last snapshot.
    pub(super) lost: Option<String>,
    /// Compaction of the last snapshot's chain, if one is in progress.
    pub(super) compaction: Option<Compaction>,
    /// Held while a snapshot of the running sandbox is compacted for its caller.
    pub(super) copying: Arc<tokio::sync::Mutex<()>>,
    /// Repeated notification of a guest that did not recover after its preparation for a snapshot.
    pub(super) recovery: Option<Recovery>,
}

/// Next step of an actor.
pub(super) enum Step {
    /// Watch the VM.
    Watch,
    /// There is no VM: wait for a resume or a destroy.
    Wait,
    /// Free everything, then answer the callers.
    Destroy(Vec<DestroyReply>),
    /// The actor ends: the sandbox is destroyed, or left to the next agent.
    End,
}

impl SandboxActor {
    #[tracing::instrument(name = "sandbox", skip_all, fields(sandbox_id = %self.sandbox.facts.id))]
    async fn run(&mut self, start: Start) {
        let next = match start {
            Start::Create { plan, memory, made } => {
                self.resources.memory = Some(memory);
                self.create(&plan, made).await
            }
            Start::Adopted(adopted) => self.adopt(*adopted).await,
        };
        self.run_steps(next).await;
    }

    /// Frees everything after a panic. The panic itself is reported by its own message.
    async fn recover(&mut self) {
        let reason = "internal error of the host agent; see its log".to_owned();
        let next = self.fall_back(Event::ActorPanicked, reason).await;
        self.run_steps(next).await;
    }

    async fn run_steps(&mut self, mut next: Step) {
        loop {
            next = match next {
                Step::Watch => self.watch().await,
                Step::Wait => self.wait().await,
                Step::Destroy(replies) => self.destroy(replies).await,
                Step::End => return,
            };
        }
    }

    async fn create(
        &mut self,
        plan: &Plan,
        made: oneshot::Sender<Result<(), CreateError>>,
    ) -> Step {
        self.sandbox.note_examined();
        let (outcome, mut replies) = self.boot(async |boot| boot.run(plan).await).await;
        let error = match outcome {
            Ok(running) if replies.is_empty() => {
                self.sandbox.touch();
                self.sandbox.set_warning(self.obstacle().await);
                self.resources.note_started();
                self.sandbox.apply(Event::CreateDone(Arc::new(running)));
                self.answer_resumes(Ok(()));
                // If the caller has disconnected, the reply has no receiver, and the sandbox keeps
                // running.
                let _ = made.send(Ok(()));
                return Step::Watch;
            }
            Ok(_) => CreateError::Destroyed,
            Err(CreateError::ShuttingDown)
                if self.resources.supervisor.is_some() && replies.is_empty() =>
            {
                tracing::info!("booting sandbox left to the next agent");
                let _ = made.send(Err(CreateError::ShuttingDown));
                return Step::End;
            }
            Err(error) => error,
        };
        tracing::warn!(
            error = error.to_report_string(),
            "failed to create the sandbox"
        );
        self.sandbox.apply(Event::CreateFailed);
        let has_failed = !matches!(error, CreateError::Destroyed | CreateError::ShuttingDown);
        let freed = self.free_all(has_failed).await;
        if freed.is_ok() {
            self.forget();
        }
        self.answer_resumes(Err(LifecycleError::Gone));
        let _ = made.send(Err(error));
        self.drain_mailbox(&mut replies);
        self.answer_destroys(freed, replies)
    }

    /// Returns a warning if another firewall of the host blocks the sandbox's traffic; otherwise
    /// empty.
    pub(super) async fn obstacle(&self) -> String {
        let network = &self.actors.host.network;
        let obstacle = network.obstacle(&self.sandbox.access()).await;
        obstacle.map_or_else(String::new, |obstacle| {
            format!("the sandbox has no network access: {obstacle}")
        })
    }

    async fn adopt(&mut self, adopted: Adopted) -> Step {
        let Adopted {
            resources,
            sandbox_dir,
            spec,
            is_paused,
            pins,
        } = adopted;
        self.resources = resources;
        self.pins = pins;
        self.sandbox.set_host_ip(Some(spec.network.host_ip));
        let shutdown = self.actors.shutdown.clone();
        let examined = tokio::select! {
            examined = self.examine(&sandbox_dir, &spec, is_paused) => examined,
            () = shutdown.cancelled() => return Step::End,
        };
        let Ok(machine) = examined else {
            return self.await_destroy().await;
        };
        self.sandbox.set_warning(String::new());
        self.adopt_machine(machine, &sandbox_dir, &spec).await
    }

    async fn adopt_machine(
        &mut self,
        machine: AdoptedMachine,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
    ) -> Step {
        let limits = Limits::for_guest(spec.size);
        match machine {
            AdoptedMachine::Running(running) => {
                // The earlier agent may have died right after the boot.
                let cgroups = &self.actors.host.cgroups;
                cgroups.set_booting(&spec.id, limits, false);
                // The earlier agent may also have died after it prepared the guest for a snapshot.
                self.recovery = Some(recover_later(&running));
                self.sandbox.apply(Event::FoundRunning(Arc::new(*running)));
                Step::Watch
            }
            AdoptedMachine::Interrupted(running) => self.recover_interrupted(running.into()).await,
            AdoptedMachine::Lost(reason) => self.on_vm_lost(reason).await,
            AdoptedMachine::Paused => {
                self.warn_if_unloadable();
                self.enter_paused(Event::FoundPaused).await
            }
            AdoptedMachine::Booting => {
                self.sandbox.note_examined();
                let (outcome, replies) = self
                    .boot(async |boot| {
                        boot.boot_from_disk(sandbox_dir, spec, Attempt::Adopted)
                            .await
                    })
                    .await;
                match outcome {
                    _ if !replies.is_empty() => Step::Destroy(replies),
                    Ok(running) => {
                        self.sandbox.apply(Event::CreateDone(Arc::new(running)));
                        Step::Watch
                    }
                    Err(CreateError::ShuttingDown) => Step::End,
                    Err(error) => self.on_vm_lost(error.to_report_string()).await,
                }
            }
        }
    }

    /// Boots or restores the VM while receiving commands. A destroy aborts the boot.
    pub(super) async fn boot(
        &mut self,
        work: impl AsyncFnOnce(&mut Boot<'_>) -> Result<Running, CreateError>,
    ) -> (Result<Running, CreateError>, Vec<DestroyReply>) {
        let abort = Abort {
            destroyed: CancellationToken::new(),
            shutdown: self.actors.shutdown.clone(),
        };
        let mut boot = Boot {
            host: &self.actors.host,
            sandbox: &self.sandbox,
            resources: &mut self.resources,
            pins: &mut self.pins,
            abort: abort.clone(),
            began: Instant::now(),
        };
        let mut replies = Vec::new();
        let mut work = std::pin::pin!(work(&mut boot));
        loop {
            tokio::select! {
                outcome = &mut work => return (outcome, replies),
                Some(command) = self.mailbox.recv() => match command {
                    Command::Destroy(reply) => {
                        replies.push(reply);
                        abort.destroyed.cancel();
                    }
                    Command::Resume(_, reply) => self.resumes.push(reply),
                    other => other.reject(&LifecycleError::NotNow("starting")),
                },
            }
        }
    }

    /// Watches a running VM until the VM is gone or a command arrives.
    async fn watch(&mut self) -> Step {
        let Some(supervisor) = &self.resources.supervisor else {
            return self
                .on_vm_lost("the supervisor process is gone".to_owned())
                .await;
        };
        let command = tokio::select! {
            () = supervisor.gone() => None,
            compacted = Self::compacted(&mut self.compaction) => {
                self.move_to_compacted(compacted);
                return Step::Watch;
            }
            Some(command) = self.mailbox.recv() => Some(command),
            () = self.actors.shutdown.cancelled() => return Step::End,
        };
        match command {
            Some(Command::Destroy(reply)) => Step::Destroy(vec![reply]),
            Some(Command::Pause(effort, reply)) => self.pause(effort, reply).await,
            Some(Command::Snapshot(reply)) => self.snapshot(reply).await,
            Some(Command::SetAccess(access, reply)) => {
                let _ = reply.send(self.set_access(access).await);
                Step::Watch
            }
            Some(Command::Resume(_, reply)) => {
                let _ = reply.send(Ok(()));
                Step::Watch
            }
            None => self.on_machine_gone().await,
        }
    }

    /// Waits for the destroy that has aborted the operation in progress.
    pub(super) async fn await_destroy(&mut self) -> Step {
        while let Some(command) = self.mailbox.recv().await {
            match command {
                Command::Destroy(reply) => return Step::Destroy(vec![reply]),
                other => other.reject(&LifecycleError::Destroyed),
            }
        }
        Step::End
    }

    /// Handles the end of the supervisor, which is also the end of the VM.
    pub(super) async fn on_machine_gone(&mut self) -> Step {
        self.resources.supervisor = None;
        let reason = match &self.resources.sandbox_dir {
            Some(sandbox_dir) => final_reason(sandbox_dir),
            None => "the supervisor process is gone".to_owned(),
        };
        self.on_vm_lost(reason).await
    }

    /// Handles the loss of the VM. Frees everything except the directory at once; a destroy retries
    /// resources that could not be freed. If the sandbox has a snapshot, it is paused at that
    /// snapshot; otherwise it cannot be resumed.
    pub(super) async fn on_vm_lost(&mut self, reason: String) -> Step {
        self.fall_back(Event::VmLost, reason).await
    }

    /// Enters the state after a loss, which `event` reports.
    async fn fall_back(&mut self, event: impl FnOnce(Loss) -> Event, reason: String) -> Step {
        tracing::warn!(reason, "VM lost");
        let event = event(Loss {
            reason: reason.clone(),
            has_snapshot: self.pins.last.is_some(),
        });
        if let Some(last) = self.pins.last.clone() {
            // If the record cannot be written, the next agent finds that the VM is gone and takes
            // the same path.
            let _ = self.note_paused(&last);
            let warning =
                format!("the VM was lost ({reason}); the sandbox is paused at its last snapshot");
            self.sandbox.set_warning(warning);
            self.lost = Some(reason);
            return self.enter_paused(event).await;
        }
        self.sandbox.apply(event);
        // The failure is logged where it occurs, and the first reason remains the one shown to the
        // user.
        let _ = self.free().await;
        Step::Wait
    }

    /// Waits while the sandbox is paused or in error, until it is resumed or destroyed. Resources
    /// that could not be freed are freed as soon as that is possible.
    async fn wait(&mut self) -> Step {
        let command = tokio::select! {
            Some(command) = self.mailbox.recv() => command,
            () = tokio::time::sleep(FREE_INTERVAL), if self.resources.are_left() => {
                let _ = self.free().await;
                if matches!(self.sandbox.state(), State::Paused) {
                    self.begin_compaction();
                }
                return Step::Wait;
            }
            compacted = Self::compacted(&mut self.compaction) => {
                self.move_to_compacted(compacted);
                return Step::Wait;
            }
            () = self.actors.shutdown.cancelled() => return Step::End,
        };
        match command {
            Command::Destroy(reply) => return Step::Destroy(vec![reply]),
            Command::Resume(from, reply) => {
                self.resumes.push(reply);
                return self.resume(from).await;
            }
            Command::Pause(_, reply) => {
                let _ = reply.send(match self.sandbox.state() {
                    State::Paused => Ok(()),
                    _ => Err(LifecycleError::NotNow("lost")),
                });
            }
            // A VMM that could not be ended may still write to the layers of the last snapshot.
            Command::Snapshot(reply) if self.resources.are_left() => {
                let left =
                    LifecycleError::NotNow("paused, and its virtual machine is not gone yet");
                let _ = reply.send(Err(left));
            }
            Command::Snapshot(reply) => {
                let _ = reply.send(match (self.sandbox.state(), &self.pins.last) {
                    (State::Paused, Some(last)) => Ok(last.clone()),
                    _ => Err(LifecycleError::NotNow("lost")),
                });
            }
            Command::SetAccess(access, reply) => {
                let _ = reply.send(match self.sandbox.state() {
                    State::Paused => self.set_access(access).await,
                    _ => Err(LifecycleError::NotNow("lost")),
                });
            }
        }
        Step::Wait
    }

    async fn destroy(&mut self, mut replies: Vec<DestroyReply>) -> Step {
        let has_failed = self.lost.is_some() || matches!(self.sandbox.state(), State::Error { .. });
        self.sandbox.apply(Event::DestroyBegun);
        let freed = self.free_all(has_failed).await;
        if freed.is_ok() {
            tracing::info!("sandbox destroyed");
            self.forget();
        }
        self.drain_mailbox(&mut replies);
        self.answer_destroys(freed, replies)
    }

    /// Ends the VM and frees its resources, after its tunnels are closed ([`Resources::free`]).
    pub(super) async fn free(&mut self) -> Result<(), DestroyError> {
        self.sandbox.end_connections().await;
        self.resources.free(&self.actors.host).await
    }

    /// Frees everything, after the tunnels are closed ([`Resources::free_all`]).
    async fn free_all(&mut self, has_failed: bool) -> Result<(), DestroyError> {
        self.sandbox.end_connections().await;
        self.resources.free_all(&self.actors.host, has_failed).await
    }

    /// Removes the sandbox from the registry, so that its ID is unknown from now on, and drops its
    /// references to snapshots.
    fn forget(&mut self) {
        self.actors.registry.remove(&self.sandbox.facts.id);
        self.pins = Pins::default();
        self.give_up_compaction();
        self.actors.collect_snapshots();
    }

    /// Empties the mailbox after a destroy. Further destroys are added to `replies`, so that they
    /// get the same answer. Other commands are rejected, because the sandbox is gone.
    fn drain_mailbox(&mut self, replies: &mut Vec<DestroyReply>) {
        while let Ok(command) = self.mailbox.try_recv() {
            match command {
                Command::Destroy(reply) => replies.push(reply),
                other => other.reject(&LifecycleError::Gone),
            }
        }
    }

    pub(super) fn answer_resumes(&mut self, answer: Result<(), LifecycleError>) {
        let mut answer = Some(answer);
        for reply in self.resumes.drain(..) {
            // The first caller receives the error itself, the others receive its text.
            let again = match &answer {
                Some(Ok(())) | None => Ok(()),
                Some(Err(error)) => Err(LifecycleError::Again(error.to_report_string())),
            };
            let first = answer.replace(again).unwrap_or(Ok(()));
            let _ = reply.send(first);
        }
    }

    fn answer_destroys(&self, freed: Result<(), DestroyError>, replies: Vec<DestroyReply>) -> Step {
        let Err(error) = freed else {
            for reply in replies {
                let _ = reply.send(Ok(()));
            }
            return Step::End;
        };
        let reason = format!(
            "failed to destroy the sandbox: {}",
            error.to_report_string()
        );
        self.sandbox.apply(Event::DestroyFailed(reason.clone()));
        // The sandbox may be used again, if it has a snapshot.
        self.sandbox.reset_destroy_request();
        let mut error = Some(error);
        for reply in replies {
            let error = error.take().unwrap_or(DestroyError::Again(reason.clone()));
            let _ = reply.send(Err(error));
        }
        Step::Wait
    }
}
