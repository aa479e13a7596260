//! Watches that clients poll instead of streaming.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, MutexGuard};
use wrenn_proto::rpc::filesystem::FilesystemEvent;

use super::Watch;
use crate::filesystem::FileError;

/// Maximum number of watches. Each watch holds a queue in the kernel.
const MAX_WATCHERS: usize = 1024;

/// Watches by id.
#[derive(Default)]
pub struct Watchers {
    next: AtomicU64,
    all: Mutex<HashMap<String, Arc<Watch>>>,
}

impl Watchers {
    /// Adds a watch and returns its id.
    ///
    /// # Errors
    /// Returns a message if there are too many watches.
    pub fn add(&self, watch: Watch) -> Result<String, String> {
        let mut all = self.lock();
        if all.len() >= MAX_WATCHERS {
            return Err(format!(
                "limit of {MAX_WATCHERS} watchers reached: remove some"
            ));
        }
        let id = format!("w{:016x}", self.next.fetch_add(1, Ordering::Relaxed) + 1);
        all.insert(id.clone(), Arc::new(watch));
        Ok(id)
    }

    /// Returns the events since the last call, or `None` if the watch does not exist.
    pub async fn take_events(&self, id: &str) -> Option<Result<Vec<FilesystemEvent>, FileError>> {
        let watch = self.lock().get(id)?.clone();
        Some(watch.take().await)
    }

    /// Ends a watch. Returns false if the watch does not exist.
    pub fn remove(&self, id: &str) -> bool {
        self.lock().remove(id).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Watch>>> {
        // Each change is one step, so a panic in between leaves a consistent state.
        self.all.lock()
    }
}
