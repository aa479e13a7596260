//! Watches of directories, by inotify.
//!
//! A task follows the kernel's queue of each watch, so that new directories below a recursive watch are watched soon and
//! the queue is short; what it saw is kept until the client takes it. A new directory is watched before its creation is
//! told, and what is in it by then is told as created and, where it was written here, as written: nothing falls between.
//! Events can be asked for right after a write returns, because the queue is read once more at the moment of asking. A
//! directory that is removed or moved ends its watch.
//!
//! - `queue`: the kernel's queue.
//! - `tree`: the directories, and the kernel's events in the contract's words.
//! - `ready`: what waits to be told.
//! - `watchers`: watches that are asked.

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

/// Events that a stream takes at once.
const PIECE: usize = 1024;

/// What is asked of a watch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WatchOptions {
    /// Directories below too.
    pub recursive: bool,
    /// Describe the entry of an event, where it still is.
    pub include_entry: bool,
    /// Watch though some changes may not be seen.
    pub allow_network_mounts: bool,
}

/// A watch. Dropping it ends it.
pub struct Watch {
    ready: Arc<Ready>,
    /// To the one who follows the kernel's queue: look now, and say when you have.
    asks: mpsc::Sender<oneshot::Sender<()>>,
    place: Place,
    /// Events that [`next`](Self::next) tells before it takes others.
    told: VecDeque<FilesystemEvent>,
    /// Makes these events. Here, so that they survive a `next` that is given up.
    describing: Option<JoinHandle<Vec<FilesystemEvent>>>,
}

impl Watch {
    /// Watches a directory. Blocks; to be called where there is a runtime.
    ///
    /// # Errors
    /// If it is not one, or is on a network file system and that was not allowed.
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

    /// Waits for the next event; `None` if the directory is gone. Cancel safe.
    ///
    /// # Errors
    /// If events were lost (it goes on after that), or the directory cannot be watched any more.
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

    /// All events until now.
    ///
    /// # Errors
    /// As [`next`](Self::next), and if the directory is gone and everything was told.
    pub async fn take(&self) -> Result<Vec<FilesystemEvent>, FileError> {
        let (done, looked) = oneshot::channel();
        if self.asks.send(done).await.is_ok() {
            // It may end by this look; what it saw is there all the same.
            let _ = looked.await;
        }
        let changes = self.ready.take(usize::MAX)?;
        let changes = changes.ok_or_else(|| self.ready.ended())?;
        let events = self.place.describe(changes).await;
        events.map_err(|error| self.ready.broken(error.into()))
    }
}

/// Follows the kernel's queue until nobody wants its events, or none will come.
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
            // Whoever asked may be gone by now.
            let _ = ask.send(());
        }
    }
}

/// Where a watch is.
#[derive(Debug, Clone)]
struct Place {
    root: PathBuf,
    /// The root as it was asked for: there may be links in it.
    shown: PathBuf,
    include_entry: bool,
}

impl Place {
    /// Makes the events of changes.
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
        // No slash after the root's own name.
        let at = |top: &Path| -> PathBuf { top.components().chain(name.components()).collect() };
        entry::stat_as(&at(&self.shown), &at(&self.root), names).ok()
    }
}

#[cfg(test)]
mod tests;
