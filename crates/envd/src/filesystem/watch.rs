//! Watches of directories, by inotify.
//!
//! A new directory below a recursive watch is watched before its creation is reported, and what is in it by then is
//! reported as created and, where it has content, as written: nothing falls between. A write may be told twice then, by
//! the look and by the kernel. Events can be asked for right after a write returns, because the kernel's queue is read
//! at the moment of asking.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::OsString,
    fs, io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};
use wrenn_proto::rpc::filesystem::{EventType, FilesystemEvent};

use super::{FileError, entry, mount};

/// Watches at once: each holds a queue in the kernel.
const MAX_WATCHERS: usize = 1024;

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
    inotify: AsyncFd<Queue>,
    root: PathBuf,
    options: WatchOptions,
    /// Directory of each descriptor, relative to the root.
    directories: HashMap<WatchDescriptor, PathBuf>,
    ready: VecDeque<FilesystemEvent>,
    /// Reported because they were found; the kernel may still tell of their creation.
    found: HashSet<PathBuf>,
    /// A directory that was moved away, until it is known where to.
    moving: Option<(u32, PathBuf)>,
    /// The kernel's queue was full: there is a gap before what is ready.
    lost: bool,
}

struct Queue(Inotify);

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// How a directory came to be watched, which decides what is told of what it holds already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It stood there when the watch began: nothing.
    Old,
    /// It was made: what it holds was made and written since.
    Made,
    /// It was moved here: what it holds appeared with it, and was written elsewhere.
    Moved,
}

/// An event as the kernel tells it.
struct RawEvent {
    descriptor: WatchDescriptor,
    mask: EventMask,
    cookie: u32,
    name: Option<OsString>,
}

impl Watch {
    /// Watches a directory.
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
        let open = || -> io::Result<Self> {
            #[expect(
                deprecated,
                reason = "sound for a type that owns its descriptor, as this one does"
            )]
            let inotify = AsyncFd::with_interest(Queue(Inotify::init()?), Interest::READABLE)?;
            let mut watch = Self {
                inotify,
                root,
                options,
                directories: HashMap::new(),
                ready: VecDeque::new(),
                found: HashSet::new(),
                moving: None,
                lost: false,
            };
            watch.add(Path::new(""), Origin::Old)?;
            Ok(watch)
        };
        open().map_err(FileError::at(path))
    }

    /// Waits for the next event. Cancel safe.
    ///
    /// # Errors
    /// If events were lost (it goes on after that), or the kernel's queue cannot be read.
    pub async fn next(&mut self) -> Result<FilesystemEvent, FileError> {
        loop {
            self.refill()?;
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let mut guard = self.readable().await?;
            guard.clear_ready();
        }
    }

    /// All events until now.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn take(&mut self) -> Result<Vec<FilesystemEvent>, FileError> {
        self.refill()?;
        Ok(self.ready.drain(..).collect())
    }

    async fn readable(&self) -> Result<AsyncFdReadyGuard<'_, Queue>, FileError> {
        let ready = self.inotify.readable().await;
        ready.map_err(FileError::at(&self.root))
    }

    fn refill(&mut self) -> Result<(), FileError> {
        self.read_queue().map_err(FileError::at(&self.root))?;
        if !std::mem::take(&mut self.lost) {
            return Ok(());
        }
        self.ready.clear();
        // Directories that were made unseen are watched from now on.
        self.add(Path::new(""), Origin::Old)
            .map_err(FileError::at(&self.root))?;
        Err(FileError::EventsLost)
    }

    fn read_queue(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            let raw: Vec<RawEvent> = match self.inotify.get_mut().0.read_events(&mut buffer) {
                Ok(events) => events
                    .map(|event| RawEvent {
                        descriptor: event.wd,
                        mask: event.mask,
                        cookie: event.cookie,
                        name: event.name.map(ToOwned::to_owned),
                    })
                    .collect(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            if raw.is_empty() {
                break;
            }
            for event in raw {
                self.translate(event)?;
            }
        }
        // Whatever was found was made before this: the kernel has told of all of it.
        self.found.clear();
        self.forget_moved();
        Ok(())
    }

    /// What was moved out of sight is not watched any more.
    fn forget_moved(&mut self) {
        let Some((_, gone)) = self.moving.take() else {
            return;
        };
        let mut watches = self.inotify.get_ref().0.watches();
        self.directories.retain(|descriptor, directory| {
            let below = directory.starts_with(&gone);
            if below {
                // It may be deleted by now.
                let _ = watches.remove(descriptor.clone());
            }
            !below
        });
    }

    fn translate(&mut self, event: RawEvent) -> io::Result<()> {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            self.lost = true;
            return Ok(());
        }
        // The two halves of a move follow each other.
        if self
            .moving
            .as_ref()
            .is_some_and(|(cookie, _)| *cookie != event.cookie)
        {
            self.forget_moved();
        }
        if event.mask.contains(EventMask::IGNORED) {
            self.directories.remove(&event.descriptor);
            return Ok(());
        }
        let Some(directory) = self.directories.get(&event.descriptor).cloned() else {
            return Ok(());
        };
        let name = event
            .name
            .map_or_else(|| directory.clone(), |name| directory.join(name));
        let is_directory = event.mask.contains(EventMask::ISDIR);
        let appeared = event
            .mask
            .intersects(EventMask::CREATE | EventMask::MOVED_TO);
        // A watched directory's own events are reported by its parent as well; only the root has none.
        if name == directory && !directory.as_os_str().is_empty() {
            return Ok(());
        }
        let known = appeared && self.found.remove(&name);
        if !appeared
            && event
                .mask
                .intersects(EventMask::DELETE | EventMask::MOVED_FROM)
        {
            self.found.remove(&name);
        }
        for kind in kinds(event.mask) {
            if !(known && kind == EventType::EVENT_TYPE_CREATE) {
                self.report(&name, kind);
            }
        }
        if is_directory && self.options.recursive {
            if appeared {
                // The same watches, under new names, if it comes from within.
                self.moving = None;
                let moved = event.mask.contains(EventMask::MOVED_TO);
                self.add(&name, if moved { Origin::Moved } else { Origin::Made })?;
            } else if event.mask.contains(EventMask::MOVED_FROM) {
                self.moving = Some((event.cookie, name));
            }
        }
        Ok(())
    }

    /// Watches a directory, and with a recursive watch those below it. What is in it already is reported as `origin` has
    /// it.
    fn add(&mut self, directory: &Path, origin: Origin) -> io::Result<()> {
        let path = self.root.join(directory);
        let mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::ATTRIB
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ONLYDIR;
        match self.inotify.get_ref().0.watches().add(&path, mask) {
            Ok(descriptor) => self.directories.insert(descriptor, directory.to_owned()),
            // Below the root: it is gone again, or something else is there.
            Err(error)
                if !directory.as_os_str().is_empty()
                    && matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if !self.options.recursive {
            return Ok(());
        }
        let Ok(children) = fs::read_dir(&path) else {
            return Ok(());
        };
        for child in children.flatten() {
            let name = directory.join(child.file_name());
            if origin != Origin::Old && self.found.insert(name.clone()) {
                self.report(&name, EventType::EVENT_TYPE_CREATE);
                if origin == Origin::Made && has_content(&child) {
                    self.report(&name, EventType::EVENT_TYPE_WRITE);
                }
            }
            if child.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.add(&name, origin)?;
            }
        }
        Ok(())
    }

    fn report(&mut self, name: &Path, kind: EventType) {
        let described = matches!(
            kind,
            EventType::EVENT_TYPE_CREATE
                | EventType::EVENT_TYPE_WRITE
                | EventType::EVENT_TYPE_CHMOD
        );
        let entry = (described && self.options.include_entry)
            .then(|| entry::stat(&self.root.join(name)).ok())
            .flatten();
        let event = FilesystemEvent {
            name: name.display().to_string(),
            r#type: kind.into(),
            entry: entry.into(),
            ..Default::default()
        };
        self.ready.push_back(event);
    }
}

fn has_content(child: &fs::DirEntry) -> bool {
    child
        .metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0)
}

/// What an event is in the contract's words, in its order.
fn kinds(mask: EventMask) -> Vec<EventType> {
    [
        (
            EventMask::CREATE | EventMask::MOVED_TO,
            EventType::EVENT_TYPE_CREATE,
        ),
        (EventMask::MOVED_FROM, EventType::EVENT_TYPE_RENAME),
        (EventMask::ATTRIB, EventType::EVENT_TYPE_CHMOD),
        (EventMask::MODIFY, EventType::EVENT_TYPE_WRITE),
        (EventMask::DELETE, EventType::EVENT_TYPE_REMOVE),
    ]
    .into_iter()
    .filter(|(bits, _)| mask.intersects(*bits))
    .map(|(_, kind)| kind)
    .collect()
}

/// Watches that are asked instead of followed.
#[derive(Default)]
pub struct Watchers {
    next: AtomicU64,
    all: Mutex<HashMap<String, Watch>>,
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
        all.insert(id.clone(), watch);
        Ok(id)
    }

    /// Events since the last time; `None` if there is no such watch.
    pub fn take_events(&self, id: &str) -> Option<Result<Vec<FilesystemEvent>, FileError>> {
        Some(self.lock().get_mut(id)?.take())
    }

    /// Ends a watch; false if there is none.
    pub fn remove(&self, id: &str) -> bool {
        self.lock().remove(id).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Watch>> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(watch: &mut Watch) -> Vec<(String, EventType)> {
        let events = watch.take().expect("readable");
        events
            .into_iter()
            .filter_map(|e| Some((e.name, e.r#type.as_known()?)))
            .collect()
    }

    #[tokio::test]
    async fn events_are_there_as_soon_as_the_change_is_made() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut watch = Watch::open(dir.path(), WatchOptions::default()).expect("watched");
        fs::write(dir.path().join("f"), "x").expect("written");
        let created = ("f".to_owned(), EventType::EVENT_TYPE_CREATE);
        let written = ("f".to_owned(), EventType::EVENT_TYPE_WRITE);
        assert_eq!(seen(&mut watch), [created, written]);
        fs::rename(dir.path().join("f"), dir.path().join("g")).expect("renamed");
        let from = ("f".to_owned(), EventType::EVENT_TYPE_RENAME);
        let to = ("g".to_owned(), EventType::EVENT_TYPE_CREATE);
        assert_eq!(seen(&mut watch), [from, to]);
        fs::remove_file(dir.path().join("g")).expect("removed");
        assert_eq!(
            seen(&mut watch),
            [("g".to_owned(), EventType::EVENT_TYPE_REMOVE)]
        );
    }

    #[tokio::test]
    async fn what_is_made_in_a_new_directory_at_once_is_seen() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let options = WatchOptions {
            recursive: true,
            include_entry: true,
            ..Default::default()
        };
        let mut watch = Watch::open(dir.path(), options).expect("watched");
        fs::create_dir_all(dir.path().join("a/b")).expect("made");
        fs::write(dir.path().join("a/b/f"), "x").expect("written");
        let first = seen(&mut watch);
        let created = ["a", "a/b", "a/b/f"].map(|name| (name, EventType::EVENT_TYPE_CREATE));
        for (name, kind) in created
            .into_iter()
            .chain([("a/b/f", EventType::EVENT_TYPE_WRITE)])
        {
            assert!(
                first.contains(&(name.to_owned(), kind)),
                "{name} {kind:?} in {first:?}"
            );
        }
        fs::write(dir.path().join("a/b/f"), "xy").expect("written");
        let later = seen(&mut watch);
        assert!(
            later.contains(&("a/b/f".to_owned(), EventType::EVENT_TYPE_WRITE)),
            "{later:?}"
        );
    }

    #[tokio::test]
    async fn what_comes_with_a_moved_directory_was_not_written_here() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (watched, away) = (dir.path().join("watched"), dir.path().join("away"));
        for made in [&watched, &away] {
            fs::create_dir(made).expect("made");
        }
        fs::write(away.join("f"), "x").expect("written");
        let options = WatchOptions {
            recursive: true,
            ..Default::default()
        };
        let mut watch = Watch::open(&watched, options).expect("watched");
        fs::rename(&away, watched.join("d")).expect("moved");
        let created = |name: &str| (name.to_owned(), EventType::EVENT_TYPE_CREATE);
        assert_eq!(seen(&mut watch), [created("d"), created("d/f")]);
    }

    #[tokio::test]
    async fn only_directories_are_watched() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let watch = Watch::open(file.path(), WatchOptions::default());
        assert!(matches!(watch, Err(FileError::NotADirectory(_))));
    }
}
