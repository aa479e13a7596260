//! Watches of directories, through inotify.
//!
//! A task per watch follows the kernel's queue, so that new directories below a recursive watch are
//! watched soon and the queue stays short. The task keeps the changes until the client takes them.
//! A new directory is watched before its creation is reported. Its existing content is reported as
//! created and, if the content was written here, as written, so no change is missed. A client can
//! ask for events right after a write returns, because the queue is read again when the client
//! asks. A watch ends when its directory is removed or moved.
//!
//! - `queue`: the kernel's queue.
//! - `tree`: the directories, and the translation of kernel events to the contract's events.
//! - `ready`: changes that wait for delivery.
//! - `watchers`: watches that clients poll.

mod below;
mod queue;
mod ready;
mod tree;
mod watchers;

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
};
use wrenn_proto::rpc::filesystem::{EntryInfo, EventType, FilesystemEvent};

pub use self::watchers::Watchers;
use self::{
    ready::Ready,
    tree::{Change, Tree},
};
use super::{FileError, entry, mount};
use crate::users::Names;

/// Maximum number of changes that a stream takes at once.
const PIECE: usize = 1024;

/// Options of a watch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WatchOptions {
    /// Also watches the directories below.
    pub recursive: bool,
    /// Includes a description of the entry in each event, if the entry still exists.
    pub include_entry: bool,
    /// Watches network file systems too, although some changes may not be reported.
    pub allow_network_mounts: bool,
}

/// Watch of a directory. The watch ends when this value is dropped.
pub struct Watch {
    ready: Arc<Ready>,
    /// Requests to the task that follows the kernel's queue: read the queue now, then reply.
    asks: mpsc::Sender<oneshot::Sender<()>>,
    place: Place,
    /// Events that [`next`](Self::next) returns before it takes more changes.
    told: VecDeque<FilesystemEvent>,
    /// Task that makes the next events. Stored here, so that the events survive a cancelled `next`.
    describing: Option<JoinHandle<Vec<FilesystemEvent>>>,
}

impl Watch {
    /// Watches a directory. Blocks. Must be called in the context of a runtime.
    ///
    /// # Errors
    /// Fails if the path is not a directory, or is on a network file system and the options do not
    /// allow that.
    pub fn open(path: &Path, options: WatchOptions) -> Result<Self, FileError> {
        let root = fs::canonicalize(path).map_err(FileError::at(path))?;
        if !root.is_dir() {
            return Err(FileError::NotADirectory(path.to_owned()));
        }
        let network = mount::is_network(&root).map_err(FileError::at(path))?;
        if network && !options.allow_network_mounts {
            return Err(FileError::NetworkMount(path.to_owned()));
        }
        let tree = Tree::open(root.clone(), options).map_err(FileError::at(path))?;
        let ready = Arc::new(Ready::new(path.to_owned()));
        let (asks, asked) = mpsc::channel(1);
        let kept = ready.clone();
        tokio::spawn(async move {
            if let Err(error) = follow(tree, asked, &kept).await {
                kept.fail(error);
            }
        });
        Ok(Self {
            ready,
            asks,
            place: Place {
                root,
                shown: path.to_owned(),
                include_entry: options.include_entry,
            },
            told: VecDeque::new(),
            describing: None,
        })
    }

    /// Waits for the next event. Returns `None` if the directory is gone. Cancel safe.
    ///
    /// # Errors
    /// Fails if events were lost (the watch continues after that), or if the directory can no
    /// longer be watched.
    pub async fn next(&mut self) -> Option<Result<FilesystemEvent, FileError>> {
        loop {
            if let Some(event) = self.told.pop_front() {
                return Some(Ok(event));
            }
            if let Some(work) = &mut self.describing {
                let events = work.await;
                self.describing = None;
                match events {
                    Ok(events) => self.told.extend(events),
                    Err(error) => return Some(Err(self.ready.broken(error.into()))),
                }
                continue;
            }
            match self.ready.take(PIECE) {
                Ok(None) => return None,
                Ok(Some(changes)) if changes.is_empty() => self.ready.changed().await,
                Ok(Some(changes)) => self.describing = Some(self.place.describe(changes)),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Returns all events until now.
    ///
    /// # Errors
    /// Fails like [`next`](Self::next), and if the directory is gone and all events were delivered.
    pub async fn take(&self) -> Result<Vec<FilesystemEvent>, FileError> {
        let (done, looked) = oneshot::channel();
        if self.asks.send(done).await.is_ok() {
            // The task may end in this round. Its changes are in `ready` nevertheless.
            let _ = looked.await;
        }
        let changes = self.ready.take(usize::MAX)?;
        let changes = changes.ok_or_else(|| self.ready.ended())?;
        let events = self.place.describe(changes).await;
        events.map_err(|error| self.ready.broken(error.into()))
    }
}

/// Follows the kernel's queue until the watch is dropped or no more events will come.
async fn follow(
    mut tree: Tree,
    mut asked: mpsc::Receiver<oneshot::Sender<()>>,
    ready: &Ready,
) -> Result<(), FileError> {
    loop {
        let ask = tokio::select! {
            ask = asked.recv() => match ask {
                Some(ask) => Some(ask),
                None => return Ok(()),
            },
            woken = tree.readable() => {
                woken.map_err(|error| ready.broken(error))?;
                None
            }
        };
        let work = spawn_blocking(move || (tree.look(), tree));
        let (look, back) = work.await.map_err(|error| ready.broken(error.into()))?;
        tree = back;
        let look = look.map_err(|error| ready.broken(error))?;
        let ended = look.ended;
        ready.add(look);
        if ended {
            return Ok(());
        }
        if let Some(ask) = ask {
            // The caller may have given up.
            let _ = ask.send(());
        }
    }
}

/// Location of a watch.
#[derive(Debug, Clone)]
struct Place {
    root: PathBuf,
    /// Root as in the client's request, possibly with symbolic links.
    shown: PathBuf,
    include_entry: bool,
}

impl Place {
    /// Starts a task that makes events from changes.
    fn describe(&self, changes: Vec<Change>) -> JoinHandle<Vec<FilesystemEvent>> {
        let place = self.clone();
        spawn_blocking(move || {
            let mut names = Names::default();
            let describe = |change| place.event(change, &mut names);
            changes.into_iter().map(describe).collect()
        })
    }

    fn event(&self, (name, kind): Change, names: &mut Names) -> FilesystemEvent {
        let is_described = matches!(
            kind,
            EventType::EVENT_TYPE_CREATE
                | EventType::EVENT_TYPE_WRITE
                | EventType::EVENT_TYPE_CHMOD
        );
        let entry = (self.include_entry && is_described)
            .then(|| self.entry(&name, names))
            .flatten();
        FilesystemEvent {
            name: name.display().to_string(),
            r#type: kind.into(),
            entry: entry.into(),
            ..Default::default()
        }
    }

    fn entry(&self, name: &Path, names: &mut Names) -> Option<EntryInfo> {
        // The root's own name gets no slash after it.
        let at = |top: &Path| -> PathBuf { top.components().chain(name.components()).collect() };
        entry::stat_as(&at(&self.shown), &at(&self.root), names).ok()
    }
}

#[cfg(test)]
mod tests;
