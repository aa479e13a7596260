//! Reference counts of snapshots.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use wrenn_snapshot::SnapshotId;

/// Number of references per snapshot.
#[derive(Debug, Default)]
pub(super) struct Pins(Mutex<HashMap<SnapshotId, usize>>);

/// Reference to a snapshot. The snapshot is kept as long as this value or a clone of it exists.
#[derive(Debug)]
pub(crate) struct SnapshotRef {
    build: SnapshotId,
    pins: Arc<Pins>,
}

impl Pins {
    pub(super) fn pin(pins: &Arc<Self>, build: SnapshotId) -> SnapshotRef {
        *pins.lock().entry(build).or_default() += 1;
        SnapshotRef {
            build,
            pins: pins.clone(),
        }
    }

    pub(super) fn all(&self) -> HashSet<SnapshotId> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SnapshotId, usize>> {
        // Every update is a single step, so the map is valid even if a holder of the lock panicked.
        self.0.lock()
    }
}

impl SnapshotRef {
    pub(crate) fn id(&self) -> SnapshotId {
        self.build
    }

    /// Returns the snapshot ID as text.
    pub(crate) fn build(&self) -> String {
        self.build.to_string()
    }
}

impl Clone for SnapshotRef {
    fn clone(&self) -> Self {
        Pins::pin(&self.pins, self.build)
    }
}

impl Drop for SnapshotRef {
    fn drop(&mut self) {
        let mut pins = self.pins.lock();
        if let Some(count) = pins.get_mut(&self.build) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.build);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_is_unreferenced_after_its_last_reference() {
        let pins = Arc::<Pins>::default();
        let first = Pins::pin(&pins, SnapshotId([1; 16]));
        let second = first.clone();
        drop(first);
        assert_eq!(pins.all().len(), 1);
        drop(second);
        assert!(pins.all().is_empty());
    }
}
