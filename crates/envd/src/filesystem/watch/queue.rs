//! The kernel's queue of what changed (`inotify(7)`).

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    path::Path,
};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::{Interest, unix::AsyncFd};
use wrenn_proto::rpc::filesystem::EventType;

/// One queue, and the directories that it is filled from.
pub(super) struct Queue(AsyncFd<Descriptor>);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// An event as the kernel tells it.
pub(super) struct RawEvent {
    /// Which directory's.
    pub(super) descriptor: WatchDescriptor,
    pub(super) mask: EventMask,
    /// The same of both halves of a move, else 0.
    pub(super) cookie: u32,
    /// Of what is in the directory; none if it is the directory itself.
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

    /// Waits until something came since the last time. Who was told must read until nothing is left. Cancel safe.
    pub(super) async fn readable(&self) -> io::Result<()> {
        // Before it is read: what comes in between wakes again.
        self.0.readable().await?.clear_ready();
        Ok(())
    }

    /// A few events; none if the queue is empty.
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

    /// Watches a directory; one that is watched already keeps its descriptor, whatever its name was. `None` if there is
    /// none.
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
            // It is gone again, or something else is there.
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

    /// Watches a directory no more.
    pub(super) fn forget(&self, descriptor: WatchDescriptor) {
        // It may be deleted by now.
        let _ = self.0.get_ref().0.watches().remove(descriptor);
    }
}

/// What an event is in the contract's words, in its order.
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
