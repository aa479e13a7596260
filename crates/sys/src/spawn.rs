//! Starts processes as another user, each a member of its control group from the start.
//!
//! `std::process::Command` cannot choose the control group of a new process. Moving the process
//! afterwards makes the kernel wait for all CPUs (`cgroup.procs` takes a lock that costs a grace
//! period). This module therefore calls `clone3` directly. The steps between `clone3` and `execve`
//! are in `child`. All data they need is prepared beforehand, because the child of a multi-threaded
//! process may neither allocate nor take a lock.
//!
//! This module never waits for a process that started successfully: the process's owner does,
//! through the pidfd. A process that failed to start is reaped here and leaves nothing behind.
//!
//! Sources: `clone(2)`, `cgroups(7)`, `execve(2)`, `credentials(7)`.

mod child;

use std::{
    collections::BTreeMap,
    ffi::CString,
    io::{self, PipeWriter, Read as _},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

/// User, groups, priority and limits of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Value written to `oom_score_adj`, -1000 to 1000. If memory runs out, the kernel kills
    /// processes with values above 0 before others.
    pub oom_score_adj: i16,
    /// Maximum number of open descriptors, as soft and hard limit. `None` keeps the caller's
    /// limits.
    pub open_files: Option<(u64, u64)>,
    /// True if standard input is a terminal that becomes the process's controlling terminal.
    pub controlling_terminal: bool,
}

/// Description of a process to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Path of the program, or a name that is searched in the `PATH` of `envs`.
    pub program: &'a str,
    /// Arguments, without the program's own name.
    pub args: &'a [String],
    /// Complete environment.
    pub envs: &'a BTreeMap<String, String>,
    /// Working directory, entered with the rights of the program's user.
    pub directory: &'a Path,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// User, groups and limits that the program runs with.
    pub credentials: &'a Credentials,
    /// Directory of the control group (version 2) that the process is created in. `None` means the
    /// caller's group.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A started process.
#[derive(Debug)]
pub struct Spawned {
    /// Process id, which is also the id of the process's session and process group.
    pub pid: u32,
    /// Descriptor of the process; readable once the process has ended.
    pub pidfd: OwnedFd,
}

/// Reason why a program was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// A string contains a NUL byte, or a standard descriptor would be overwritten while it is put
    /// in place.
    #[error("invalid spawn request: NUL byte in a string, or stdio descriptor below 3")]
    Invalid,
    /// The kernel created no process: no memory, no free process id, or no such control group.
    #[error("failed to create a process")]
    NoProcess(#[source] io::Error),
    /// The kernel created a process, but the process could not be set up.
    #[error("failed to set up the process")]
    NoSetup(#[source] io::Error),
    /// The user of the program cannot enter the working directory.
    #[error("failed to enter the working directory")]
    NoDirectory(#[source] io::Error),
    /// The kernel created a process, but the program could not be executed in it.
    #[error("failed to execute the program")]
    NoProgram(#[source] io::Error),
    /// The program exists, but the interpreter or loader that the program names does not.
    #[error("failed to find the interpreter of the program")]
    NoInterpreter(#[source] io::Error),
}

impl SpawnError {
    /// Converts into the kernel's error.
    #[must_use]
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Invalid => io::ErrorKind::InvalidInput.into(),
            Self::NoProcess(error)
            | Self::NoSetup(error)
            | Self::NoDirectory(error)
            | Self::NoProgram(error)
            | Self::NoInterpreter(error) => error,
        }
    }
}

/// Starts a program and returns when the program runs.
///
/// The program leads a new session, at nice 0 and the default I/O priority. Every signal has its
/// default action. The program inherits no descriptor of the caller except the three standard ones.
///
/// # Errors
/// See [`SpawnError`].
pub fn spawn(launch: &Launch<'_>) -> Result<Spawned, SpawnError> {
    if launch.stdio.iter().any(|fd| fd.as_raw_fd() <= 2) {
        return Err(SpawnError::Invalid);
    }
    let mut image = child::Image::new(launch)?;
    let (mut report, reporter) = io::pipe().map_err(SpawnError::NoProcess)?;
    let spawned = clone_into(launch.cgroup, || image.become_program(launch, &reporter))
        .map_err(SpawnError::NoProcess)?;
    drop::<PipeWriter>(reporter);
    // End of file means success: the program has replaced the child, which closed its end of the
    // pipe.
    let mut bytes = child::Report::default();
    let problem = match report.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(spawned),
        Err(error) => SpawnError::NoSetup(error),
        Ok(()) => child::decode(bytes),
    };
    reap(&spawned);
    Err(problem)
}

/// `struct clone_args` of `linux/sched.h`, in its third version.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88, "CLONE_ARGS_SIZE_VER2");

/// Signal sent to the parent when the child ends, as after `fork`.
const EXIT_SIGNAL: u64 = 17;
const _: () = assert!(libc::SIGCHLD == 17);
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks the process. The child starts in `cgroup`, runs `child` and never returns.
fn clone_into(
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce() -> std::convert::Infallible,
) -> io::Result<Spawned> {
    let number = |fd: libc::c_int| u64::try_from(fd).unwrap_or_default();
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: CLONE_PIDFD,
        pidfd: (&raw mut pidfd).addr() as u64,
        exit_signal: EXIT_SIGNAL,
        ..CloneArgs::default()
    };
    if let Some(group) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = number(group.as_raw_fd());
    }
    // The kernel receives the address of `pidfd` as a number. The compiler must not assume that
    // `pidfd` is never written.
    std::hint::black_box(&raw mut pidfd);
    // SAFETY: the structure is valid for its size, its unused fields are zero, and `pidfd` outlives
    // the call. Memory is not shared (no CLONE_VM) and no stack is given, so the child continues
    // with a copy of this stack, as after fork(2). The child only runs `child`, which follows the
    // rules of `child.rs`: no allocation, no lock, no return.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    if pid == 0 {
        child();
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Spawned {
        pid: u32::try_from(pid).unwrap_or_default(),
        // SAFETY: the kernel has written a new descriptor to `pidfd`, which has no other owner.
        pidfd: unsafe { OwnedFd::from_raw_fd(std::hint::black_box(pidfd)) },
    })
}

/// Waits for a child that did not become the program. The child has reported its error and only
/// exits.
fn reap(spawned: &Spawned) {
    let pid = libc::pid_t::try_from(spawned.pid).unwrap_or(-1);
    // SAFETY: `waitpid` takes its arguments by value, and writes nothing without a status pointer.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

fn c_string(bytes: impl Into<Vec<u8>>) -> Result<CString, SpawnError> {
    CString::new(bytes).map_err(|_| SpawnError::Invalid)
}

/// Returns the paths at which the program may be, in the search order of `execvp(3)`.
fn candidates(launch: &Launch<'_>) -> Result<Vec<CString>, SpawnError> {
    if launch.program.is_empty() {
        return Err(SpawnError::NoProgram(io::ErrorKind::NotFound.into()));
    }
    if launch.program.contains('/') {
        return Ok(vec![c_string(launch.program)?]);
    }
    let path = launch.envs.get("PATH").map_or("/bin:/usr/bin", |p| p);
    path.split(':')
        .map(|directory| Path::new(directory).join(launch.program))
        .map(|path| c_string(path.as_os_str().as_bytes()))
        .collect()
}

#[cfg(test)]
mod tests;
