//! The kernel's queue of changes (`inotify(7)`).

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::Path,
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};
use wrenn_proto::rpc::filesystem::EventType;

/// One queue, and the directories whose changes go into it.
pub(super) struct Queue(AsyncFd<Descriptor>);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Event as reported by the kernel.
pub(super) struct RawEvent {
    /// Descriptor of the directory.
    pub(super) descriptor: WatchDescriptor,
    pub(super) mask: EventMask,
    /// Number that both halves of a move share, else 0.
    pub(super) cookie: u32,
    /// Name of the entry in the directory. `None` for the directory itself.
    pub(super) name: Option<OsString>,
}

impl Queue {
    pub(super) fn open() -> io::Result<Self> {
        #[expect(
            deprecated,
            reason = "sound for a type that owns its descriptor, as this one does"
        )]
        let queue = AsyncFd::with_interest(Descriptor(Inotify::init()?), Interest::READABLE)?;
        Ok(Self(queue))
    }

    /// Waits for events that arrived since the last call. After that, the caller must read until
    /// the queue is empty. Cancel safe.
    pub(super) async fn readable(&self) -> io::Result<()> {
        // Cleared before the queue is read, so events that arrive in between wake the caller again.
        self.0.readable().await?.clear_ready();
        Ok(())
    }

    /// Reads a few events. Returns none if the queue is empty.
    pub(super) fn read(&mut self) -> io::Result<Vec<RawEvent>> {
        let mut buffer = [0; 8192];
        match self.0.get_mut().0.read_events(&mut buffer) {
            Ok(events) => Ok(events
                .map(|event| RawEvent {
                    descriptor: event.wd,
                    mask: event.mask,
                    cookie: event.cookie,
                    name: event.name.map(ToOwned::to_owned),
                })
                .collect()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Watches a directory. A directory that is watched already keeps its descriptor, whatever its
    /// name was. Returns `None` if there is no directory at the path.
    pub(super) fn watch(&self, path: &Path) -> io::Result<Option<WatchDescriptor>> {
        let mask = WatchMask::CREATE
            | WatchMask::MODIFY
            | WatchMask::ATTRIB
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR
            | WatchMask::DONT_FOLLOW;
        match self.0.get_ref().0.watches().add(path, mask) {
            Ok(descriptor) => Ok(Some(descriptor)),
            // The directory is gone again, or the path is something else.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Stops watching a directory.
    pub(super) fn forget(&self, descriptor: WatchDescriptor) {
        // The directory may have been deleted.
        let _ = self.0.get_ref().0.watches().remove(descriptor);
    }
}

/// Returns the contract's types of an event, in the contract's order.
pub(super) fn kinds(mask: EventMask) -> impl Iterator<Item = EventType> {
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
    .filter(move |(bits, _)| mask.intersects(*bits))
    .map(|(_, kind)| kind)
}
