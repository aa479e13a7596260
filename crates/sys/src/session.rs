//! Processes that outlive the one that started them, and what they inherit.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

/// Makes `command` start as the leader of a session of its own: no signal to the caller's process group or terminal reaches it.
pub fn in_new_session(command: &mut Command) -> &mut Command {
    let set_session = || {
        rustix::process::setsid()?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: `setsid` is async-signal-safe and the closure neither allocates nor takes a lock: it may run between fork
    // and exec of a process with many threads.
    unsafe { command.pre_exec(set_session) }
}

/// Makes `command` inherit `fd`, under the number that is returned.
pub fn inherit(command: &mut Command, fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    let keep = move || {
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: `fcntl` is async-signal-safe and the closure neither allocates nor takes a lock. The descriptor is the closure's
    // own, so it is open in the child.
    unsafe { command.pre_exec(keep) };
    number
}

/// Takes over a descriptor that this process inherited under `number`. Its own children do not get it.
///
/// Call it once for a number, before anything else opens files: whoever else uses the number would share the descriptor.
///
/// # Errors
/// If there is none.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: only looked at; the number is not negative. If it is open it was inherited: the caller vouches that nothing of
    // this process has opened it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as the call before succeeded, and nobody else owns it, as the caller vouches.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
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
