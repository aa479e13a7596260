//! Changes between the one who follows the kernel's queue and the one who tells them.

use std::{
    collections::VecDeque,
    io,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::tree::{Change, Look};
use crate::filesystem::FileError;

/// Changes that wait to be told, at most.
pub(super) const MAX_READY: usize = 65_536;

/// What is ready to be told.
pub(super) struct Ready {
    list: Mutex<List>,
    changed: Notify,
    /// What is watched, as it was asked for.
    root: PathBuf,
}

#[derive(Default)]
struct List {
    changes: VecDeque<Change>,
    /// There is a gap: nothing is kept until that was told.
    lost: bool,
    over: bool,
    /// Why it is over, if it was not the directory's end.
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

    /// Adds what was seen.
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

    /// Nothing comes any more.
    pub(super) fn fail(&self, failure: FileError) {
        let mut list = self.lock();
        list.failure = Some(failure);
        list.over = true;
        self.changed.notify_one();
    }

    /// Takes the oldest changes. `None` if none will come any more.
    ///
    /// # Errors
    /// If some were lost (it goes on after that), or why it is over; once.
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

    /// Waits for the next change. For one waiter; cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The error of one who asks after the end.
    pub(super) fn ended(&self) -> FileError {
        FileError::WatchEnded(self.root.clone())
    }

    /// The error of a watch that cannot go on.
    pub(super) fn broken(&self, error: io::Error) -> FileError {
        FileError::at(&self.root)(error)
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
