//! End of a started process.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    process::ExitStatus,
};

use rustix::process::{WaitId, WaitIdOptions, WaitIdStatus, waitid};
use tokio::io::{Interest, unix::AsyncFd};
use wrenn_sys::spawn::Spawned;

/// Bit of a wait status that reports a core dump.
const CORE_DUMPED: i32 = 0x80;

/// Started process whose end must be waited for.
#[derive(Debug)]
pub struct Child {
    /// Process id. No other process can have it until [`wait`](Self::wait) has returned.
    pub pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Takes over a process that was just started.
    ///
    /// # Errors
    /// Fails if the pidfd cannot be registered with the runtime.
    pub fn new(spawned: Spawned) -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "sound for a type that owns its descriptor, as this one does"
        )]
        let pidfd = AsyncFd::with_interest(spawned.pidfd, Interest::READABLE)?;
        Ok(Self {
            pid: spawned.pid,
            pidfd,
        })
    }

    /// Waits for the end of the process. Cancel safe.
    ///
    /// # Errors
    /// Fails if other code has waited for the process.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            let mut readable = self.pidfd.readable().await?;
            let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
            if let Some(end) = waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)? {
                return Ok(status(&end));
            }
            readable.clear_ready();
        }
    }
}

/// Converts the end of a process to the status format of `wait(2)`.
fn status(end: &WaitIdStatus) -> ExitStatus {
    let raw = match (end.exit_status(), end.terminating_signal()) {
        (Some(code), _) => (code & 0xff) << 8,
        (None, Some(signal)) if end.dumped() => signal | CORE_DUMPED,
        (None, signal) => signal.unwrap_or_default(),
    };
    ExitStatus::from_raw(raw)
}
