//! Progress of a server: counters, and the order of first faults.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::page_set::PageSet;
use parking_lot::Mutex;

/// Counters of a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Missing pages that a thread of the VM waited for.
    pub demand_faults: u64,
    /// Demand faults on pages of zeros.
    pub zero_faults: u64,
    /// Demand faults on pages that were already present when the fault was handled.
    pub present_faults: u64,
    /// Requests that the kernel postponed because the address space was changing; each was retried.
    pub retries: u64,
    /// Pages read from the source for a fault.
    pub pages_loaded: u64,
    /// Pages filled with zeros around faults.
    pub pages_zeroed: u64,
    /// Prefetched pages.
    pub pages_prefetched: u64,
    /// Pages that the VM discarded.
    pub pages_removed: u64,
    /// Time spent on resolving faults.
    pub fault_time: Duration,
    /// Time spent on prefetching, including its waits for faults.
    pub prefetch_time: Duration,
    /// True if all requested pages are prefetched.
    pub prefetch_done: bool,
    /// True if the process with the memory was found to have exited.
    pub gone: bool,
}

#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) demand_faults: AtomicU64,
    pub(crate) zero_faults: AtomicU64,
    pub(crate) present_faults: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) pages_loaded: AtomicU64,
    pub(crate) pages_zeroed: AtomicU64,
    pub(crate) pages_prefetched: AtomicU64,
    pub(crate) pages_removed: AtomicU64,
    fault_nanos: AtomicU64,
    prefetch_nanos: AtomicU64,
    pub(crate) prefetch_done: AtomicBool,
    pub(crate) gone: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Debug)]
struct Record {
    limit: usize,
    order: Vec<u64>,
    seen: PageSet,
}

impl Progress {
    pub(crate) fn new(record_limit: usize, memory: u64) -> Self {
        let record = Record {
            limit: record_limit,
            order: Vec::new(),
            seen: PageSet::new(memory),
        };
        Self {
            demand_faults: AtomicU64::new(0),
            zero_faults: AtomicU64::new(0),
            present_faults: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            pages_loaded: AtomicU64::new(0),
            pages_zeroed: AtomicU64::new(0),
            pages_prefetched: AtomicU64::new(0),
            pages_removed: AtomicU64::new(0),
            fault_nanos: AtomicU64::new(0),
            prefetch_nanos: AtomicU64::new(0),
            prefetch_done: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            record: Mutex::new(record),
        }
    }

    /// Counts a fault. Records the page if this is its first fault and the record has room.
    pub(crate) fn fault(&self, offset: u64) {
        self.demand_faults.fetch_add(1, Relaxed);
        let mut record = self.record.lock();
        if record.order.len() < record.limit && !record.seen.contains(offset) {
            record.seen.insert(offset, crate::PAGE_BYTES);
            record.order.push(offset);
        }
    }

    pub(crate) fn add_fault_time(&self, time: Duration) {
        self.fault_nanos.fetch_add(nanos(time), Relaxed);
    }

    pub(crate) fn add_prefetch_time(&self, time: Duration) {
        self.prefetch_nanos.fetch_add(nanos(time), Relaxed);
    }

    pub(crate) fn recorded(&self) -> Vec<u64> {
        let record = self.record.lock();
        record.order.clone()
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            demand_faults: self.demand_faults.load(Relaxed),
            zero_faults: self.zero_faults.load(Relaxed),
            present_faults: self.present_faults.load(Relaxed),
            retries: self.retries.load(Relaxed),
            pages_loaded: self.pages_loaded.load(Relaxed),
            pages_zeroed: self.pages_zeroed.load(Relaxed),
            pages_prefetched: self.pages_prefetched.load(Relaxed),
            pages_removed: self.pages_removed.load(Relaxed),
            fault_time: Duration::from_nanos(self.fault_nanos.load(Relaxed)),
            prefetch_time: Duration::from_nanos(self.prefetch_nanos.load(Relaxed)),
            prefetch_done: self.prefetch_done.load(Relaxed),
            gone: self.gone.load(Relaxed),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
