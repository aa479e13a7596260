//! Changes between the task that follows the kernel's queue and the call that delivers them.

use std::{collections::VecDeque, io, path::PathBuf};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::tree::{Change, Look};
use crate::filesystem::FileError;

/// Maximum number of changes that wait for delivery.
pub(super) const MAX_READY: usize = 65_536;

/// Changes that are ready for delivery.
pub(super) struct Ready {
    list: Mutex<List>,
    changed: Notify,
    /// Watched directory, as in the client's request.
    root: PathBuf,
}

#[derive(Default)]
struct List {
    changes: VecDeque<Change>,
    /// True if changes were lost. No changes are kept until the client was informed.
    lost: bool,
    over: bool,
    /// Reason for the end, if it was not the removal or move of the directory.
    failure: Option<FileError>,
}

impl Ready {
    pub(super) fn new(root: PathBuf) -> Self {
        Self {
            list: Mutex::default(),
            changed: Notify::new(),
            root,
        }
    }

    /// Adds the changes of a look.
    pub(super) fn add(&self, look: Look) {
        let mut list = self.lock();
        list.lost |= look.lost || list.changes.len() + look.changes.len() > MAX_READY;
        if list.lost {
            list.changes = VecDeque::new();
        } else {
            list.changes.extend(look.changes);
        }
        list.over |= look.ended;
        self.changed.notify_one();
    }

    /// Ends the watch with a failure. No more changes will come.
    pub(super) fn fail(&self, failure: FileError) {
        let mut list = self.lock();
        list.failure = Some(failure);
        list.over = true;
        self.changed.notify_one();
    }

    /// Takes the oldest changes. Returns `None` if no more changes will come.
    ///
    /// # Errors
    /// Fails if changes were lost (the watch continues after that), or with the reason for the end.
    /// Reports each of them once.
    pub(super) fn take(&self, most: usize) -> Result<Option<Vec<Change>>, FileError> {
        let mut list = self.lock();
        if std::mem::take(&mut list.lost) {
            return Err(FileError::EventsLost);
        }
        let length = list.changes.len().min(most);
        if length == 0 && list.over {
            return list.failure.take().map_or(Ok(None), Err);
        }
        let rest = list.changes.split_off(length);
        Ok(Some(std::mem::replace(&mut list.changes, rest).into()))
    }

    /// Waits for the next change. Supports one waiter. Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns the error for a call after the end of the watch.
    pub(super) fn ended(&self) -> FileError {
        FileError::WatchEnded(self.root.clone())
    }

    /// Returns the error of a watch that cannot continue.
    pub(super) fn broken(&self, error: io::Error) -> FileError {
        FileError::at(&self.root)(error)
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        // Each change is one step, so a panic in between leaves a consistent state.
        self.list.lock()
    }
}
