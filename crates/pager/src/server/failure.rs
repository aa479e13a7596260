//! The one message that a server has for its owner: it cannot go on.

use std::{
    error::Error,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// Tells that a page server failed, and why. Clones tell the same, also after the server is stopped.
///
/// The descriptor becomes readable at a failure and stays so; nobody should read it.
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

    /// The first failure stays.
    pub(super) fn set(&self, reason: String) {
        if self.inner.reason.set(reason).is_ok() {
            // Cannot be full: it is written once.
            let _ = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes());
        }
    }

    /// Why the server failed, with all causes; None while it serves.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.inner.reason.get().map(String::as_str)
    }

    /// Waits at most `timeout` for a failure.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<&str> {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.inner.event, PollFlags::IN)];
        // Interrupted or not: what counts is whether there is a reason.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        self.reason()
    }
}

impl AsFd for Failed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}

/// The error and its causes, joined by colons.
pub(super) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
