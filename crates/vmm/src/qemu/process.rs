//! QEMU process: command line, start in the jail, exit.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use tokio::net::{UnixStream, unix::pipe};
use wrenn_jail::{JailSpec, ParentPipe, Program};
use wrenn_qmp::{Qmp, QmpError};

use super::{
    command_line::{
        Inherited, command_line, environment, jail_devices, jail_files, process_limits,
    },
    control::Disks,
    events::Events,
};
use crate::{
    ControlError, DiskForm, LaunchError, Machine, MachineConfig, MachineExit, MachineFds,
    MemoryAccess, SavedMemory, StopError, VmmDriver,
    vmm_process::{Output, VmmProcess, log_output, output_pipe},
};

/// Deadline for QEMU's first response. Generous, because QEMU first maps guest memory and links a
/// hundred libraries.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Starts QEMU VMs.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Path of the `wrenn` executable, used for its `jail` command.
    wrenn_exe: PathBuf,
    /// Path of the library that is loaded into QEMU (`wrenn-preload`).
    preload: PathBuf,
    /// Path of the QEMU executable.
    qemu_exe: PathBuf,
}

impl Qemu {
    /// Creates a driver that runs QEMU in a jail made by `wrenn_exe`, with the library `preload`
    /// loaded into it.
    #[must_use]
    pub fn new(wrenn_exe: PathBuf, preload: PathBuf) -> Self {
        Self {
            wrenn_exe,
            preload,
            qemu_exe: "/usr/bin/qemu-system-x86_64".into(),
        }
    }

    fn spawn(&self, config: &MachineConfig, fds: MachineFds) -> Result<Spawned, LaunchError> {
        let io = |step| move |source| LaunchError::Io { step, source };
        let (qmp, qemu_qmp) = wrenn_qmp::socket_pair().map_err(io("create a socket pair"))?;
        let inherited = Inherited {
            memory: &fds.memory,
            pager: &fds.pager,
            userfaultfd: fds.userfaultfd.as_ref(),
            tap: &fds.tap,
            qmp: &qemu_qmp,
        };
        let parent = ParentPipe::new().map_err(io("create the pipe of the jail"))?;
        let Program { file, dirs } = Program::of_qemu(&self.qemu_exe);
        let mut files = jail_files(config, &self.preload);
        files.push(file);
        let spec = JailSpec {
            parent: parent.parent(),
            netns: Some(config.netns.clone()),
            cgroups: config.cgroups.clone(),
            uid: config.uid,
            dirs,
            files,
            devices: jail_devices(config.accel),
            argv: command_line(&self.qemu_exe, config, &inherited),
            env: environment(config.start, &inherited),
            fds: Some(inherited.numbers()),
            sockets: None,
            limits: process_limits(config.size),
            seccomp: true,
        };
        let (console, console_end) = output_pipe().map_err(io("create the console pipe"))?;
        let (stderr, stderr_end) = output_pipe().map_err(io("create a pipe"))?;
        let passed = [&fds.memory, &fds.pager, &fds.tap, &qemu_qmp];
        let passed = passed.into_iter().chain(&fds.userfaultfd);
        let passed: Vec<_> = passed.map(|fd| fd.as_fd()).collect();
        let output = Output {
            console: console_end,
            stderr: stderr_end,
        };
        let process = VmmProcess::spawn(&self.wrenn_exe, &spec, parent, &passed, output)?;
        Ok(Spawned {
            process,
            console,
            stderr,
            qmp,
        })
    }
}

struct Spawned {
    process: VmmProcess,
    console: pipe::Receiver,
    stderr: pipe::Receiver,
    qmp: UnixStream,
}

impl VmmDriver for Qemu {
    type Machine = QemuMachine;

    fn disk_form(&self) -> DiskForm {
        DiskForm::Qcow2Chain
    }

    async fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> Result<QemuMachine, LaunchError> {
        let Spawned {
            process,
            console,
            stderr,
            qmp,
        } = self.spawn(&config, fds)?;
        let negotiated = Qmp::negotiate(qmp, Events::default(), ANSWER_DEADLINE).await;
        let qmp = match negotiated {
            Ok(qmp) => qmp,
            Err(error @ QmpError::Command { .. }) => return Err(ControlError::from(error).into()),
            Err(QmpError::Deadline { deadline, .. }) => {
                return Err(LaunchError::Deadline(deadline));
            }
            Err(_) => return Err(process.ended([stderr]).await),
        };
        log_output(stderr, "QEMU");
        let mut machine = QemuMachine {
            process,
            qmp,
            disks: Disks::default(),
            console: Some(console),
        };
        machine.prepare(config.disk_rate).await?;
        Ok(machine)
    }
}

/// Running QEMU VM.
pub struct QemuMachine {
    process: VmmProcess,
    pub(super) qmp: Qmp<Events>,
    pub(super) disks: Disks,
    console: Option<pipe::Receiver>,
}

impl Machine for QemuMachine {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn version(&self) -> String {
        self.qmp
            .version()
            .map_or_else(String::new, |version| format!("qemu {version}"))
    }

    fn take_console(&mut self) -> Option<pipe::Receiver> {
        self.console.take()
    }

    async fn pause(&mut self) -> Result<(), ControlError> {
        self.pause_cpus().await
    }

    fn is_stalled(&self) -> bool {
        self.qmp.subscriber().stalled
    }

    async fn resume(&mut self) -> Result<(), ControlError> {
        self.resume_cpus().await
    }

    fn memory_access(&self) -> MemoryAccess {
        MemoryAccess::PageTables
    }

    async fn save(&mut self, file: OwnedFd) -> Result<SavedMemory, ControlError> {
        self.save_devices(file).await?;
        Ok(SavedMemory::PageTables)
    }

    async fn load(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.load_devices(file).await
    }

    async fn switch_disk(&mut self, overlay: OwnedFd) -> Result<(), ControlError> {
        self.put_overlay(overlay).await
    }

    async fn wait(&mut self) -> MachineExit {
        if !self.process.has_exited() {
            // QEMU reports the reason just before it exits, so the connection is read to its end
            // first.
            self.qmp.drain().await;
        }
        let reason = self.qmp.subscriber().shutdown_reason.as_deref();
        self.process.wait(reason).await
    }

    async fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        self.process.stop(deadline).await
    }
}
