//! Processes that outlive the process that started them, and the descriptors that they inherit.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

/// Makes `command` start as the leader of a new session. Signals to the caller's process group or
/// terminal do not reach the new process.
pub fn in_new_session(command: &mut Command) -> &mut Command {
    let set_session = || {
        rustix::process::setsid()?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: `setsid` is async-signal-safe, and the closure neither allocates nor takes a lock. It
    // may therefore run between fork and exec of a multi-threaded process.
    unsafe { command.pre_exec(set_session) }
}

/// Makes `command` inherit `fd` and returns the descriptor's number in the child.
pub fn inherit(command: &mut Command, fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    let keep = move || {
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: `fcntl` is async-signal-safe, and the closure neither allocates nor takes a lock. The
    // closure owns the descriptor, so the descriptor is open in the child.
    unsafe { command.pre_exec(keep) };
    number
}

/// Takes ownership of a descriptor that this process inherited under `number`. Children of this
/// process do not inherit the descriptor.
///
/// Call this function once per number, before the process opens other files. Any other user of the
/// number would share the descriptor.
///
/// # Errors
/// `InvalidInput` if `number` is 2 or less; the kernel's error if no such descriptor is open.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is only inspected, and the number is not negative. If the descriptor
    // is open, it was inherited: the caller guarantees that this process has not opened it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open, as the previous call succeeded, and the caller guarantees
    // that it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes a program that this process executes inherit the descriptors 0 to 2 and `kept`, and no
/// others.
///
/// # Errors
/// The kernel's error, for example if one of `kept` is not open.
pub fn inherit_only(kept: &[RawFd]) -> io::Result<()> {
    let (first, last, flags) = (3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: the call takes no pointers, and sets a flag of open descriptors only.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    for number in kept.iter().filter(|number| **number > 2) {
        // SAFETY: the descriptor's flag is only set. If it is not open, the call fails.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_leads_a_session_of_its_own() {
        let mut command = Command::new("sleep");
        command.arg("30");
        let mut child = in_new_session(&mut command).spawn().expect("sleep starts");
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("runs");
        child.kill().expect("runs");
        child.wait().expect("ends");
        let after_name = stat.rsplit_once(')').expect("has a name").1;
        let session = after_name.split_whitespace().nth(3).expect("has a session");
        assert_eq!(session, child.id().to_string());
    }

    #[test]
    fn an_inherited_descriptor_can_be_read() {
        let mut file = std::fs::File::from(
            rustix::fs::memfd_create(c"inherited", rustix::fs::MemfdFlags::CLOEXEC)
                .expect("a memfd"),
        );
        io::Write::write_all(&mut file, b"content").expect("room");
        let mut command = Command::new("sh");
        let number = inherit(&mut command, file.into());
        command.args(["-c", &format!("cat /proc/self/fd/{number}")]);
        let output = command.output().expect("sh runs");
        assert_eq!(output.stdout, b"content");
    }
}
