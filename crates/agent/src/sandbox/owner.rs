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
    DestroyReply, Plan, Running, Sandbox, State,
    boot::{Abort, Boot},
    error::{CreateError, DestroyError, chain},
    resources::{HostParts, Resources},
};
use crate::{
    folder::{BootTimes, Folder},
    registry::Registry,
    supervisor::final_reason,
};

/// How an owner begins.
pub(crate) enum Start {
    /// With nothing; `made` is told how it went.
    Create {
        plan: Box<Plan>,
        made: oneshot::Sender<Result<(), CreateError>>,
    },
    /// With a machine that runs.
    Adopted(Adopted),
}

/// What an agent found of a sandbox at its start.
pub(crate) struct Adopted {
    pub(super) resources: Resources,
    pub(super) folder: Folder,
    pub(super) spec: Box<SupervisorSpec>,
    pub(super) machine: AdoptedMachine,
}

/// How its machine was found.
pub(super) enum AdoptedMachine {
    /// It runs and its guest answered once.
    Running(Box<Running>),
    /// It runs; the guest has not answered yet.
    Booting,
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

/// Starts the owner of a sandbox, which is in the registry already.
pub(crate) fn spawn(
    owners: &Owners,
    sandbox: Arc<Sandbox>,
    requests: mpsc::UnboundedReceiver<DestroyReply>,
    start: Start,
) {
    let resources = Resources::none(sandbox.facts.id.clone());
    let mut owner = Owner {
        owners: owners.clone(),
        sandbox,
        resources,
        requests,
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

struct Owner {
    owners: Owners,
    sandbox: Arc<Sandbox>,
    resources: Resources,
    requests: mpsc::UnboundedReceiver<DestroyReply>,
}

/// What an owner does next.
enum Next {
    /// Watch the machine.
    Watch,
    /// Wait to be destroyed.
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
            Start::Adopted(adopted) => self.adopt(adopted).await,
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
        let _ = made.send(Err(error));
        self.collect_requests(&mut replies);
        self.answer(freed, replies)
    }

    async fn adopt(&mut self, adopted: Adopted) -> Next {
        let Adopted {
            resources,
            folder,
            spec,
            machine,
        } = adopted;
        self.resources = resources;
        self.sandbox.set_host_ip(spec.network.host_ip);
        match machine {
            AdoptedMachine::Running(running) => {
                self.sandbox.set_state(State::Running(Arc::new(*running)));
                Next::Watch
            }
            AdoptedMachine::Lost(reason) => self.lose(reason).await,
            AdoptedMachine::Booting => {
                let (outcome, replies) = self
                    .boot(async |boot| {
                        let mut times = BootTimes::default();
                        boot.await_guest(&folder, &spec, &mut times, 0).await
                    })
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

    /// Boots while listening for requests to destroy, which stop the boot.
    async fn boot(
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
            abort: abort.clone(),
            began: Instant::now(),
        };
        let mut replies = Vec::new();
        let mut work = std::pin::pin!(work(&mut boot));
        loop {
            tokio::select! {
                outcome = &mut work => return (outcome, replies),
                Some(reply) = self.requests.recv() => {
                    replies.push(reply);
                    abort.destroyed.cancel();
                }
            }
        }
    }

    /// The machine runs: until it is gone, or is to go.
    async fn watch(&mut self) -> Next {
        let Some(supervisor) = &self.resources.supervisor else {
            return self.lose("its supervisor is gone".to_owned()).await;
        };
        tokio::select! {
            () = supervisor.gone() => {}
            Some(reply) = self.requests.recv() => return Next::Destroy(vec![reply]),
            () = self.owners.shutdown.cancelled() => return Next::End,
        }
        self.resources.supervisor = None;
        let reason = match &self.resources.folder {
            Some(folder) => final_reason(folder),
            None => "its supervisor is gone".to_owned(),
        };
        self.lose(reason).await
    }

    /// The machine is gone. All but the folder is freed at once; what could not be is tried again by destroy.
    async fn lose(&mut self, reason: String) -> Next {
        tracing::warn!(reason, "sandbox is lost");
        self.sandbox.set_state(State::Error { reason });
        // The failure is logged where it happens, and the user's reason stays the first.
        let _ = self.resources.free(&self.owners.host).await;
        Next::Wait
    }

    /// It is in error: until it is destroyed.
    async fn wait(&mut self) -> Next {
        tokio::select! {
            Some(reply) = self.requests.recv() => Next::Destroy(vec![reply]),
            () = self.owners.shutdown.cancelled() => Next::End,
        }
    }

    async fn destroy(&mut self, mut replies: Vec<DestroyReply>) -> Next {
        self.sandbox.set_state(State::Stopping);
        let freed = self.resources.free_all(&self.owners.host).await;
        if freed.is_ok() {
            tracing::info!("sandbox is destroyed");
            self.forget();
        }
        self.collect_requests(&mut replies);
        self.answer(freed, replies)
    }

    /// From here on its id is unknown.
    fn forget(&self) {
        self.owners.registry.remove(&self.sandbox.facts.id);
    }

    /// Those who asked for the same while it was done get the same answer.
    fn collect_requests(&mut self, replies: &mut Vec<DestroyReply>) {
        while let Ok(reply) = self.requests.try_recv() {
            replies.push(reply);
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
