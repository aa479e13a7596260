//! Between `clone3` and `execve`.
//!
//! Everything here runs in the child of a process that may have threads: it makes system calls on what was prepared before,
//! and neither allocates nor takes a lock, not even when it fails. Sources: `execve(2)`, `execvp(3)`, `ioprio_set(2)`,
//! `tty_ioctl(4)`, `proc_pid_oom_score_adj(5)`.

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

/// `ioprio_set`: the calling process.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Class best effort (2) and level 4, as `IOPRIO_PRIO_VALUE` puts them together.
const IOPRIO_BEST_EFFORT_4: libc::c_int = (2 << 13) | 4;
/// Highest signal number of Linux.
const LAST_SIGNAL: libc::c_int = 64;
/// Bytes of a signal mask, as `rt_sigaction(2)` wants to be told.
const SIGNAL_MASK_BYTES: usize = 8;
/// The kernel's `struct sigaction` with nothing set: `SIG_DFL`, no flags, no restorer, no mask.
const DEFAULT_ACTION: [u64; 4] = [0; 4];
/// No signal is blocked.
static EMPTY_MASK: u64 = 0;
/// What runs a script that does not say what runs it.
const SHELL: &CStr = c"/bin/sh";

/// All that the child needs, in the kernel's form.
pub(super) struct Image {
    /// Where the program may be.
    paths: Vec<CString>,
    directory: CString,
    oom_score_adj: Vec<u8>,
    /// Pointers into `_args`, ended by a null.
    argv: Vec<*const libc::c_char>,
    /// The shell, room for the script's path, and the script's arguments, ended by a null.
    script_argv: Vec<*const libc::c_char>,
    /// Pointers into `_envs`, ended by a null.
    envp: Vec<*const libc::c_char>,
    _args: Vec<CString>,
    _envs: Vec<CString>,
}

impl Image {
    /// # Errors
    /// If a text holds a NUL byte, or there is no program.
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

    /// Becomes the program, or reports why not and ends.
    pub(super) fn become_program(
        &mut self,
        launch: &Launch<'_>,
        reporter: &PipeWriter,
    ) -> Infallible {
        let error = match self.prepare(launch) {
            Ok(()) => self.execute(),
            Err(error) => error,
        };
        let number = error.raw_os_error().unwrap_or(libc::EINVAL).to_ne_bytes();
        let fd = reporter.as_raw_fd();
        // SAFETY: the bytes are valid for their length, and the descriptor is open.
        let _ = unsafe { libc::write(fd, number.as_ptr().cast(), number.len()) };
        // SAFETY: ends the process at once, without running anything of the parent's.
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
        // Ranks are a courtesy: a kernel that refuses them runs the process all the same.
        set_ranks();
        // SAFETY: the path ends with a NUL and outlives the call.
        check(unsafe { libc::chdir(self.directory.as_ptr()) })?;
        if let Some(limits) = launch.credentials.open_files {
            limit_open_files(limits)?;
        }
        become_user(launch.credentials)
    }

    /// Tries each place, and the shell for what the kernel takes for a script; returns why none worked.
    fn execute(&mut self) -> io::Error {
        let mut denied = false;
        for path in &self.paths {
            // SAFETY: all three are NUL-terminated or end with a null pointer, and what they point to lives in `self`.
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
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                _ => return error,
            }
        }
        io::Error::from_raw_os_error(if denied { libc::EACCES } else { libc::ENOENT })
    }
}

/// The copies stay open in the program; the originals do not.
fn put_in_place(stdio: &[BorrowedFd<'_>; 3]) -> io::Result<()> {
    for (number, fd) in (0..).zip(stdio) {
        // SAFETY: takes its arguments by value. The numbers 0 to 2 are no descriptor of `stdio`: the caller made sure.
        check(unsafe { libc::dup2(fd.as_raw_fd(), number) })?;
    }
    Ok(())
}

/// Whoever started the caller may have made it ignore or block signals, and that is inherited: Ctrl-C would do nothing.
fn reset_signals() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the action is valid for reads, and nothing is written. The raw call is used because the C library's hides
        // the signals that it keeps for itself. KILL and STOP are refused, which is fine.
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

/// Descriptors that the caller itself inherited are not the process's business.
fn close_others_on_exec() {
    // SAFETY: takes its arguments by value and marks descriptors only.
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

/// Writes a file of /proc; a failure is ignored (the file may not be there in a container).
fn write_once(path: &CStr, content: &[u8]) {
    // SAFETY: `path` is NUL-terminated and outlives the call.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return;
    }
    // SAFETY: `content` is valid for its length, and `fd` is open and ours.
    let _ = unsafe { libc::write(fd, content.as_ptr().cast(), content.len()) };
    // SAFETY: `fd` is ours and not used again.
    let _ = unsafe { libc::close(fd) };
}

fn set_ranks() {
    // SAFETY: both take their arguments by value.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    // SAFETY: as above.
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

/// Groups first, then the group, then the user: after that there is no right left to change the others.
fn become_user(credentials: &Credentials) -> io::Result<()> {
    let groups = &credentials.groups;
    // SAFETY: the pointer and the length are of one slice. The raw system calls are used because the C library's versions
    // signal other threads, which do not exist here.
    check_long(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    let (uid, gid) = (credentials.uid, credentials.gid);
    // SAFETY: takes its arguments by value.
    check_long(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: takes its arguments by value.
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
