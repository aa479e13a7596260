//! Keeps loading ahead out of the way of faults.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// The longest wait before looking again.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Closed while faults are being answered. Nothing is lost if a signal comes too early: a wait looks again by itself.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    waiting: AtomicBool,
    lock: Mutex<()>,
    opened: Condvar,
}

impl Gate {
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        // Waking costs a system call, which only one who waits is worth.
        if self.waiting.load(Ordering::SeqCst) {
            self.opened.notify_all();
        }
    }

    /// Waits until no fault is being answered, or `stopping`.
    pub(crate) fn pass(&self, stopping: &AtomicBool) {
        while self.closed.load(Ordering::SeqCst) && !stopping.load(Ordering::Relaxed) {
            self.pause();
        }
    }

    /// Waits for the next batch of faults to be answered, or a moment.
    pub(crate) fn pause(&self) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(true, Ordering::SeqCst);
        let _ = self.opened.wait_timeout(guard, LOOK_AGAIN);
        self.waiting.store(false, Ordering::SeqCst);
    }
}
