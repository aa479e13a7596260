//! Processes of another user: what must happen between fork and exec.
//!
//! Sources: `credentials(7)`, `ioprio_set(2)`, `tty_ioctl(4)`, `proc_pid_oom_score_adj(5)`.

use std::{ffi::CStr, io, os::unix::process::CommandExt as _, process::Command};

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
    /// Whether standard input is a terminal that becomes the process's controlling terminal.
    pub controlling_terminal: bool,
}

/// `ioprio_set`: the calling process.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Class best effort (2) and level 4, as `IOPRIO_PRIO_VALUE` puts them together.
const IOPRIO_BEST_EFFORT_4: libc::c_int = (2 << 13) | 4;

/// Makes `command` start as another user, in a session of its own, at nice 0 and the default I/O rank, with every signal
/// handled by default and no descriptor of the caller's but standard input, output and error.
///
/// The working directory is entered before, with the caller's rights.
pub fn as_user(command: &mut Command, credentials: Credentials) -> &mut Command {
    let oom_score_adj = format!("{}", credentials.oom_score_adj).into_bytes();
    let prepare = move || {
        rustix::process::setsid()?;
        if credentials.controlling_terminal {
            take_terminal()?;
        }
        reset_signals();
        close_others_on_exec();
        write_once(c"/proc/self/oom_score_adj", &oom_score_adj);
        // Ranks are a courtesy: a kernel that refuses them runs the process all the same.
        set_ranks();
        become_user(&credentials)
    };
    // SAFETY: the closure runs between fork and exec. It makes system calls only, on data that was prepared before the fork:
    // it neither allocates nor takes a lock.
    unsafe { command.pre_exec(prepare) }
}

/// Highest signal number of Linux.
const LAST_SIGNAL: libc::c_int = 64;
/// Bytes of a signal mask, as `rt_sigaction(2)` wants to be told.
const SIGNAL_MASK_BYTES: usize = 8;
/// The kernel's `struct sigaction` with nothing set: `SIG_DFL`, no flags, no restorer, no mask.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Whoever started the caller may have made it ignore signals, and that is inherited: Ctrl-C would do nothing.
fn reset_signals() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the action is valid for reads, and nothing is written. The raw call is used because the C library's hides
        // the signals that it keeps for itself. KILL and STOP are refused, which is fine.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                SIGNAL_MASK_BYTES,
            )
        };
    }
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

/// Groups first, then the group, then the user: after that there is no right left to change the others.
fn become_user(credentials: &Credentials) -> io::Result<()> {
    let groups = &credentials.groups;
    // SAFETY: the pointer and the length are of one slice. The raw system calls are used because the C library's versions
    // signal other threads, which do not exist between fork and exec.
    check_long(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    let (uid, gid) = (credentials.uid, credentials.gid);
    // SAFETY: takes its arguments by value.
    check_long(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: takes its arguments by value.
    check_long(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn check_long(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_as(uid: u32, groups: &[u32], script: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let credentials = Credentials {
            uid,
            gid: uid,
            groups: groups.to_vec(),
            oom_score_adj: 100,
            controlling_terminal: false,
        };
        let output = as_user(&mut command, credentials).output().expect("runs");
        String::from_utf8(output.stdout).expect("text")
    }

    #[test]
    fn a_process_has_the_users_groups_and_no_other() {
        let ids = run_as(65_534, &[100, 101], "id -u; id -g; id -G");
        assert_eq!(ids, "65534\n65534\n65534 100 101\n");
        assert_eq!(run_as(65_534, &[], "id -G"), "65534\n");
    }

    #[test]
    fn signals_and_descriptors_of_the_caller_are_not_handed_down() {
        // Listing the folder would open one more: the shell asks for each number.
        let script = "grep SigIgn /proc/self/status; \
                      for n in 0 1 2 3 4 5 6 7 8 9; do [ -e /proc/$$/fd/$n ] && echo $n; done";
        let signals = run_as(0, &[], script);
        let mut words = signals.split_whitespace();
        assert_eq!(words.next(), Some("SigIgn:"));
        assert_eq!(words.next(), Some("0000000000000000"));
        assert!(words.eq(["0", "1", "2"]), "{signals}");
    }

    #[test]
    fn ranks_are_the_defaults_but_for_memory() {
        let ranks = run_as(0, &[], "nice; cat /proc/self/oom_score_adj");
        assert_eq!(ranks, "0\n100\n");
    }
}
