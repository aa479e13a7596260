//! Actor of the running VM. All operations on the VM go through this type.
//!
//! | request   | VM is running                             | VM is paused             |
//! |-----------|-------------------------------------------|--------------------------|
//! | status    | answered                                  | answered                 |
//! | snapshot  | paused and written; resumed if a step     | rejected                 |
//! |           | fails                                     |                          |
//! | resume    | no effect                                 | resumed                  |
//! | published | recorded                                  | recorded                 |
//! | stop      | killed                                    | killed                   |
//!
//! Writing a snapshot takes as long as its memory and the disk require. During this time, status
//! requests are answered and a stop is obeyed; all other requests wait.
//!
//! If the VM cannot be resumed after a failure, it is unusable: the supervisor ends it and reports
//! the reason.

use std::{
    collections::VecDeque,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use thiserror_ext::AsReport as _;
use tokio::{
    signal::unix::Signal,
    sync::{mpsc, watch},
    time::sleep,
};
use wrenn_proto::supervise::{MachineStatus, Reply, Request, SnapshotReport};
use wrenn_snapshot::layout;
use wrenn_sys::failpoint;
use wrenn_vmm::Machine;

use crate::{
    SupervisorError,
    control::{Command, ReplyMessage, StopReply},
    disk::GuestDisk,
    disk_room::{Action, DiskRoom},
    memory::{Failure, GuestMemory},
    supervise::elapsed_ms,
    vmm_time,
};

/// Maximum time until a killed VMM has exited. The kernel must first free all of the guest's
/// memory.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// Time from a restore until the needed pages are saved for other restores. By then, the guest has
/// sent its first response.
const WORKING_SET_AFTER: Duration = Duration::from_secs(4);

/// VM with all of its resources.
pub(crate) struct MachineActor<M> {
    /// Declared before `machine`: a VMM that waits for an exporter cannot be killed before the
    /// exporter has ended.
    pub(crate) disk: GuestDisk,
    /// Declared before `memory`, so that the VM is dropped, and the VMM killed, while its memory is
    /// still served.
    pub(crate) machine: M,
    pub(crate) memory: GuestMemory,
    pub(crate) is_paused: bool,
    pub(crate) disk_room: DiskRoom,
    pub(crate) status: watch::Receiver<MachineStatus>,
}

/// Outcome of a request.
enum Served {
    /// Answered, with the reason if the VM must end.
    Answered(Box<ReplyMessage>, Option<SupervisorError>),
    /// Guest memory can no longer be served.
    Failed(String),
    /// A stop request arrived.
    Stop(Option<StopReply>),
}

impl<M: Machine> MachineActor<M> {
    /// Serves requests until the VM ends.
    pub(crate) async fn drive(
        &mut self,
        mut queue: mpsc::Receiver<Command>,
        failure: &Failure,
        terminate: &mut Signal,
    ) -> Result<(), SupervisorError> {
        let mut keep = std::pin::pin!(sleep(WORKING_SET_AFTER));
        let mut kept = false;
        let mut disk_check = std::pin::pin!(sleep(Duration::ZERO));
        // Requests that arrived while another one was served.
        let mut waiting = VecDeque::new();
        loop {
            let command = match waiting.pop_front() {
                Some(command) => command,
                None => tokio::select! {
                    exit = self.machine.wait() => return Err(SupervisorError::Ended(exit)),
                    reason = failure.occurred() => return self.fail(reason).await,
                    error = self.disk.failed() => return self.end(error).await,
                    Some(command) = queue.recv() => command,
                    () = &mut keep, if !kept => {
                        self.memory.keep_working_set();
                        kept = true;
                        continue;
                    }
                    () = &mut disk_check => {
                        let next = self.check_disk_room().await;
                        disk_check.as_mut().reset(tokio::time::Instant::now() + next);
                        continue;
                    }
                    _ = terminate.recv() => return self.stop(None).await,
                },
            };
            let (request, reply) = match command {
                Command::Stop(reply) => return self.stop(Some(reply)).await,
                Command::Serve(request, reply) => (request, reply),
            };
            let meanwhile = self.status_during(&request);
            let served = {
                let mut answering = std::pin::pin!(self.serve(request));
                loop {
                    tokio::select! {
                        (answer, ended) = &mut answering => break Served::Answered(Box::new(answer), ended),
                        reason = failure.occurred() => break Served::Failed(reason),
                        _ = terminate.recv() => break Served::Stop(None),
                        Some(command) = queue.recv() => match command {
                            Command::Serve(Request::Status, reply) => {
                                // The client may have disconnected.
                                let _ = reply.send(Reply::Status(meanwhile.clone()).into());
                            }
                            Command::Stop(reply) => break Served::Stop(Some(reply)),
                            later @ Command::Serve(..) => waiting.push_back(later),
                        },
                    }
                }
            };
            match served {
                Served::Answered(answer, ended) => {
                    // The client may have disconnected.
                    let _ = reply.send(*answer);
                    if let Some(error) = ended {
                        return self.end(error).await;
                    }
                }
                Served::Failed(reason) => return self.fail(reason).await,
                Served::Stop(reply) => return self.stop(reply).await,
            }
        }
    }

    /// Holds a guest that would use up the host's disk, and resumes it when there is space. Also
    /// resumes a guest that the VMM paused because the disk was full: the write is retried, and if
    /// it fails again, the VMM pauses the guest again. Returns the time until the next check.
    async fn check_disk_room(&mut self) -> Duration {
        let is_stalled = self.machine.is_stalled();
        let (action, next) = self.disk_room.check(Some(self.disk.writable()), is_stalled);
        // A VM that is paused for a snapshot is not touched.
        if self.is_paused {
            return next;
        }
        let done = match action {
            Action::Nothing => return next,
            Action::Hold => {
                tracing::warn!("guest held because the host's disk is almost full");
                // Recorded first: a pause that timed out may still take effect.
                self.disk_room.note_held(true);
                self.machine.pause().await
            }
            Action::Resume => {
                tracing::warn!("guest was paused because the host's disk was full, resuming");
                self.machine.resume().await
            }
        };
        match done {
            Ok(()) if action == Action::Resume => self.disk_room.note_held(false),
            Ok(()) => {}
            Err(error) => tracing::warn!(%error, "failed to hold or resume the guest"),
        }
        next
    }

    /// Ends the VM, because its memory can no longer be served.
    async fn fail(&mut self, reason: String) -> Result<(), SupervisorError> {
        self.end(SupervisorError::Pages(reason)).await
    }

    /// Ends the VM because of an error.
    async fn end(&mut self, error: SupervisorError) -> Result<(), SupervisorError> {
        self.disk.close();
        self.machine.stop(STOP_DEADLINE).await?;
        Err(error)
    }

    async fn stop(&mut self, reply: Option<StopReply>) -> Result<(), SupervisorError> {
        tracing::info!("stopping the VM on request");
        self.disk.close();
        let stopped = self.machine.stop(STOP_DEADLINE).await;
        if let Some(reply) = reply {
            let answer = match &stopped {
                Ok(()) => Reply::Stopped,
                Err(error) => Reply::rejected(error.to_string()),
            };
            reply.send_and_flush(answer).await;
        }
        Ok(stopped?)
    }

    /// Serves a request. Returns the answer, and an error if the VM must end.
    async fn serve(&mut self, request: Request) -> (ReplyMessage, Option<SupervisorError>) {
        let done = match request {
            Request::Status => Ok(Reply::Status(self.status())),
            Request::Snapshot {
                staging,
                build,
                next_disk,
            } => return self.snapshot(&staging, &build, next_disk).await,
            Request::Resume => self.resume().await.map(|()| Reply::Resumed),
            Request::Published { published, memory } => self
                .memory
                .published(published, &memory)
                .map(|()| Reply::Noted),
            Request::ImageMemory => return (self.image_memory(), None),
            Request::Stop => Err(SupervisorError::Panicked),
        };
        (done.unwrap_or_else(|error| rejected(&error)).into(), None)
    }

    fn status(&self) -> MachineStatus {
        MachineStatus {
            paused: self.is_paused,
            disk: self.disk.files().to_vec(),
            pager: self.memory.status(),
            vmm_time: vmm_time::read(self.machine.pid()),
            waits_for_disk: self.machine.is_stalled() || self.disk_room.is_held(),
            ..self.status.borrow().clone()
        }
    }

    /// Returns the status to report while `request` is served.
    fn status_during(&self, request: &Request) -> MachineStatus {
        let snapshotting = matches!(request, Request::Snapshot { .. });
        MachineStatus {
            paused: self.is_paused || snapshotting,
            snapshotting,
            ..self.status()
        }
    }

    fn image_memory(&self) -> ReplyMessage {
        match self.memory.image().map(OwnedFd::try_clone) {
            Some(Ok(descriptor)) => ReplyMessage {
                reply: Reply::ImageMemory,
                descriptor: Some(descriptor),
            },
            Some(Err(error)) => Reply::rejected(error.to_string()).into(),
            None => Reply::rejected("the VM has no memory that other VMs can share").into(),
        }
    }

    async fn resume(&mut self) -> Result<(), SupervisorError> {
        if self.is_paused {
            self.machine.resume().await?;
            self.is_paused = false;
            tracing::info!("VM resumed");
            self.disk_room.note_held(false);
        }
        Ok(())
    }

    async fn snapshot(
        &mut self,
        staging: &Path,
        build: &str,
        next_disk: Option<PathBuf>,
    ) -> (ReplyMessage, Option<SupervisorError>) {
        if self.is_paused {
            return (Reply::rejected("the VM is already paused").into(), None);
        }
        match self.write(staging, build, next_disk).await {
            Ok(written) => (Reply::SnapshotTaken(written).into(), None),
            Err(error) => {
                tracing::warn!(error = error.to_report_string(), "snapshot failed");
                let ended = match self.disk.is_undecided() {
                    true => Some(SupervisorError::DiskUndecided),
                    false => self.resume().await.err(),
                };
                (rejected(&error).into(), ended)
            }
        }
    }

    async fn write(
        &mut self,
        staging: &Path,
        build: &str,
        next_disk: Option<PathBuf>,
    ) -> Result<SnapshotReport, SupervisorError> {
        let began = Instant::now();
        self.is_paused = true;
        let vmm = Some(self.machine.pid());
        self.machine.pause().await?;
        failpoint::hit("supervisor.snapshot.paused", vmm);
        let disk_layers = self.disk.files().to_vec();
        let next_disk = next_disk.as_deref();
        self.disk.before_save(&mut self.machine, next_disk).await?;
        let device = create(&staging.join(layout::DEVICE))?;
        let saved = self.machine.save(device).await?;
        self.disk.after_save(next_disk).await?;
        failpoint::hit("supervisor.snapshot.saved", vmm);
        let pid = self.machine.pid();
        let job = self.memory.writer(staging, build, pid, saved)?;
        // Runs on a separate thread, so that the services of the gateway continue.
        let written = tokio::task::spawn_blocking(job).await;
        let written = written.unwrap_or(Err(SupervisorError::Panicked))?;
        let generation = written.header.generation();
        self.memory.wrote(written.header);
        failpoint::hit("supervisor.snapshot.written", vmm);
        let paused_ms = elapsed_ms(began);
        let pages_written = written.pages_written;
        tracing::info!(
            build,
            generation,
            pages_written,
            paused_ms,
            "snapshot written"
        );
        Ok(SnapshotReport {
            generation,
            disk_layers,
            pages_seen: written.pages_seen,
            pages_written,
            paused_ms,
            vmm: self.machine.version(),
        })
    }
}

fn rejected(error: &SupervisorError) -> Reply {
    Reply::Rejected {
        reason: error.to_report_string(),
        code: Some(error.rejection_code()),
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
