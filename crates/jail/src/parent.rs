//! Process that starts a jail: the pipe that tells a jail that its parent is alive, and the PID
//! namespace that the jail begins.
//!
//! In a PID namespace of its own, a process cannot see its parent: `getppid` is 0, before and after
//! the parent's death. So the parent holds the writing end of a pipe, which the kernel closes when
//! the parent dies.

use std::{
    fs,
    io::{self, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    error::{JailError, failed},
    spec::Parent,
};

/// Pipe that shows a jail that its parent is alive.
#[derive(Debug)]
pub struct ParentPipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// End of the pipe that the parent holds for as long as the jail may live.
#[derive(Debug)]
pub struct Alive {
    _writer: OwnedFd,
}

impl ParentPipe {
    /// Creates a pipe whose reading end is inherited by children.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&reader, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(Self { reader, writer })
    }

    /// Returns the parent for the specification of the jail.
    #[must_use]
    pub fn parent(&self) -> Parent {
        Parent::Pipe(self.reader.as_raw_fd())
    }

    /// Returns the end that the jail inherits, and closes that of the parent: the parent counts as
    /// gone from now on.
    #[must_use]
    pub fn into_reader(self) -> OwnedFd {
        self.reader
    }

    /// Returns the end that the parent keeps. Called after the jail was started.
    #[must_use]
    pub fn keep(self) -> Alive {
        Alive {
            _writer: self.writer,
        }
    }
}

/// Runs `spawn`, whose child becomes the first process of a new PID namespace.
///
/// The calling thread must not create a thread in `spawn`.
///
/// # Errors
/// Returns the error of `spawn` or of the kernel.
pub fn spawn_in_pid_namespace<T>(spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = fs::File::open("/proc/thread-self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let spawned = spawn();
    // Until then, this thread cannot create threads: they would be in another namespace.
    setns(&own, CloneFlags::CLONE_NEWPID)?;
    spawned
}

/// Checks, in the jail, that the parent is alive.
#[derive(Debug)]
pub(crate) enum Watch {
    Pid(u32),
    /// Reading end of the parent's pipe, closed when the program is executed.
    Pipe(fs::File),
}

impl Watch {
    /// Takes over the descriptor that the specification names.
    pub(crate) fn new(parent: Parent) -> Result<Self, JailError> {
        match parent {
            Parent::Pid(pid) => Ok(Self::Pid(pid)),
            Parent::Pipe(fd) => {
                let step = "open the pipe of the parent";
                let pipe = fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(nix::libc::O_NONBLOCK)
                    .open(format!("/proc/self/fd/{fd}"))
                    .map_err(failed(step))?;
                nix::unistd::close(fd).map_err(crate::error::failed_nix(step))?;
                Ok(Self::Pipe(pipe))
            }
        }
    }

    /// Fails if the parent is gone.
    pub(crate) fn check(&self) -> Result<(), JailError> {
        let is_alive = match self {
            Self::Pid(pid) => std::os::unix::process::parent_id() == *pid,
            Self::Pipe(pipe) => {
                let mut pipe = pipe;
                // Nothing is ever written: the end of the file means that no writer is left.
                let read = pipe.read(&mut [0]);
                read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
            }
        };
        if is_alive {
            return Ok(());
        }
        let gone = io::ErrorKind::NotFound.into();
        Err(failed("verify that the parent is alive")(gone))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_gone_when_its_end_of_the_pipe_is_closed() {
        let pipe = ParentPipe::new().unwrap();
        let Parent::Pipe(reader) = pipe.parent() else {
            panic!("not a pipe");
        };
        // The jail closes the descriptor that it inherits, so it gets one of its own here.
        let inherited = nix::unistd::dup(&pipe.reader).unwrap();
        assert_ne!(inherited.as_raw_fd(), reader);
        let inherited = std::os::fd::IntoRawFd::into_raw_fd(inherited);
        let watch = Watch::new(Parent::Pipe(inherited)).unwrap();
        let alive = pipe.keep();
        watch.check().unwrap();
        drop(alive);
        assert!(watch.check().is_err());
    }

    #[test]
    fn only_the_next_child_is_in_a_new_pid_namespace() {
        let run = || {
            let output = std::process::Command::new("readlink")
                .arg("/proc/self/ns/pid")
                .output()?;
            io::Result::Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let own = run().unwrap();
        let new = spawn_in_pid_namespace(run).unwrap();
        assert!(new.starts_with("pid:") && new != own, "{new} {own}");
        assert_eq!(run().unwrap(), own);
        // Threads can be created again.
        std::thread::spawn(|| ()).join().unwrap();
    }
}
