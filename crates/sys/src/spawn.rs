//! Starts processes of another user, each in its control group from its first moment.
//!
//! `std::process::Command` cannot say into which group a process is born, and moving it there afterwards makes the kernel
//! wait for all its CPUs (`cgroup.procs` takes a lock that costs a grace period): so this calls `clone3` itself. What
//! happens between that and `execve` is in `child`; all it needs is made before, because the child of a process with
//! threads may neither allocate nor take a lock.
//!
//! Nothing here waits for a process that was started: its owner does, by the pidfd. A process that could not be started is
//! waited for here and leaves nothing behind.
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

/// Who a process runs as, and how it is ranked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All other groups.
    pub groups: Vec<u32>,
    /// Written to `oom_score_adj`: above 0 it is killed before others when memory runs out; -1000 to 1000.
    pub oom_score_adj: i16,
    /// How many descriptors it may have open, soft and hard limit; `None`: as many as the caller.
    pub open_files: Option<(u64, u64)>,
    /// Whether standard input is a terminal that becomes the process's controlling terminal.
    pub controlling_terminal: bool,
}

/// What is started, and how.
#[derive(Debug)]
pub struct Launch<'a> {
    /// A path, or a name that is looked for in the `PATH` of `envs`.
    pub program: &'a str,
    /// Arguments, without the program's own name.
    pub args: &'a [String],
    /// The whole environment.
    pub envs: &'a BTreeMap<String, String>,
    /// Working directory; it is entered with the caller's rights.
    pub directory: &'a Path,
    /// Standard input, output and error.
    pub stdio: [BorrowedFd<'a>; 3],
    /// Who it runs as.
    pub credentials: &'a Credentials,
    /// The directory of the control group (version 2) that it is born into; `None`: the caller's.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A process that was started.
#[derive(Debug)]
pub struct Spawned {
    /// Its id, which is that of its session and process group as well.
    pub pid: u32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// A text holds a NUL byte, or a descriptor would be overwritten while it is put in place.
    #[error("the request cannot be put into the kernel's words")]
    Invalid,
    /// There was no new process: no memory, no number left, or no such control group.
    #[error("no process could be made")]
    NoProcess(#[source] io::Error),
    /// There was one, and it did not become the program.
    #[error("the program could not be executed")]
    NoProgram(#[source] io::Error),
}

impl SpawnError {
    /// What the kernel said.
    #[must_use]
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Invalid => io::ErrorKind::InvalidInput.into(),
            Self::NoProcess(error) | Self::NoProgram(error) => error,
        }
    }
}

/// Starts a program in a session of its own, at nice 0 and the default I/O rank, with every signal handled by default and
/// no descriptor of the caller's but the three. Returns when the program runs.
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
    // The end of file is the good news: the program has taken the child's place, and closed its end.
    let mut problem = [0; 4];
    let problem = match report.read_exact(&mut problem) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(spawned),
        Err(error) => error,
        Ok(()) => io::Error::from_raw_os_error(i32::from_ne_bytes(problem)),
    };
    reap(&spawned);
    Err(SpawnError::NoProgram(problem))
}

/// `struct clone_args` of `linux/sched.h`, as of its third version.
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

/// Signal that a child's end sends, as after `fork`.
const EXIT_SIGNAL: u64 = 17;
const _: () = assert!(libc::SIGCHLD == 17);
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Splits the process as `fork` does; the child, in `cgroup` from the start, runs `child` and never comes back.
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
    // Its address goes to the kernel as a number: the compiler must not think that nobody writes there.
    std::hint::black_box(&raw mut pidfd);
    // SAFETY: the structure is valid for its size, its unused fields are zero, and `pidfd` lives through the call. Memory is
    // not shared (no CLONE_VM) and no stack is given, so the child goes on with a copy of this one, as after fork(2). The
    // child runs `child` only, which keeps the rules of `child.rs`: no allocation, no lock, no return.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    if pid == 0 {
        child();
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Spawned {
        pid: u32::try_from(pid).unwrap_or_default(),
        // SAFETY: the kernel has written a new descriptor there, which nobody else owns.
        pidfd: unsafe { OwnedFd::from_raw_fd(std::hint::black_box(pidfd)) },
    })
}

/// A child that became nothing is on its way out: it has reported, and only exits.
fn reap(spawned: &Spawned) {
    let pid = libc::pid_t::try_from(spawned.pid).unwrap_or(-1);
    // SAFETY: takes its arguments by value; without a status pointer nothing is written.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

fn c_string(bytes: impl Into<Vec<u8>>) -> Result<CString, SpawnError> {
    CString::new(bytes).map_err(|_| SpawnError::Invalid)
}

/// Where a program may be: as `execvp(3)` looks.
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
