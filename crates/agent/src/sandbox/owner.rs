//! The task that owns a sandbox, from its create or adoption to its end.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures::FutureExt as _;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_proto::supervise::SupervisorSpec;

use super::{
    Ask, Plan, Reply, Running, Sandbox, State,
    boot::{Abort, Attempt, Boot},
    compact::Compaction,
    error::{CreateError, DestroyError, FreezeError, chain},
    recovery::Recovery,
    resources::{HostParts, Resources},
};
use crate::{folder::Folder, registry::Registry, snapshots::PinnedBuild, supervisor::final_reason};

/// Who waits for a destroy.
type DestroyReply = Reply<(), DestroyError>;

/// How an owner begins.
pub(crate) enum Start {
    /// With nothing; `made` is told how it went.
    Create {
        plan: Box<Plan>,
        made: oneshot::Sender<Result<(), CreateError>>,
    },
    /// With a machine that runs.
    Adopted(Box<Adopted>),
}

/// What an agent found of a sandbox at its start.
pub(crate) struct Adopted {
    pub(super) resources: Resources,
    pub(super) folder: Folder,
    pub(super) spec: Box<SupervisorSpec>,
    pub(super) machine: AdoptedMachine,
    /// What its machine was restored from, and the last moment that was frozen.
    pub(super) pins: Pins,
}

/// Snapshots that a sandbox stands on. Nobody removes them as long as they are held.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// Its machine was restored from this.
    pub(super) origin: Option<PinnedBuild>,
    /// It can be brought back from this.
    pub(super) last: Option<PinnedBuild>,
}

/// How its machine was found.
pub(super) enum AdoptedMachine {
    /// It runs and its guest answered once.
    Running(Box<Running>),
    /// So did its guest, but it stands still, or does not say: an agent was killed in the middle of freezing it.
    Frozen(Box<Running>),
    /// It runs; the guest has not answered yet.
    Booting,
    /// It was frozen and is files and nothing else; what was left of its machine is to be freed.
    Paused,
    /// It is gone; for a user: why.
    Lost(String),
}

/// What all owners share.
#[derive(Clone)]
pub(crate) struct Owners {
    pub(crate) host: Arc<HostParts>,
    pub(crate) registry: Arc<Registry>,
    /// The agent ends: let go of what runs.
    pub(crate) shutdown: CancellationToken,
    /// All owners, so that the agent can wait for them.
    pub(crate) tasks: TaskTracker,
}

impl Owners {
    /// Removes, in the background, what nobody stands on any more: neither an owner, nor a sandbox as its folder tells.
    pub(crate) fn collect_snapshots(&self) {
        let (host, shutdown) = (self.host.clone(), self.shutdown.clone());
        let kept = move |host: &HostParts| {
            let noted = host.folders.last_moments();
            let noted = noted.inspect_err(|error| {
                tracing::warn!(error = chain(error), "no snapshot is collected");
            });
            // An agent that ends lets go of its sandboxes, and of their pins; they stay, and so does what they stand on.
            let noted = noted.ok().filter(|_| !shutdown.is_cancelled())?;
            Some(
                noted
                    .iter()
                    .filter_map(|last| last.build.parse().ok())
                    .collect(),
            )
        };
        self.tasks
            .spawn_blocking(move || host.snapshots.collect(|| kept(&host)));
    }
}

/// Starts the owner of a sandbox, which is in the registry already.
pub(crate) fn spawn(
    owners: &Owners,
    sandbox: Arc<Sandbox>,
    asks: mpsc::UnboundedReceiver<Ask>,
    start: Start,
) {
    let resources = Resources::none(sandbox.facts.id.clone());
    let mut owner = Owner {
        lost: None,
        compaction: None,
        recovery: None,
        owners: owners.clone(),
        sandbox,
        resources,
        pins: Pins::default(),
        asks,
        resumes: Vec::new(),
    };
    owners.tasks.spawn(async move {
        // What an owner noted in `resources` is true at every await, so it can go on after a panic: to free.
        let first = AssertUnwindSafe(owner.run(start)).catch_unwind().await;
        if first.is_err() {
            let recover = AssertUnwindSafe(owner.recover()).catch_unwind().await;
            if recover.is_err() {
                tracing::error!("the owner of a sandbox panicked twice; the next agent cleans up");
            }
        }
    });
}

pub(super) struct Owner {
    pub(super) owners: Owners,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) resources: Resources,
    pub(super) pins: Pins,
    asks: mpsc::UnboundedReceiver<Ask>,
    /// Who waits for it to run.
    pub(super) resumes: Vec<Reply<(), FreezeError>>,
    /// Why its machine was lost since its last moment was frozen.
    pub(super) lost: Option<String>,
    /// A twin of its last moment with shorter chains, in the making.
    pub(super) compaction: Option<Compaction>,
    /// A guest that did not recover from its preparation is asked again and again.
    pub(super) recovery: Option<Recovery>,
}

/// What an owner does next.
pub(super) enum Next {
    /// Watch the machine.
    Watch,
    /// There is no machine: wait to be resumed or destroyed.
    Wait,
    /// Free everything, then tell those who asked.
    Destroy(Vec<DestroyReply>),
    /// Nothing: it is destroyed, or left to the next agent.
    End,
}

impl Owner {
    #[tracing::instrument(name = "sandbox", skip_all, fields(sandbox_id = %self.sandbox.facts.id))]
    async fn run(&mut self, start: Start) {
        let next = match start {
            Start::Create { plan, made } => self.create(&plan, made).await,
            Start::Adopted(adopted) => self.adopt(*adopted).await,
        };
        self.go_on(next).await;
    }

    /// After a panic, which is reported by its own message: what there is, is freed.
    async fn recover(&mut self) {
        let next = self
            .lose("the host agent failed inside; see its log".to_owned())
            .await;
        self.go_on(next).await;
    }

    async fn go_on(&mut self, mut next: Next) {
        loop {
            next = match next {
                Next::Watch => self.watch().await,
                Next::Wait => self.wait().await,
                Next::Destroy(replies) => self.destroy(replies).await,
                Next::End => return,
            };
        }
    }

    async fn create(
        &mut self,
        plan: &Plan,
        made: oneshot::Sender<Result<(), CreateError>>,
    ) -> Next {
        let (outcome, mut replies) = self.boot(async |boot| boot.run(plan).await).await;
        let error = match outcome {
            Ok(running) if replies.is_empty() => {
                self.sandbox.touch();
                self.sandbox.set_state(State::Running(Arc::new(running)));
                self.answer_resumes(Ok(()));
                // Nobody is there to hear it when the caller has gone away: the sandbox runs all the same.
                let _ = made.send(Ok(()));
                return Next::Watch;
            }
            Ok(_) => CreateError::Destroyed,
            Err(CreateError::ShuttingDown)
                if self.resources.supervisor.is_some() && replies.is_empty() =>
            {
                tracing::info!("left to the next agent while it boots");
                let _ = made.send(Err(CreateError::ShuttingDown));
                return Next::End;
            }
            Err(error) => error,
        };
        tracing::warn!(error = chain(&error), "sandbox was not made");
        self.sandbox.set_state(State::Stopping);
        let freed = self.resources.free_all(&self.owners.host).await;
        if freed.is_ok() {
            self.forget();
        }
        self.answer_resumes(Err(FreezeError::Gone));
        let _ = made.send(Err(error));
        self.collect_asks(&mut replies);
        self.answer(freed, replies)
    }

    async fn adopt(&mut self, adopted: Adopted) -> Next {
        let Adopted {
            resources,
            folder,
            spec,
            machine,
            pins,
        } = adopted;
        self.resources = resources;
        self.pins = pins;
        self.sandbox.set_host_ip(Some(spec.network.host_ip));
        match machine {
            AdoptedMachine::Running(running) => {
                self.sandbox.set_state(State::Running(Arc::new(*running)));
                Next::Watch
            }
            AdoptedMachine::Frozen(running) => self.thaw_left(Arc::new(*running)).await,
            AdoptedMachine::Lost(reason) => self.lose(reason).await,
            AdoptedMachine::Paused => self.rest().await,
            AdoptedMachine::Booting => {
                let (outcome, replies) = self
                    .boot(async |boot| boot.boot_from_disk(&folder, &spec, Attempt::Adopted).await)
                    .await;
                match outcome {
                    _ if !replies.is_empty() => Next::Destroy(replies),
                    Ok(running) => {
                        self.sandbox.set_state(State::Running(Arc::new(running)));
                        Next::Watch
                    }
                    Err(CreateError::ShuttingDown) => Next::End,
                    Err(error) => self.lose(chain(&error)).await,
                }
            }
        }
    }

    /// Boots or restores while listening: a request to destroy stops it.
    pub(super) async fn boot(
        &mut self,
        work: impl AsyncFnOnce(&mut Boot<'_>) -> Result<Running, CreateError>,
    ) -> (Result<Running, CreateError>, Vec<DestroyReply>) {
        let abort = Abort {
            destroyed: CancellationToken::new(),
            shutdown: self.owners.shutdown.clone(),
        };
        let mut boot = Boot {
            host: &self.owners.host,
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
                Some(ask) = self.asks.recv() => match ask {
                    Ask::Destroy(reply) => {
                        replies.push(reply);
                        abort.destroyed.cancel();
                    }
                    Ask::Resume(_, reply) => self.resumes.push(reply),
                    other => refuse(other, &FreezeError::NotNow("starting")),
                },
            }
        }
    }

    /// The machine runs: until it is gone, or something is asked.
    async fn watch(&mut self) -> Next {
        let Some(supervisor) = &self.resources.supervisor else {
            return self.lose("its supervisor is gone".to_owned()).await;
        };
        let ask = tokio::select! {
            () = supervisor.gone() => None,
            compacted = Self::compacted(&mut self.compaction) => {
                self.move_to_twin(compacted);
                return Next::Watch;
            }
            Some(ask) = self.asks.recv() => Some(ask),
            () = self.owners.shutdown.cancelled() => return Next::End,
        };
        match ask {
            Some(Ask::Destroy(reply)) => Next::Destroy(vec![reply]),
            Some(Ask::Pause(reply)) => self.pause(reply).await,
            Some(Ask::Freeze(reply)) => self.freeze(reply).await,
            Some(Ask::SetAccess(access, reply)) => {
                let _ = reply.send(self.set_access(access).await);
                Next::Watch
            }
            Some(Ask::Resume(_, reply)) => {
                let _ = reply.send(Ok(()));
                Next::Watch
            }
            None => self.lose_machine().await,
        }
    }

    /// The supervisor is gone, and with it the machine.
    pub(super) async fn lose_machine(&mut self) -> Next {
        self.resources.supervisor = None;
        let reason = match &self.resources.folder {
            Some(folder) => final_reason(folder),
            None => "its supervisor is gone".to_owned(),
        };
        self.lose(reason).await
    }

    /// The machine is gone. All but the folder is freed at once; what could not be is tried again by destroy. If a moment of it
    /// was ever frozen it stands there again, paused; else nothing can bring it back.
    pub(super) async fn lose(&mut self, reason: String) -> Next {
        tracing::warn!(reason, "sandbox is lost");
        if let Some(last) = self.pins.last.clone() {
            // If it cannot be noted, the next agent finds a machine that is gone, and comes here as well.
            let _ = self.note_paused(&last);
            let warning =
                format!("its machine was lost ({reason}); it stands where it was last frozen");
            self.sandbox.set_warning(warning);
            self.lost = Some(reason);
            return self.rest().await;
        }
        self.sandbox.set_state(State::Error { reason });
        // The failure is logged where it happens, and the user's reason stays the first.
        let _ = self.resources.free(&self.owners.host).await;
        Next::Wait
    }

    /// It is paused or in error: until it is resumed or destroyed.
    async fn wait(&mut self) -> Next {
        let ask = tokio::select! {
            Some(ask) = self.asks.recv() => ask,
            compacted = Self::compacted(&mut self.compaction) => {
                self.move_to_twin(compacted);
                return Next::Wait;
            }
            () = self.owners.shutdown.cancelled() => return Next::End,
        };
        match ask {
            Ask::Destroy(reply) => return Next::Destroy(vec![reply]),
            Ask::Resume(from, reply) => {
                self.resumes.push(reply);
                return self.resume(from).await;
            }
            Ask::Pause(reply) => {
                let _ = reply.send(match self.sandbox.state() {
                    State::Paused => Ok(()),
                    _ => Err(FreezeError::NotNow("lost")),
                });
            }
            Ask::Freeze(reply) => {
                let _ = reply.send(match (self.sandbox.state(), &self.pins.last) {
                    (State::Paused, Some(last)) => Ok(last.clone()),
                    _ => Err(FreezeError::NotNow("lost")),
                });
            }
            Ask::SetAccess(access, reply) => {
                let _ = reply.send(match self.sandbox.state() {
                    State::Paused => self.set_access(access).await,
                    _ => Err(FreezeError::NotNow("lost")),
                });
            }
        }
        Next::Wait
    }

    async fn destroy(&mut self, mut replies: Vec<DestroyReply>) -> Next {
        self.sandbox.set_state(State::Stopping);
        let freed = self.resources.free_all(&self.owners.host).await;
        if freed.is_ok() {
            tracing::info!("sandbox is destroyed");
            self.forget();
        }
        self.collect_asks(&mut replies);
        self.answer(freed, replies)
    }

    /// From here on its id is unknown, and nothing is kept for it.
    fn forget(&mut self) {
        self.owners.registry.remove(&self.sandbox.facts.id);
        self.pins = Pins::default();
        self.give_up_compaction();
        self.owners.collect_snapshots();
    }

    /// Those who asked for the same while it was done get the same answer; others are told that it is gone.
    fn collect_asks(&mut self, replies: &mut Vec<DestroyReply>) {
        while let Ok(ask) = self.asks.try_recv() {
            match ask {
                Ask::Destroy(reply) => replies.push(reply),
                other => refuse(other, &FreezeError::Gone),
            }
        }
    }

    pub(super) fn answer_resumes(&mut self, answer: Result<(), FreezeError>) {
        let mut answer = Some(answer);
        for reply in self.resumes.drain(..) {
            // The first to ask hears the error itself, the others its words.
            let again = match &answer {
                Some(Ok(())) | None => Ok(()),
                Some(Err(error)) => Err(FreezeError::Again(chain(error))),
            };
            let first = answer.replace(again).unwrap_or(Ok(()));
            let _ = reply.send(first);
        }
    }

    fn answer(&self, freed: Result<(), DestroyError>, replies: Vec<DestroyReply>) -> Next {
        let Err(error) = freed else {
            for reply in replies {
                let _ = reply.send(Ok(()));
            }
            return Next::End;
        };
        let reason = format!("it could not be destroyed: {}", chain(&error));
        self.sandbox.set_state(State::Error {
            reason: reason.clone(),
        });
        let mut error = Some(error);
        for reply in replies {
            let error = error.take().unwrap_or(DestroyError::Again(reason.clone()));
            let _ = reply.send(Err(error));
        }
        Next::Wait
    }
}

/// Answers what cannot be done now.
fn refuse(ask: Ask, why: &FreezeError) {
    let why = FreezeError::Again(why.to_string());
    // Whoever asked may be gone.
    let _ = match ask {
        Ask::Destroy(reply) => reply.send(Err(DestroyError::Gone)).is_ok(),
        Ask::Pause(reply) | Ask::Resume(_, reply) | Ask::SetAccess(_, reply) => {
            reply.send(Err(why)).is_ok()
        }
        Ask::Freeze(reply) => reply.send(Err(why)).is_ok(),
    };
}
