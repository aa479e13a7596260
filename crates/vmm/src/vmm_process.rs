//! Process of a VMM in its jail: start, output, exit. The same for all VMMs.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    process::{Child, Command},
    time::timeout,
};
use wrenn_jail::{Alive, JailSpec, ParentPipe};

use crate::{LaunchError, MachineExit, StopError};

/// Maximum part of a VMM's standard error kept for an error message, in bytes.
const STDERR_KEEP_BYTES: u64 = 4096;

/// Maximum output of a running VMM that is logged, in bytes.
const STDERR_LOG_BYTES: usize = 64 * 1024;

/// Maximum time until a VMM that closed its control connection has exited.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// Process of a VMM. Dropping it kills the VMM.
pub(crate) struct VmmProcess {
    child: Child,
    /// Held for as long as the VMM may live.
    _alive: Alive,
    pid: u32,
    exit: Option<MachineExit>,
}

/// Output of a VMM: the ends of pipes that the VMM inherits.
pub(crate) struct Output {
    /// Standard output, which is the guest's console.
    pub(crate) console: OwnedFd,
    /// Standard error.
    pub(crate) stderr: OwnedFd,
}

impl VmmProcess {
    /// Starts a VMM in a jail, with the `jail` command of `wrenn_exe`. The jail inherits `passed`.
    pub(crate) fn spawn(
        wrenn_exe: &Path,
        spec: &JailSpec,
        parent: ParentPipe,
        passed: &[BorrowedFd<'_>],
        output: Output,
    ) -> Result<Self, LaunchError> {
        let io = |step| move |source| LaunchError::Io { step, source };
        let spec_file = spec
            .to_memfd()
            .map_err(io("write the jail specification"))?;
        for fd in passed.iter().chain([&spec_file.as_fd()]) {
            keep_across_exec(fd).map_err(io("make a descriptor inheritable"))?;
        }
        let mut jail = Command::new(wrenn_exe);
        jail.args(["jail", "--spec"])
            .arg(format!("/proc/self/fd/{}", spec_file.as_raw_fd()))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(output.console)
            .stderr(output.stderr)
            .kill_on_drop(true);
        let child = wrenn_jail::spawn_in_pid_namespace(|| jail.spawn());
        let child = child.map_err(io("start the jail"))?;
        for fd in passed {
            close_on_exec(fd).map_err(io("close a descriptor for other programs"))?;
        }
        Ok(Self {
            pid: child.id().unwrap_or_default(),
            child,
            _alive: parent.keep(),
            exit: None,
        })
    }

    /// Process ID of the VMM.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// True once [`wait`](Self::wait) or [`stop`](Self::stop) has seen the exit.
    pub(crate) const fn has_exited(&self) -> bool {
        self.exit.is_some()
    }

    /// Waits until the VMM has exited. `guest_reason` is the reason if it exits with code 0. Later
    /// calls return the same result. Cancel safe.
    pub(crate) async fn wait(&mut self, guest_reason: Option<&str>) -> MachineExit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        let exit = match self.child.wait().await {
            Ok(status) => exit_of(status, guest_reason),
            Err(error) => {
                tracing::error!(%error, "failed to wait for the VMM");
                MachineExit::Exited { code: -1 }
            }
        };
        self.exit = Some(exit.clone());
        exit
    }

    /// Kills the VMM and waits until it has exited.
    pub(crate) async fn stop(&mut self, deadline: Duration) -> Result<(), StopError> {
        if self.exit.is_some() {
            return Ok(());
        }
        match timeout(deadline, self.child.kill()).await {
            Ok(Ok(())) => {
                self.exit = Some(MachineExit::Killed { signal: 9 });
                Ok(())
            }
            Ok(Err(_)) | Err(_) => Err(StopError {
                pid: self.pid,
                deadline,
            }),
        }
    }

    /// Returns the error for a VMM that closed its connection, or exited, before its first
    /// response. `outputs` are the pipes on which it may have reported why.
    pub(crate) async fn ended(
        mut self,
        outputs: impl IntoIterator<Item = pipe::Receiver>,
    ) -> LaunchError {
        let Ok(exit) = timeout(EXIT_DEADLINE, self.wait(None)).await else {
            return LaunchError::Deadline(EXIT_DEADLINE);
        };
        let mut text = Vec::new();
        for output in outputs {
            let mut limited = output.take(STDERR_KEEP_BYTES);
            // Any output read so far is included. The exit itself is the error.
            let _ = timeout(EXIT_DEADLINE, limited.read_to_end(&mut text)).await;
        }
        LaunchError::Ended {
            exit,
            stderr: String::from_utf8_lossy(&text).trim().to_owned(),
        }
    }
}

/// Creates a pipe for the output of a VMM. The first end is non-blocking and yields what the VMM
/// writes to the second.
pub(crate) fn output_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((pipe::Receiver::from_owned_fd(reader)?, writer))
}

/// Reads a VMM's standard error until the VMM exits, so that the pipe never fills up. The first
/// part goes to the supervisor's log and the rest is discarded: a guest may be able to make the VMM
/// print, and must not fill the host's disk.
pub(crate) fn log_output(mut stderr: pipe::Receiver, vmm: &'static str) {
    tokio::spawn(async move {
        let mut buffer = [0; 1024];
        let mut left = STDERR_LOG_BYTES;
        while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
            if left > 0 {
                let text = String::from_utf8_lossy(&buffer[..read]);
                tracing::warn!(text = text.trim(), "{vmm} output");
            }
            left = left.saturating_sub(read);
        }
    });
}

fn exit_of(status: ExitStatus, guest_reason: Option<&str>) -> MachineExit {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.signal(), status.code(), guest_reason) {
        (Some(signal), _, _) => MachineExit::Killed { signal },
        (None, Some(0), Some(reason)) => MachineExit::Guest {
            reason: reason.to_owned(),
        },
        (None, code, _) => MachineExit::Exited {
            code: code.unwrap_or(-1),
        },
    }
}

fn keep_across_exec(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

fn close_on_exec(fd: impl AsFd) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}
