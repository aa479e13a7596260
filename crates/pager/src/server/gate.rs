//! Gate that gives faults priority over prefetching.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

/// Maximum time of one wait before the state is checked again.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Gate that is closed while faults are being resolved. A wakeup that arrives too early is
/// harmless, because every wait is bounded and the state is checked again.
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
        // A wakeup costs a system call, so it is sent only if a thread waits.
        if self.waiting.load(Ordering::SeqCst) {
            self.opened.notify_all();
        }
    }

    /// Waits until no fault is being resolved, or until `stopping` is set.
    pub(crate) fn pass(&self, stopping: &AtomicBool) {
        while self.closed.load(Ordering::SeqCst) && !stopping.load(Ordering::Relaxed) {
            self.pause();
        }
    }

    /// Waits until the next batch of faults is resolved, at most `RETRY_INTERVAL`.
    pub(crate) fn pause(&self) {
        let mut guard = self.lock.lock();
        self.waiting.store(true, Ordering::SeqCst);
        let _ = self.opened.wait_for(&mut guard, RETRY_INTERVAL);
        self.waiting.store(false, Ordering::SeqCst);
    }
}
