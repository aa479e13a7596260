//! Processes that outlive the one that started them.

use std::{io, os::unix::process::CommandExt as _, process::Command};

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
}
