//! The one place where a running machine is acted on.
//!
//! | request   | machine runs                                 | machine is frozen                         |
//! |-----------|----------------------------------------------|-------------------------------------------|
//! | status    | answered                                     | answered                                  |
//! | freeze    | stopped, written; thawed if a step fails     | refused                                   |
//! | thaw      | nothing                                      | goes on                                   |
//! | published | noted                                        | noted                                     |
//! | stop      | killed                                       | killed                                    |
//!
//! While a machine is written, which takes as long as its memory and the disk do, questions for its status are answered and a stop
//! is obeyed; the rest waits.
//!
//! A machine that cannot be thawed after a failure is of no use: it is ended, with the reason.

use std::{
    collections::VecDeque,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::Signal,
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep},
};
use wrenn_proto::supervise::{FrozenMachine, MachineStatus, Reply, Request};
use wrenn_snapshot::layout;
use wrenn_sys::fault;
use wrenn_vmm::Machine;

use crate::{
    SupervisorError,
    control::{Answer, Command, StopReply},
    memory::{Failure, GuestMemory},
    supervise::elapsed_ms,
};

/// How long a killed VMM may take to be gone: it has to give back all of its guest's memory.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// How long after a restore the pages that were needed are kept for others: the first answer is out by then.
const WORKING_SET_AFTER: Duration = Duration::from_secs(4);

/// How often a guest that stands still because the host's disk is full may try again to write.
const STALL_RETRY: Duration = Duration::from_secs(2);

/// A machine and all that belongs to it.
pub(crate) struct Owner<M> {
    /// Before `memory`: it is dropped, and the VMM with it, as long as its memory is served.
    pub(crate) machine: M,
    pub(crate) memory: GuestMemory,
    /// Files of the disk above the image, the lowest first; the last is written to.
    pub(crate) disk: Vec<PathBuf>,
    pub(crate) frozen: bool,
    pub(crate) status: watch::Receiver<MachineStatus>,
}

/// How the serving of a request ended.
enum Served {
    /// With an answer, and with the reason if the machine must end.
    Answered(Answer, Option<SupervisorError>),
    /// Guest memory cannot be served any more.
    Failed(String),
    /// A stop came in between.
    Stop(Option<StopReply>),
}

impl<M: Machine> Owner<M> {
    /// Serves requests until the machine ends.
    pub(crate) async fn drive(
        &mut self,
        mut queue: mpsc::Receiver<Command>,
        failure: &Failure,
        terminate: &mut Signal,
    ) -> Result<(), SupervisorError> {
        let mut keep = std::pin::pin!(sleep(WORKING_SET_AFTER));
        let mut kept = false;
        let mut retries = interval(STALL_RETRY);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Asked while another request was served.
        let mut waiting = VecDeque::new();
        loop {
            let command = match waiting.pop_front() {
                Some(command) => command,
                None => tokio::select! {
                    exit = self.machine.wait() => return Err(SupervisorError::Ended(exit)),
                    reason = failure.occurred() => return self.fail(reason).await,
                    Some(command) = queue.recv() => command,
                    () = &mut keep, if !kept => {
                        self.memory.keep_working_set();
                        kept = true;
                        continue;
                    }
                    _ = retries.tick() => {
                        self.retry_if_stalled().await;
                        continue;
                    }
                    _ = terminate.recv() => return self.stop(None).await,
                },
            };
            let (request, reply) = match command {
                Command::Stop(reply) => return self.stop(Some(reply)).await,
                Command::Ask(request, reply) => (request, reply),
            };
            let meanwhile = self.status_during(&request);
            let served = {
                let mut answering = std::pin::pin!(self.answer(request));
                loop {
                    tokio::select! {
                        (answer, ended) = &mut answering => break Served::Answered(answer, ended),
                        reason = failure.occurred() => break Served::Failed(reason),
                        _ = terminate.recv() => break Served::Stop(None),
                        Some(command) = queue.recv() => match command {
                            Command::Ask(Request::Status, reply) => {
                                // Whoever asked may be gone by now.
                                let _ = reply.send(Reply::Status(meanwhile.clone()).into());
                            }
                            Command::Stop(reply) => break Served::Stop(Some(reply)),
                            later @ Command::Ask(..) => waiting.push_back(later),
                        },
                    }
                }
            };
            match served {
                Served::Answered(answer, ended) => {
                    // Whoever asked may be gone by now.
                    let _ = reply.send(answer);
                    if let Some(error) = ended {
                        self.machine.stop(STOP_DEADLINE).await?;
                        return Err(error);
                    }
                }
                Served::Failed(reason) => return self.fail(reason).await,
                Served::Stop(reply) => return self.stop(reply).await,
            }
        }
    }

    /// Lets a guest go on that the VMM stopped because the host's disk was full. Its write is done again, or stops it again.
    async fn retry_if_stalled(&mut self) {
        if !self.machine.is_stalled() || self.frozen {
            return;
        }
        tracing::warn!("the guest stands still until the host's disk has room for what it writes");
        if let Err(error) = self.machine.thaw().await {
            tracing::warn!(%error, "the guest could not be let go on");
        }
    }

    /// Its memory cannot be served any more.
    async fn fail(&mut self, reason: String) -> Result<(), SupervisorError> {
        self.machine.stop(STOP_DEADLINE).await?;
        Err(SupervisorError::Pages(reason))
    }

    async fn stop(&mut self, reply: Option<StopReply>) -> Result<(), SupervisorError> {
        let stopped = self.machine.stop(STOP_DEADLINE).await;
        if let Some(reply) = reply {
            let answer = match &stopped {
                Ok(()) => Reply::Stopped,
                Err(error) => Reply::Refused {
                    reason: error.to_string(),
                },
            };
            reply.send_and_flush(answer).await;
        }
        Ok(stopped?)
    }

    /// The answer, and why the machine must end if it must.
    async fn answer(&mut self, request: Request) -> (Answer, Option<SupervisorError>) {
        let done = match request {
            Request::Status => Ok(Reply::Status(self.status())),
            Request::Freeze {
                staging,
                build,
                next_disk,
            } => return self.freeze(&staging, &build, next_disk).await,
            Request::Thaw => self.thaw().await.map(|()| Reply::Thawed),
            Request::Published { published, memory } => self
                .memory
                .published(published, &memory)
                .map(|()| Reply::Noted),
            Request::ImageMemory => return (self.image_memory(), None),
            Request::Stop => Err(SupervisorError::Panicked),
        };
        (done.unwrap_or_else(|error| refused(&error)).into(), None)
    }

    fn status(&self) -> MachineStatus {
        MachineStatus {
            frozen: self.frozen,
            disk: self.disk.clone(),
            pager: self.memory.status(),
            ..self.status.borrow().clone()
        }
    }

    /// What is answered to who asks while `request` is served.
    fn status_during(&self, request: &Request) -> MachineStatus {
        let freezing = matches!(request, Request::Freeze { .. });
        MachineStatus {
            frozen: self.frozen || freezing,
            freezing,
            ..self.status()
        }
    }

    fn image_memory(&self) -> Answer {
        match self.memory.image().map(OwnedFd::try_clone) {
            Some(Ok(descriptor)) => Answer {
                reply: Reply::ImageMemory,
                descriptor: Some(descriptor),
            },
            Some(Err(error)) => Reply::Refused {
                reason: error.to_string(),
            }
            .into(),
            None => Reply::Refused {
                reason: "the machine was booted: it has no image's memory".to_owned(),
            }
            .into(),
        }
    }

    async fn thaw(&mut self) -> Result<(), SupervisorError> {
        if self.frozen {
            self.machine.thaw().await?;
            self.frozen = false;
        }
        Ok(())
    }

    async fn freeze(
        &mut self,
        staging: &Path,
        build: &str,
        next_disk: Option<PathBuf>,
    ) -> (Answer, Option<SupervisorError>) {
        if self.frozen {
            let reason = "the machine is frozen already".to_owned();
            return (Reply::Refused { reason }.into(), None);
        }
        match self.write(staging, build, next_disk).await {
            Ok(frozen) => (Reply::Frozen(frozen).into(), None),
            Err(error) => {
                tracing::warn!(error = error.chain(), "the machine was not frozen");
                let ended = self.thaw().await.err();
                (refused(&error).into(), ended)
            }
        }
    }

    async fn write(
        &mut self,
        staging: &Path,
        build: &str,
        next_disk: Option<PathBuf>,
    ) -> Result<FrozenMachine, SupervisorError> {
        let began = Instant::now();
        self.frozen = true;
        let vmm = Some(self.machine.pid());
        self.machine.freeze().await?;
        fault::point("supervisor.freeze.stopped", vmm);
        let disk_layers = self.disk.clone();
        if let Some(next) = next_disk {
            let overlay = open_overlay(&next)?;
            self.machine.switch_disk(overlay).await?;
            self.disk.push(next);
        }
        let device = create(&staging.join(layout::DEVICE))?;
        self.machine.save(device).await?;
        fault::point("supervisor.freeze.saved", vmm);
        let job = self.memory.writer(staging, build, self.machine.pid())?;
        // Aside, so that the gateway's services go on.
        let written = tokio::task::spawn_blocking(job).await;
        let written = written.unwrap_or(Err(SupervisorError::Panicked))?;
        let generation = written.header.generation();
        self.memory.wrote(written.header);
        fault::point("supervisor.freeze.written", vmm);
        Ok(FrozenMachine {
            generation,
            disk_layers,
            pages_seen: written.pages_seen,
            pages_written: written.pages_written,
            frozen_ms: elapsed_ms(began),
            vmm: self.machine.version(),
        })
    }
}

fn refused(error: &SupervisorError) -> Reply {
    Reply::Refused {
        reason: error.chain(),
    }
}

fn create(path: &Path) -> Result<OwnedFd, SupervisorError> {
    let file = fs::File::create_new(path);
    file.map(Into::into)
        .map_err(|source| SupervisorError::Write {
            path: path.to_owned(),
            source,
        })
}

fn open_overlay(path: &Path) -> Result<OwnedFd, SupervisorError> {
    let file = fs::File::options().read(true).write(true).open(path);
    file.map(Into::into)
        .map_err(|source| SupervisorError::ReadSpec {
            path: path.to_owned(),
            source,
        })
}
