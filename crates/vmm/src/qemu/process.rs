//! QEMU process: command line, start in the jail, exit.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::{
    io::AsyncReadExt as _,
    net::{UnixStream, unix::pipe},
    process::{Child, ChildStderr, Command},
    time::timeout,
};
use wrenn_jail::{Alive, JailSpec, ParentPipe, Program};
use wrenn_qmp::{Qmp, QmpError};

use super::{
    command_line::{
        Inherited, command_line, environment, jail_devices, jail_files, process_limits,
    },
    control::Disks,
    events::Events,
};
use crate::{
    ControlError, LaunchError, Machine, MachineConfig, MachineExit, MachineFds, StopError,
    VmmDriver,
};

/// Deadline for QEMU's first response. Generous, because QEMU first maps guest memory and links a
/// hundred libraries.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Maximum part of QEMU's standard error kept for an error message, in bytes.
const STDERR_KEEP_BYTES: u64 = 4096;

/// Maximum output of a running QEMU that is logged, in bytes.
const STDERR_LOG_BYTES: usize = 64 * 1024;

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
        let spec_file = spec
            .to_memfd()
            .map_err(io("write the jail specification"))?;
        let (console, console_end) = console_pipe().map_err(io("create the console pipe"))?;
        let passed = [&fds.memory, &fds.pager, &fds.tap, &qemu_qmp, &spec_file];
        for fd in passed.into_iter().chain(&fds.userfaultfd) {
            keep_across_exec(fd).map_err(io("make a descriptor inheritable"))?;
        }
        let mut jail = Command::new(&self.wrenn_exe);
        jail.args(["jail", "--spec"])
            .arg(format!("/proc/self/fd/{}", spec_file.as_raw_fd()))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(console_end)
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = wrenn_jail::spawn_in_pid_namespace(|| jail.spawn());
        Ok(Spawned {
            child: child.map_err(io("start the jail"))?,
            alive: parent.keep(),
            console,
            qmp,
        })
    }
}

struct Spawned {
    child: Child,
    alive: Alive,
    console: pipe::Receiver,
    qmp: UnixStream,
}

impl VmmDriver for Qemu {
    type Machine = QemuMachine;

    async fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> Result<QemuMachine, LaunchError> {
        let Spawned {
            mut child,
            alive,
            console,
            qmp,
        } = self.spawn(&config, fds)?;
        let pid = child.id().unwrap_or_default();
        let mut stderr = child.stderr.take();
        let negotiated = Qmp::negotiate(qmp, Events::default(), ANSWER_DEADLINE).await;
        let qmp = match negotiated {
            Ok(qmp) => qmp,
            Err(error @ QmpError::Command { .. }) => return Err(ControlError::from(error).into()),
            Err(QmpError::Deadline { deadline, .. }) => {
                return Err(LaunchError::Deadline(deadline));
            }
            Err(_) => return Err(ended(&mut child, stderr).await),
        };
        if let Some(stderr) = stderr.take() {
            log_stderr(stderr);
        }
        let mut machine = QemuMachine {
            child,
            _alive: alive,
            pid,
            qmp,
            disks: Disks::default(),
            console: Some(console),
            exit: None,
        };
        machine.prepare(config.disk_rate).await?;
        Ok(machine)
    }
}

/// Builds the error for a QEMU that closed the connection before its greeting.
async fn ended(child: &mut Child, stderr: Option<ChildStderr>) -> LaunchError {
    let grace = Duration::from_secs(2);
    let exit = match timeout(grace, child.wait()).await {
        Ok(Ok(status)) => exit_of(status, None),
        Ok(Err(_)) | Err(_) => return LaunchError::Deadline(grace),
    };
    let mut text = String::new();
    if let Some(stderr) = stderr {
        let mut limited = stderr.take(STDERR_KEEP_BYTES);
        // Any output read so far is included. The exit itself is the error.
        let _ = timeout(grace, limited.read_to_string(&mut text)).await;
    }
    LaunchError::Ended {
        exit,
        stderr: text.trim().to_owned(),
    }
}

/// Reads QEMU's standard error until QEMU exits, so that the pipe never fills up. The first part
/// goes to the supervisor's log and the rest is discarded: a guest may be able to make QEMU print,
/// and must not fill the host's disk.
fn log_stderr(mut stderr: ChildStderr) {
    tokio::spawn(async move {
        let mut buffer = [0; 1024];
        let mut left = STDERR_LOG_BYTES;
        while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
            if left > 0 {
                let text = String::from_utf8_lossy(&buffer[..read]);
                tracing::warn!(text = text.trim(), "QEMU output");
            }
            left = left.saturating_sub(read);
        }
    });
}

/// Running QEMU VM.
pub struct QemuMachine {
    child: Child,
    /// Held for as long as the VMM may live.
    _alive: Alive,
    pid: u32,
    pub(super) qmp: Qmp<Events>,
    pub(super) disks: Disks,
    console: Option<pipe::Receiver>,
    exit: Option<MachineExit>,
}

impl Machine for QemuMachine {
    fn pid(&self) -> u32 {
        self.pid
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

    async fn save(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.save_devices(file).await
    }

    async fn load(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.load_devices(file).await
    }

    async fn switch_disk(&mut self, overlay: OwnedFd) -> Result<(), ControlError> {
        self.put_overlay(overlay).await
    }

    async fn wait(&mut self) -> MachineExit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        // QEMU reports the reason just before it exits, so the connection is read to its end first.
        self.qmp.drain().await;
        let exit = match self.child.wait().await {
            Ok(status) => {
                let reason = self.qmp.subscriber().shutdown_reason.as_deref();
                exit_of(status, reason)
            }
            Err(error) => {
                tracing::error!(%error, "failed to wait for QEMU");
                MachineExit::Exited { code: -1 }
            }
        };
        self.exit = Some(exit.clone());
        exit
    }

    async fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        let failed = StopError {
            pid: self.pid,
            deadline,
        };
        if self.exit.is_some() {
            return Ok(());
        }
        match timeout(deadline, self.child.kill()).await {
            Ok(Ok(())) => {
                self.exit = Some(MachineExit::Killed { signal: 9 });
                Ok(())
            }
            Ok(Err(_)) | Err(_) => Err(failed),
        }
    }
}

fn exit_of(status: std::process::ExitStatus, reason: Option<&str>) -> MachineExit {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.signal(), status.code(), reason) {
        (Some(signal), _, _) => MachineExit::Killed { signal },
        (None, Some(0), Some(reason)) => MachineExit::Guest {
            reason: reason.to_owned(),
        },
        (None, code, _) => MachineExit::Exited {
            code: code.unwrap_or(-1),
        },
    }
}

/// Creates the pipe of the guest's console. The first end is non-blocking and yields what QEMU
/// writes to the second.
fn console_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((pipe::Receiver::from_owned_fd(reader)?, writer))
}

fn keep_across_exec(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
