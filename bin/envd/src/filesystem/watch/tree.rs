//! Directories of a watch, and the changes in them. A *look* ([`Tree::look`]) reads the changes
//! that the kernel has queued, and blocks.
//!
//! The kernel reports changes by name. When an event is read, something else may have that name.
//! This module therefore identifies directories by their watch descriptors, which stay the same
//! when a directory is renamed.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use inotify::{EventMask, WatchDescriptor};
use wrenn_proto::rpc::filesystem::EventType;

use super::{
    WatchOptions,
    below::{is_below, remove_below, replaced},
    queue::{Queue, RawEvent, kinds},
    ready::MAX_READY,
};

/// Approximate maximum number of events that one look reads. One look reads all events that were
/// queued before it, because the kernel's queue is not longer than this (see
/// `fs.inotify.max_queued_events` in the guest's init). One look does not read an endless number of
/// new events.
const EVENTS_A_LOOK: usize = 65_536;

/// Granularity of file times, which are the time of the kernel's last tick.
const TICK: Duration = Duration::from_millis(20);

/// Change of an entry: path relative to the root, and type.
pub(super) type Change = (PathBuf, EventType);

/// Result of one look at the kernel's queue.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) changes: Vec<Change>,
    /// True if there were more changes than this module or the kernel keeps.
    pub(super) lost: bool,
    /// True if the root was removed or moved.
    pub(super) ended: bool,
}

/// Watched directory and, in a recursive watch, the directories below it.
pub(super) struct Tree {
    queue: Queue,
    root: PathBuf,
    recursive: bool,
    root_descriptor: WatchDescriptor,
    /// Directory of each descriptor, relative to the root.
    directories: HashMap<WatchDescriptor, PathBuf>,
    /// Entries that were reported because they were found in a directory. The kernel may still
    /// report their creation.
    found: BTreeSet<PathBuf>,
    /// Entries that were reported as written in this look. One event covers all writes until the
    /// look's end.
    written: BTreeSet<PathBuf>,
    /// Cookie and name of the last directory that was moved away, until its destination is known.
    moving: Option<(u32, PathBuf)>,
    /// Time until which the kernel has reported all changes in known directories.
    since: SystemTime,
    /// True if the last look left events in the queue.
    behind: bool,
    /// True if the kernel's queue overflowed.
    overflowed: bool,
    /// Result of the current look.
    look: Look,
}

/// Policy for reporting the existing content of a directory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tell {
    /// Reports nothing: the client has listed the directory itself, or will do so.
    Nothing,
    /// Reports the content of directories that are not watched yet, because it was created unseen.
    /// The other directories were moved with their content.
    Unwatched,
    /// Reports all content, because it came with the directory. Exception: the content of a
    /// directory that was watched under another name, because that directory was moved here.
    Everything,
}

impl Tell {
    fn tells(self, directory: &Path, watched_as: Option<&Path>) -> bool {
        match (self, watched_as) {
            (Self::Nothing, _) => false,
            (_, None) => true,
            (Self::Unwatched, Some(_)) => false,
            (Self::Everything, Some(name)) => name == directory,
        }
    }
}

impl Tree {
    /// Watches a directory. The path must not contain symbolic links.
    pub(super) fn open(root: PathBuf, options: WatchOptions) -> io::Result<Self> {
        let queue = Queue::open()?;
        let since = SystemTime::now();
        let root_descriptor = queue.watch(&root)?.ok_or(io::ErrorKind::NotFound)?;
        let mut tree = Self {
            queue,
            root,
            recursive: options.recursive,
            root_descriptor,
            directories: HashMap::new(),
            found: BTreeSet::new(),
            written: BTreeSet::new(),
            moving: None,
            since,
            behind: false,
            overflowed: false,
            look: Look::default(),
        };
        tree.add(Path::new(""), Tell::Nothing)?;
        Ok(tree)
    }

    /// Waits until there are events to read. Cancel safe.
    pub(super) async fn readable(&self) -> io::Result<()> {
        if self.behind {
            return Ok(());
        }
        self.queue.readable().await
    }

    /// Returns all changes until now.
    pub(super) fn look(&mut self) -> io::Result<Look> {
        self.written.clear();
        if SystemTime::now() < self.since {
            // The clock was set back, so file times do not show what was written since then.
            self.since = UNIX_EPOCH;
        }
        self.drain()?;
        if std::mem::take(&mut self.overflowed) {
            self.start_over()?;
        }
        Ok(std::mem::take(&mut self.look))
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut read = 0;
        self.behind = true;
        while read < EVENTS_A_LOOK {
            let now = SystemTime::now();
            let events = self.queue.read()?;
            if events.is_empty() {
                // All found entries were created before this read, so the kernel has reported all
                // of them.
                self.found.clear();
                self.since = now;
                self.behind = false;
                break;
            }
            read += events.len();
            for event in events {
                self.translate(event)?;
            }
        }
        Ok(())
    }

    fn translate(&mut self, event: RawEvent) -> io::Result<()> {
        let (mask, is_root) = (event.mask, event.descriptor == self.root_descriptor);
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.overflowed = true;
            self.lose();
            return Ok(());
        }
        self.look.ended |= is_root && mask.intersects(EventMask::MOVE_SELF | EventMask::IGNORED);
        if mask.contains(EventMask::IGNORED) {
            self.directories.remove(&event.descriptor);
            return Ok(());
        }
        let Some(directory) = self.directories.get(&event.descriptor) else {
            return Ok(());
        };
        let name = match &event.name {
            Some(name) => directory.join(name),
            None if is_root => PathBuf::new(),
            None => {
                // Both halves of a move precede this event, so the directory was moved out of the
                // watch. The events of its parent cover the rest.
                if mask.contains(EventMask::MOVE_SELF) && self.is_moving(directory) {
                    self.forget_moved();
                }
                return Ok(());
            }
        };
        let origin = self.origin(&event, &name);
        if self.directories.contains_key(&event.descriptor) {
            self.tell(&event, &name);
            self.follow(&event, name, origin)?;
        }
        Ok(())
    }

    fn is_moving(&self, directory: &Path) -> bool {
        self.moving
            .as_ref()
            .is_some_and(|(_, old)| old == directory)
    }

    /// Returns the previous name of a directory that appears under a new name.
    fn origin(&mut self, event: &RawEvent, name: &Path) -> Option<PathBuf> {
        let (cookie, old) = self.moving.as_ref()?;
        if event.mask.contains(EventMask::MOVED_TO) && event.cookie == *cookie {
            return self.moving.take().map(|(_, old)| old);
        }
        if name.starts_with(old) {
            // Another entry has the name now, or this event happened outside the watch.
            self.forget_moved();
        }
        None
    }

    fn tell(&mut self, event: &RawEvent, name: &Path) {
        let appears = event
            .mask
            .intersects(EventMask::CREATE | EventMask::MOVED_TO);
        let is_told = appears && self.found.contains(name);
        if event
            .mask
            .intersects(EventMask::DELETE | EventMask::MOVED_FROM)
        {
            // The next entry of that name has other content.
            remove_below(&mut self.found, name);
            remove_below(&mut self.written, name);
        }
        for kind in kinds(event.mask) {
            let again = match kind {
                EventType::EVENT_TYPE_CREATE => is_told,
                EventType::EVENT_TYPE_WRITE => self.written.contains(name),
                _ => false,
            };
            if !again {
                self.report(name, kind);
            }
        }
    }

    /// Updates the watched directories.
    fn follow(
        &mut self,
        event: &RawEvent,
        name: PathBuf,
        origin: Option<PathBuf>,
    ) -> io::Result<()> {
        let mask = event.mask;
        let appears = mask.intersects(EventMask::CREATE | EventMask::MOVED_TO);
        let is_found = appears && self.found.remove(&name);
        if !self.recursive || !mask.contains(EventMask::ISDIR) {
            return Ok(());
        }
        if mask.contains(EventMask::MOVED_FROM) {
            self.forget_moved();
            self.moving = Some((event.cookie, name));
        } else if mask.contains(EventMask::MOVED_TO) && !is_found {
            self.rename(origin.as_deref(), &name)?;
            let tell = match origin {
                Some(_) => Tell::Unwatched,
                None => Tell::Everything,
            };
            self.add(&name, tell)?;
        } else if mask.contains(EventMask::CREATE) && !is_found {
            self.add(&name, Tell::Everything)?;
        }
        Ok(())
    }

    /// Gives watched directories their current name. A directory that had this name was exchanged
    /// with them or is gone.
    fn rename(&mut self, origin: Option<&Path>, new: &Path) -> io::Result<()> {
        let old = match self.queue.watch(&self.root.join(new))? {
            // The descriptor decides, whatever the events say.
            Some(there) => self.directories.get(&there).cloned(),
            // The directory was moved again. A later event reports its next name.
            None => origin.map(ToOwned::to_owned),
        };
        let Some(old) = old.filter(|old| old != new) else {
            return Ok(());
        };
        for directory in self.directories.values_mut() {
            let now = replaced(directory, &old, new).or_else(|| replaced(directory, new, &old));
            if let Some(now) = now {
                *directory = now;
            }
        }
        Ok(())
    }

    /// Stops watching the directories that were moved out of the watch.
    fn forget_moved(&mut self) {
        let Some((_, gone)) = self.moving.take() else {
            return;
        };
        let queue = &self.queue;
        self.directories.retain(|descriptor, directory| {
            let stays = !is_below(directory, &gone);
            if !stays {
                queue.forget(descriptor.clone());
            }
            stays
        });
    }

    /// Watches a directory and, in a recursive watch, the directories below it. Reports their
    /// existing content according to `tell`.
    fn add(&mut self, top: &Path, tell: Tell) -> io::Result<()> {
        let mut left = vec![top.to_owned()];
        while let Some(directory) = left.pop() {
            let path = self.root.join(&directory);
            let Some(descriptor) = self.queue.watch(&path)? else {
                continue;
            };
            let name = directory.clone();
            let watched_as = self.directories.insert(descriptor, name);
            let tells = tell.tells(&directory, watched_as.as_deref());
            if !self.recursive {
                break;
            }
            let Ok(children) = fs::read_dir(&path) else {
                continue;
            };
            for child in children.flatten() {
                let name = directory.join(child.file_name());
                if tells {
                    self.find(&name, &child);
                }
                if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                    left.push(name);
                }
            }
        }
        Ok(())
    }

    fn find(&mut self, name: &Path, child: &fs::DirEntry) {
        if !self.found.insert(name.to_owned()) {
            return;
        }
        self.report(name, EventType::EVENT_TYPE_CREATE);
        if self.was_written(child) {
            self.written.insert(name.to_owned());
            self.report(name, EventType::EVENT_TYPE_WRITE);
        }
    }

    /// True if a found file got its content here, and not before it came here. Such a file was
    /// modified since the last complete read or, if its creator gave it an older modification time,
    /// created since then.
    fn was_written(&self, child: &fs::DirEntry) -> bool {
        let Ok(metadata) = child.metadata() else {
            return false;
        };
        let times = [metadata.modified(), metadata.created()];
        let is_new =
            |time: SystemTime| time.checked_add(TICK).is_none_or(|time| time >= self.since);
        metadata.is_file() && metadata.len() > 0 && times.into_iter().flatten().any(is_new)
    }

    /// Recovers from an overflow: watches directories that were created unseen, and stops watching
    /// those that are gone.
    fn start_over(&mut self) -> io::Result<()> {
        let before = std::mem::take(&mut self.directories);
        self.found.clear();
        self.moving = None;
        self.add(Path::new(""), Tell::Nothing)?;
        self.look.ended |= !self.directories.contains_key(&self.root_descriptor);
        for descriptor in before.into_keys() {
            if !self.directories.contains_key(&descriptor) {
                self.queue.forget(descriptor);
            }
        }
        Ok(())
    }

    fn report(&mut self, name: &Path, kind: EventType) {
        if self.look.changes.len() == MAX_READY {
            self.lose();
        }
        if !self.look.lost {
            self.look.changes.push((name.to_owned(), kind));
        }
    }

    fn lose(&mut self) {
        self.look.changes.clear();
        self.look.lost = true;
    }
}

#[cfg(test)]
mod tests;
