//! Memory of the host that is promised to VMs.
//!
//! A create, a resume and each copy of a fork reserve the memory of their VM before anything is
//! created. A reservation is released when it is dropped, which its owner does when the processes
//! of the VM are gone. Sandboxes that are paused have none.
//!
//! | rule                                                                   | failure  |
//! |------------------------------------------------------------------------|----------|
//! | sum of all reservations: at most `limit`, the operator's share of the  | `Promised` |
//! | host's memory (over-commit is possible)                                |          |
//! | one VM: its whole memory is available now, without the host's reserve  | `Memory` |
//! | VMs that start at the same time: their sum, scaled by the same share,  | `Memory` |
//! | is available now                                                       |          |
//!
//! The last rule exists because a VM that starts has not used its memory yet: available memory
//! alone would admit any number of VMs at the same time.
//!
//! An agent that adopts VMs counts their memory even beyond the limit: they exist.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use wrenn_sys::meminfo::MemInfo;

use crate::{admission::AdmissionError, limits::HostLimits};

/// Memory that is promised to the VMs of this host.
#[derive(Debug)]
pub(crate) struct MemoryLedger {
    reserve_mib: u64,
    /// Memory of the host without the reserve.
    usable_mib: u64,
    commit_percent: u64,
    limit_mib: u64,
    promised: Mutex<Promised>,
}

/// Sums of the reservations, in MiB.
#[derive(Debug, Default)]
struct Promised {
    all_mib: u64,
    /// Part of `all_mib` of VMs that have not started yet.
    starting_mib: u64,
}

/// Memory that is reserved for one VM. Released on drop.
#[derive(Debug)]
pub(crate) struct MemoryReservation {
    ledger: Arc<MemoryLedger>,
    memory_mib: u64,
    starting: AtomicBool,
}

impl MemoryLedger {
    /// Returns the ledger of a host with `total_mib` of memory.
    pub(crate) fn new(total_mib: u64, limits: &HostLimits) -> Self {
        let reserve_mib = u64::from(limits.memory_reserve_mib);
        let commit_percent = u64::from(limits.memory_commit_percent);
        let usable_mib = total_mib.saturating_sub(reserve_mib);
        Self {
            reserve_mib,
            usable_mib,
            commit_percent,
            limit_mib: percent(usable_mib, commit_percent),
            promised: Mutex::default(),
        }
    }

    /// Reserves the memory of a VM that is about to start.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        memory_mib: u32,
    ) -> Result<MemoryReservation, AdmissionError> {
        let available = MemInfo::read().and_then(|memory| memory.bytes("MemAvailable"));
        let available_mib = available.map_err(AdmissionError::Capacity)? / (1024 * 1024);
        self.reserve_of(memory_mib, available_mib)
    }

    /// Reserves memory on a host of which `available_mib` are available now.
    fn reserve_of(
        self: &Arc<Self>,
        memory_mib: u32,
        available_mib: u64,
    ) -> Result<MemoryReservation, AdmissionError> {
        let wanted = u64::from(memory_mib);
        let mut promised = self.promised.lock();
        if promised.all_mib + wanted > self.limit_mib {
            return Err(AdmissionError::Promised {
                promised_mib: promised.all_mib,
                limit_mib: self.limit_mib,
                wanted_mib: memory_mib,
            });
        }
        let usable = available_mib.saturating_sub(self.reserve_mib);
        let for_starting = percent(usable, self.commit_percent.max(100));
        if wanted > usable || promised.starting_mib + wanted > for_starting {
            return Err(AdmissionError::Memory {
                available_mib,
                reserve_mib: self.reserve_mib,
                starting_mib: promised.starting_mib,
                wanted_mib: memory_mib,
            });
        }
        promised.all_mib += wanted;
        promised.starting_mib += wanted;
        Ok(self.reservation(wanted, true))
    }

    /// Counts the memory of a VM that exists.
    pub(crate) fn adopt(self: &Arc<Self>, memory_mib: u32) -> MemoryReservation {
        let memory_mib = u64::from(memory_mib);
        self.promised.lock().all_mib += memory_mib;
        self.reservation(memory_mib, false)
    }

    /// Returns the memory that all VMs together may use, in bytes.
    pub(crate) const fn usable_bytes(&self) -> u64 {
        self.usable_mib * 1024 * 1024
    }

    /// Returns the promised memory and its limit, in MiB.
    pub(crate) fn promised(&self) -> (u64, u64) {
        (self.promised.lock().all_mib, self.limit_mib)
    }

    fn reservation(self: &Arc<Self>, memory_mib: u64, starting: bool) -> MemoryReservation {
        MemoryReservation {
            ledger: self.clone(),
            memory_mib,
            starting: AtomicBool::new(starting),
        }
    }
}

impl MemoryReservation {
    /// Records that the VM runs: what it needed to start is in use now.
    pub(crate) fn note_started(&self) {
        let mut promised = self.ledger.promised.lock();
        if self.starting.swap(false, Ordering::Relaxed) {
            promised.starting_mib -= self.memory_mib;
        }
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        self.note_started();
        self.ledger.promised.lock().all_mib -= self.memory_mib;
    }
}

const fn percent(of: u64, percent: u64) -> u64 {
    of.saturating_mul(percent) / 100
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ledger(total_mib: u64, commit_percent: u32) -> Arc<MemoryLedger> {
        let limits = HostLimits {
            memory_commit_percent: commit_percent,
            memory_reserve_mib: 512,
            ..HostLimits::default()
        };
        Arc::new(MemoryLedger::new(total_mib, &limits))
    }

    #[test]
    fn memory_is_promised_at_most_up_to_the_limit_and_again_after_a_release() {
        let ledger = ledger(1512, 100);
        let first = ledger.reserve_of(600, 1512).unwrap();
        let error = ledger.reserve_of(600, 1512).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, AdmissionError::Promised { .. }), "{text}");
        for part in [
            "600 of 1000 MiB",
            "`memory_mb` 600",
            "WRENN_MEMORY_COMMIT_PERCENT",
        ] {
            assert!(text.contains(part), "{text}");
        }
        drop(first);
        assert_eq!(ledger.promised(), (0, 1000));
        ledger.reserve_of(600, 1512).unwrap();
    }

    #[test]
    fn vms_that_start_at_the_same_time_share_the_available_memory() {
        let ledger = ledger(100_000, 100);
        let first = ledger.reserve_of(600, 1512).unwrap();
        let error = ledger.reserve_of(600, 1512).unwrap_err();
        assert!(matches!(error, AdmissionError::Memory { .. }), "{error}");
        // The memory of a VM that runs is part of what is no longer available.
        first.note_started();
        ledger.reserve_of(600, 1512).unwrap();
    }

    #[test]
    fn a_vm_larger_than_the_available_memory_is_rejected_in_spite_of_over_commit() {
        let ledger = ledger(100_000, 400);
        let error = ledger.reserve_of(1001, 1512).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, AdmissionError::Memory { .. }), "{text}");
        assert!(
            text.contains("1512 MiB") && text.contains("512 MiB"),
            "{text}"
        );
        let started = [1000, 1000, 1000, 1000].map(|mib| ledger.reserve_of(mib, 1512).unwrap());
        assert!(ledger.reserve_of(1000, 1512).is_err());
        drop(started);
    }

    #[test]
    fn an_adopted_vm_counts_beyond_the_limit() {
        let ledger = ledger(1512, 100);
        let adopted = ledger.adopt(2000);
        assert_eq!(ledger.promised(), (2000, 1000));
        assert!(ledger.reserve_of(128, 1512).is_err());
        drop(adopted);
        ledger.reserve_of(128, 1512).unwrap();
    }

    proptest! {
        #[test]
        fn the_sum_never_exceeds_the_limit_and_returns_to_zero(
            steps in prop::collection::vec((1..2000_u32, 0..4_u8), 1..60),
            percent in 50..500_u32,
        ) {
            let ledger = ledger(4096, percent);
            let mut held = Vec::new();
            for (memory, step) in steps {
                match step {
                    0 => { held.pop(); }
                    1 => held.iter().for_each(MemoryReservation::note_started),
                    _ => held.extend(ledger.reserve_of(memory, 4096).ok()),
                }
                let (promised, limit) = ledger.promised();
                prop_assert!(promised <= limit);
                prop_assert_eq!(promised, held.iter().map(|r| r.memory_mib).sum::<u64>());
            }
            drop(held);
            prop_assert_eq!(ledger.promised().0, 0);
            prop_assert_eq!(ledger.promised.lock().starting_mib, 0);
        }
    }
}
