//! Firecracker process: start in the jail, exit.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::fs::{Gid, Mode, Uid, fchmod, fchown};
use tokio::net::unix::pipe;
use wrenn_jail::{JailSpec, ParentPipe, Program, SocketDir};
use wrenn_proto::supervise::Accel;

use super::{
    api::BalloonStatistics,
    client::{Client, Deadlines},
    command_line::{command_line, jail_devices, jail_files, process_limits},
    control::{Channels, Control, Pages},
    events::log_failures,
    files::{SnapshotFiles, descriptor_path},
};
use crate::{
    ControlError, DiskForm, LaunchError, Machine, MachineConfig, MachineExit, MachineFds,
    MemoryAccess, SavedMemory, Start, StopError, VmmDriver,
    vmm_process::{Output, VmmProcess, log_output, output_pipe},
};

/// Reason of an exit with code 0. Firecracker does not tell a reset from a shutdown.
const GUEST_REASON: &str = "guest-shutdown";

/// Path of the log: standard error, as Firecracker sees it.
const LOG_PATH: &str = "/proc/self/fd/2";

/// Source of guest memory in a restore. `docs/decisions/0043` compares them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestoreMemory {
    /// Page server. Memory is anonymous, one copy per VM.
    #[default]
    Paged,
    /// Private mapping of [`MachineFds::memory`], which must have all of its content. VMs of one
    /// snapshot share the pages that they do not change.
    Mapped,
}

/// Starts Firecracker VMs.
#[derive(Debug, Clone)]
pub struct Firecracker {
    /// Path of the `wrenn` executable, used for its `jail` command.
    wrenn_exe: PathBuf,
    /// Path of the Firecracker executable.
    firecracker_exe: PathBuf,
    restore_memory: RestoreMemory,
}

impl Firecracker {
    /// Creates a driver that runs `firecracker_exe`, a statically linked program, in a jail made by
    /// `wrenn_exe`. Restored VMs have a page server.
    #[must_use]
    pub fn new(wrenn_exe: PathBuf, firecracker_exe: PathBuf) -> Self {
        Self {
            wrenn_exe,
            firecracker_exe,
            restore_memory: RestoreMemory::default(),
        }
    }

    /// Sets the source of guest memory in a restore.
    #[must_use]
    pub fn restore_memory(self, restore_memory: RestoreMemory) -> Self {
        Self {
            restore_memory,
            ..self
        }
    }

    fn spawn(&self, config: &MachineConfig, fds: MachineFds) -> Result<Spawned, LaunchError> {
        let io = |step| move |source| LaunchError::Io { step, source };
        // Firecracker attaches to the TAP device by name, which is possible only once.
        drop(fds.tap);
        let uid = config.uid;
        let sockets = SocketDir::new(uid).map_err(io("create the directory for sockets"))?;
        let files = SnapshotFiles::create(&config.work_dir, uid);
        let files = files.map_err(io("create the files of snapshots"))?;
        let (console, console_end) = output_pipe().map_err(io("create the console pipe"))?;
        let (log, log_end) = pipe_of(uid).map_err(io("create the pipe of the log"))?;
        let (metrics, metrics_end) = pipe_of(uid).map_err(io("create the pipe of the metrics"))?;
        let (pages, memory) = self.pages(config.start, fds.memory, fds.pager)?;
        let mut inherited = files.descriptors().to_vec();
        inherited.push(metrics_end.as_fd());
        inherited.extend(memory.as_ref().map(|memory| memory.as_fd()));
        let parent = ParentPipe::new().map_err(io("create the pipe of the jail"))?;
        let is_paged = matches!(pages, Some(Pages::Served(_)));
        let spec = self.jail(config, &parent, &inherited, &sockets, is_paged);
        let mut passed = inherited.clone();
        passed.push(sockets.as_fd());
        let output = Output {
            console: console_end,
            stderr: log_end,
        };
        let process = VmmProcess::spawn(&self.wrenn_exe, &spec, parent, &passed, output)?;
        let metrics_path = descriptor_path(metrics_end.as_raw_fd());
        Ok(Spawned {
            process,
            console,
            log,
            metrics,
            channels: Channels {
                client: Client::new(sockets),
                files,
                log_path: LOG_PATH.to_owned(),
                metrics_path,
                pages,
            },
        })
    }

    /// Returns the source of guest memory, and the memory that Firecracker inherits if it maps it.
    fn pages(
        &self,
        start: Start,
        memory: OwnedFd,
        pager: OwnedFd,
    ) -> Result<(Option<Pages>, Option<OwnedFd>), LaunchError> {
        match (start, self.restore_memory) {
            (Start::Boot, _) => Ok((None, None)),
            (Start::Restore, RestoreMemory::Paged) => Ok((Some(Pages::Served(pager)), None)),
            (Start::Restore, RestoreMemory::Mapped) => {
                show(&memory).map_err(|source| LaunchError::Io {
                    step: "show the snapshot's memory to the VMM",
                    source,
                })?;
                let path = descriptor_path(memory.as_raw_fd());
                Ok((Some(Pages::Mapped(path)), Some(memory)))
            }
        }
    }

    /// Returns the jail of a VM.
    fn jail(
        &self,
        config: &MachineConfig,
        parent: &ParentPipe,
        inherited: &[BorrowedFd<'_>],
        sockets: &SocketDir,
        is_paged: bool,
    ) -> JailSpec {
        let Program { file, dirs } = Program::without_libraries(&self.firecracker_exe);
        let mut files = jail_files(config);
        files.push(file);
        let numbers = inherited.iter().map(|fd| fd.as_raw_fd());
        JailSpec {
            parent: parent.parent(),
            netns: Some(config.netns.clone()),
            cgroups: config.cgroups.clone(),
            uid: config.uid,
            dirs,
            files,
            devices: jail_devices(is_paged),
            argv: command_line(&self.firecracker_exe, config),
            env: Vec::new(),
            fds: Some(numbers.collect()),
            sockets: Some(sockets.as_fd().as_raw_fd()),
            limits: process_limits(config.size),
            seccomp: true,
        }
    }
}

struct Spawned {
    process: VmmProcess,
    console: pipe::Receiver,
    log: pipe::Receiver,
    metrics: pipe::Receiver,
    channels: Channels,
}

impl VmmDriver for Firecracker {
    type Machine = FirecrackerMachine;

    fn disk_form(&self) -> DiskForm {
        DiskForm::Raw
    }

    async fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> Result<FirecrackerMachine, LaunchError> {
        if config.accel != Accel::Kvm {
            return Err(LaunchError::Unsupported("software emulation"));
        }
        let Spawned {
            mut process,
            console,
            log,
            metrics,
            channels,
        } = self.spawn(&config, fds)?;
        let starting = start(channels, &config);
        let started = tokio::select! {
            control = starting => Some(control),
            // A VMM that exits before its API starts would be waited for in vain.
            _ = process.wait(None) => None,
        };
        let control = match started {
            Some(Ok(control)) => control,
            // The connection broke: the VMM has exited, or is about to.
            None | Some(Err(LaunchError::Control(ControlError::Io { .. }))) => {
                // Until it has a log, Firecracker reports errors on its standard output.
                return Err(process.ended([log, console]).await);
            }
            Some(Err(error)) => return Err(error),
        };
        log_output(log, "Firecracker");
        log_failures(metrics);
        let access = MemoryAccess::Files {
            sends_handshake: control.sends_handshake(),
        };
        Ok(FirecrackerMachine {
            process,
            control,
            access,
            console: Some(console),
        })
    }
}

/// Attaches to a new process and, in a boot, starts the guest.
async fn start(channels: Channels, config: &MachineConfig) -> Result<Control, LaunchError> {
    let control = Control::attach(channels, config, Deadlines::default()).await?;
    if config.start == Start::Boot {
        control.boot(config).await?;
    }
    Ok(control)
}

/// Creates a pipe whose writing end a process of `uid` can open again by its descriptor.
fn pipe_of(uid: u32) -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = output_pipe()?;
    fchown(&writer, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
    Ok((reader, writer))
}

/// Permits other users to open the memory of a snapshot for reading. It has no name, so only VMMs
/// that inherit it can do so.
fn show(memory: &OwnedFd) -> io::Result<()> {
    Ok(fchmod(memory, Mode::RUSR | Mode::RGRP | Mode::ROTH)?)
}

/// Running Firecracker VM.
pub struct FirecrackerMachine {
    process: VmmProcess,
    control: Control,
    access: MemoryAccess,
    console: Option<pipe::Receiver>,
}

impl FirecrackerMachine {
    /// Returns the memory statistics of the guest.
    ///
    /// # Errors
    /// `Rejected` if the VM has no balloon; other errors if the VMM does not answer.
    pub async fn balloon_statistics(&self) -> Result<BalloonStatistics, ControlError> {
        self.control.balloon_statistics().await
    }
}

impl Machine for FirecrackerMachine {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn version(&self) -> String {
        format!("firecracker {}", self.control.version().as_str())
    }

    fn take_console(&mut self) -> Option<pipe::Receiver> {
        self.console.take()
    }

    async fn pause(&mut self) -> Result<(), ControlError> {
        self.control.pause().await
    }

    async fn resume(&mut self) -> Result<(), ControlError> {
        self.control.resume().await
    }

    /// Always false: Firecracker reports a failed write to the guest.
    fn is_stalled(&self) -> bool {
        false
    }

    fn memory_access(&self) -> MemoryAccess {
        self.access
    }

    async fn save(&mut self, file: OwnedFd) -> Result<SavedMemory, ControlError> {
        self.control.save(file).await.map(SavedMemory::File)
    }

    async fn load(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.control.load(file).await
    }

    async fn switch_disk(&mut self, overlay: OwnedFd) -> Result<(), ControlError> {
        drop(overlay);
        let operation = "put an overlay on a raw disk";
        Err(ControlError::Unsupported { operation })
    }

    async fn wait(&mut self) -> MachineExit {
        self.process.wait(Some(GUEST_REASON)).await
    }

    async fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        self.process.stop(deadline).await
    }
}
