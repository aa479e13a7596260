//! Watches that are asked instead of followed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use wrenn_proto::rpc::filesystem::FilesystemEvent;

use super::Watch;
use crate::filesystem::FileError;

/// Watches at once: each holds a queue in the kernel.
const MAX_WATCHERS: usize = 1024;

/// Watches by their ids.
#[derive(Default)]
pub struct Watchers {
    next: AtomicU64,
    all: Mutex<HashMap<String, Arc<Watch>>>,
}

impl Watchers {
    /// Keeps a watch; returns its id.
    ///
    /// # Errors
    /// A message if there are too many.
    pub fn add(&self, watch: Watch) -> Result<String, String> {
        let mut all = self.lock();
        if all.len() >= MAX_WATCHERS {
            return Err(format!(
                "there are {MAX_WATCHERS} watchers already: remove some"
            ));
        }
        let id = format!("w{:016x}", self.next.fetch_add(1, Ordering::Relaxed) + 1);
        all.insert(id.clone(), Arc::new(watch));
        Ok(id)
    }

    /// Events since the last time; `None` if there is no such watch.
    pub async fn take_events(&self, id: &str) -> Option<Result<Vec<FilesystemEvent>, FileError>> {
        let watch = self.lock().get(id)?.clone();
        Some(watch.take().await)
    }

    /// Ends a watch; false if there is none.
    pub fn remove(&self, id: &str) -> bool {
        self.lock().remove(id).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Watch>>> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
