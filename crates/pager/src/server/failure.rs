//! Failure notification of a server to its owner.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// Notification that a page server failed, with the reason. All clones report the same failure,
/// also after the server is stopped.
///
/// The descriptor becomes readable at a failure and stays readable. It must not be read.
#[derive(Debug, Clone)]
pub struct Failed {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    reason: OnceLock<String>,
}

impl Failed {
    pub(super) fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let reason = OnceLock::new();
        Ok(Self {
            inner: Arc::new(Inner { event, reason }),
        })
    }

    /// Records the reason. Only the first failure is kept.
    pub(super) fn set(&self, reason: String) {
        if self.inner.reason.set(reason).is_ok() {
            // The eventfd's counter cannot overflow, because it is written once.
            let _ = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes());
        }
    }

    /// Returns the reason of the failure with all causes, or `None` while the server works.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.inner.reason.get().map(String::as_str)
    }

    /// Waits up to `timeout` for a failure.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<&str> {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.inner.event, PollFlags::IN)];
        // The result of the poll is ignored, because only the presence of a reason counts.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        self.reason()
    }
}

impl AsFd for Failed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}
