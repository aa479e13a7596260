//! Steps of the child between `clone3` and `execve`.
//!
//! All code here runs in the child of a process that may have threads. It makes system calls on
//! data that was prepared before, and neither allocates nor takes a lock, not even when a call
//! fails. Sources: `execve(2)`, `execvp(3)`, `ioprio_set(2)`, `tty_ioctl(4)`,
//! `proc_pid_oom_score_adj(5)`.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    io::{self, PipeWriter},
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::ffi::OsStrExt as _,
    },
    ptr,
};

use super::{Credentials, Launch, SpawnError, c_string, candidates};

/// `which` argument of `ioprio_set` that selects the calling process.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Class best effort (2) and level 4, as combined by `IOPRIO_PRIO_VALUE`.
const IOPRIO_BEST_EFFORT_4: libc::c_int = (2 << 13) | 4;
/// Highest signal number of Linux.
const LAST_SIGNAL: libc::c_int = 64;
/// Size of a signal mask, in bytes, as passed to `rt_sigaction(2)`.
const SIGNAL_MASK_BYTES: usize = 8;
/// Zeroed kernel `struct sigaction`: `SIG_DFL`, no flags, no restorer, no mask.
const DEFAULT_ACTION: [u64; 4] = [0; 4];
/// Signal mask that blocks no signal.
static EMPTY_MASK: u64 = 0;
/// Interpreter for scripts without a `#!` line.
const SHELL: &CStr = c"/bin/sh";

/// Step at which the child failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Setup = 0,
    Directory = 1,
    Program = 2,
    Interpreter = 3,
}

/// Failure of the child, as sent to the parent.
///
/// | off | size | field                             |
/// |-----|------|-----------------------------------|
/// |   0 |    1 | step                              |
/// |   1 |    4 | error number, in native byte order |
pub(super) type Report = [u8; 5];

fn encode(step: Step, error: &io::Error) -> Report {
    let [a, b, c, d] = error.raw_os_error().unwrap_or(libc::EINVAL).to_ne_bytes();
    [step as u8, a, b, c, d]
}

/// Returns the error that a report describes.
pub(super) fn decode([step, number @ ..]: Report) -> SpawnError {
    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(number));
    match step {
        step if step == Step::Directory as u8 => SpawnError::NoDirectory(error),
        step if step == Step::Program as u8 => SpawnError::NoProgram(error),
        step if step == Step::Interpreter as u8 => SpawnError::NoInterpreter(error),
        _ => SpawnError::NoSetup(error),
    }
}

/// All data that the child needs, in the kernel's representation.
pub(super) struct Image {
    /// Paths at which the program may be.
    paths: Vec<CString>,
    directory: CString,
    oom_score_adj: Vec<u8>,
    /// Pointers into `_args`, terminated by a null pointer.
    argv: Vec<*const libc::c_char>,
    /// Pointer to the shell's path, a slot for the script's path, and the script's arguments,
    /// terminated by a null pointer.
    script_argv: Vec<*const libc::c_char>,
    /// Pointers into `_envs`, terminated by a null pointer.
    envp: Vec<*const libc::c_char>,
    _args: Vec<CString>,
    _envs: Vec<CString>,
}

impl Image {
    /// # Errors
    /// Fails if a string contains a NUL byte, or the program name is empty.
    pub(super) fn new(launch: &Launch<'_>) -> Result<Self, SpawnError> {
        let mut args = vec![c_string(launch.program)?];
        for arg in launch.args {
            args.push(c_string(arg.as_bytes())?);
        }
        let mut envs = Vec::with_capacity(launch.envs.len());
        for (name, value) in launch.envs {
            envs.push(c_string(format!("{name}={value}"))?);
        }
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            let all = list.iter().map(|text| text.as_ptr());
            all.chain([ptr::null()]).collect()
        };
        let argv = pointers(&args);
        let mut script_argv = vec![SHELL.as_ptr(), ptr::null()];
        script_argv.extend(&argv[1..]);
        Ok(Self {
            paths: candidates(launch)?,
            directory: c_string(launch.directory.as_os_str().as_bytes())?,
            oom_score_adj: launch.credentials.oom_score_adj.to_string().into_bytes(),
            argv,
            script_argv,
            envp: pointers(&envs),
            _args: args,
            _envs: envs,
        })
    }

    /// Executes the program, or reports the error and exits.
    pub(super) fn become_program(
        &mut self,
        launch: &Launch<'_>,
        reporter: &PipeWriter,
    ) -> Infallible {
        let (step, error) = match self.prepare(launch) {
            Err(error) => (Step::Setup, error),
            Ok(()) => match self.enter_directory() {
                Err(error) => (Step::Directory, error),
                Ok(()) => self.execute(),
            },
        };
        let report = encode(step, &error);
        let fd = reporter.as_raw_fd();
        // SAFETY: the bytes are valid for their length, and the descriptor is open.
        let _ = unsafe { libc::write(fd, report.as_ptr().cast(), report.len()) };
        // SAFETY: `_exit` ends the process at once, without running any of the parent's exit
        // handlers.
        unsafe { libc::_exit(127) }
    }

    fn prepare(&self, launch: &Launch<'_>) -> io::Result<()> {
        rustix::process::setsid()?;
        put_in_place(&launch.stdio)?;
        if launch.credentials.controlling_terminal {
            take_terminal()?;
        }
        reset_signals();
        close_others_on_exec();
        write_once(c"/proc/self/oom_score_adj", &self.oom_score_adj);
        // Priorities are best effort: if the kernel rejects them, the process runs nevertheless.
        set_ranks();
        if let Some(limits) = launch.credentials.open_files {
            limit_open_files(limits)?;
        }
        become_user(launch.credentials)
    }

    /// Enters the working directory as the program's user, who may not have the caller's rights.
    fn enter_directory(&self) -> io::Result<()> {
        // SAFETY: the path is NUL-terminated and outlives the call.
        check(unsafe { libc::chdir(self.directory.as_ptr()) })
    }

    /// Tries each path, and runs the shell for a file that the kernel reports as not executable by
    /// itself (ENOEXEC). Returns the reason why none worked.
    fn execute(&mut self) -> (Step, io::Error) {
        let (mut denied, mut incomplete) = (false, false);
        for path in &self.paths {
            // SAFETY: the path is NUL-terminated, both lists end with a null pointer, and the
            // memory they point to lives in `self`.
            unsafe { libc::execve(path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
            let mut error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::ENOEXEC) {
                self.script_argv[1] = path.as_ptr();
                let argv = self.script_argv.as_ptr();
                // SAFETY: as above.
                unsafe { libc::execve(SHELL.as_ptr(), argv, self.envp.as_ptr()) };
                error = io::Error::last_os_error();
            }
            match error.raw_os_error() {
                Some(libc::EACCES) => denied = true,
                // The kernel does not say whether the program or its interpreter is missing.
                Some(libc::ENOENT) => incomplete |= exists(path),
                Some(libc::ENOTDIR) => {}
                _ => return (Step::Program, error),
            }
        }
        let (step, number) = match (incomplete, denied) {
            (true, _) => (Step::Interpreter, libc::ENOENT),
            (false, true) => (Step::Program, libc::EACCES),
            (false, false) => (Step::Program, libc::ENOENT),
        };
        (step, io::Error::from_raw_os_error(number))
    }
}

fn exists(path: &CStr) -> bool {
    // SAFETY: the path is NUL-terminated and outlives the call.
    (unsafe { libc::access(path.as_ptr(), libc::F_OK) }) == 0
}

/// Duplicates the standard descriptors to the numbers 0 to 2. The duplicates stay open in the
/// program; the originals do not.
fn put_in_place(stdio: &[BorrowedFd<'_>; 3]) -> io::Result<()> {
    for (number, fd) in (0..).zip(stdio) {
        // SAFETY: `dup2` takes its arguments by value. The caller has checked that no descriptor of
        // `stdio` is numbered 0 to 2.
        check(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
    }
    Ok(())
}

/// Resets all signals. Ignored and blocked signals are inherited, possibly from the parent of the
/// caller; Ctrl-C, for example, would have no effect.
fn reset_signals() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the action is valid for reads, and nothing is written. The raw system call is
        // used because the C library's function hides the signals that it reserves for itself. The
        // kernel rejects KILL and STOP, which is harmless.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                ptr::null_mut::<libc::c_void>(),
                SIGNAL_MASK_BYTES,
            )
        };
    }
    // SAFETY: the mask is valid for reads, and nothing is written.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const EMPTY_MASK,
            ptr::null_mut::<libc::c_void>(),
            SIGNAL_MASK_BYTES,
        )
    };
}

/// Marks all other descriptors close-on-exec, including those that the caller itself inherited.
fn close_others_on_exec() {
    // SAFETY: `close_range` takes its arguments by value and only marks descriptors.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
}

fn take_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes its argument by value and touches no memory.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })
}

/// Writes to a file of /proc. A failure is ignored (the file may not exist in a container).
fn write_once(path: &CStr, content: &[u8]) {
    // SAFETY: `path` is NUL-terminated and outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return;
    }
    // SAFETY: `content` is valid for its length, and `fd` is open and owned by this function.
    let _ = unsafe { libc::write(fd, content.as_ptr().cast(), content.len()) };
    // SAFETY: `fd` is owned by this function and not used again.
    let _ = unsafe { libc::close(fd) };
}

fn set_ranks() {
    // SAFETY: `setpriority` takes its arguments by value.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    // SAFETY: `ioprio_set` takes its arguments by value.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            IOPRIO_WHO_PROCESS,
            0,
            IOPRIO_BEST_EFFORT_4,
        )
    };
}

fn limit_open_files((soft, hard): (u64, u64)) -> io::Result<()> {
    let limits = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the limits are valid for reads and outlive the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limits) })
}

/// Sets the supplementary groups, then the group, then the user. After the user is set, the process
/// has no right to change the groups.
fn become_user(credentials: &Credentials) -> io::Result<()> {
    let groups = &credentials.groups;
    // SAFETY: the pointer and the length belong to one slice. The raw system calls are used because
    // the C library's versions signal other threads, which do not exist here.
    check_long(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    let (uid, gid) = (credentials.uid, credentials.gid);
    // SAFETY: `setresgid` takes its arguments by value.
    check_long(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: `setresuid` takes its arguments by value.
    check_long(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    check_long(result.into())
}

fn check_long(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
