//! Room on the host's disk that guests must leave free, for pauses and for the database.
//!
//! A guest that writes while less is free is held: its virtual CPUs are paused. It continues once
//! there is space again. A guest that does not write is not affected. Without this, the guest would
//! run until the disk is full. The VMM then pauses it as well, but by then nothing else on the host
//! can write either.
//!
//! | free space | guest wrote since the last check | guest held or paused by the VMM | result |
//! |------------|----------------------------------|---------------------------------|--------|
//! | enough     | -                                | no                              | -      |
//! | enough     | -                                | yes                             | resume |
//! | too little | no                               | no                              | -      |
//! | too little | yes                              | no                              | hold   |
//! | too little | -                                | yes                             | -      |
//!
//! The time until the next check is short if the room could be reached soon.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

/// Speed at which all guests together may fill the disk, in bytes per second. Determines how often
/// is checked.
const FILL_SPEED: u64 = 1 << 30;

/// Minimum and maximum time between two checks. The maximum is also the interval at which a guest
/// that the VMM paused because the disk is full may retry its write.
const CHECK_EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Room that a guest must leave free.
#[derive(Debug)]
pub(crate) struct DiskRoom {
    /// A directory of the file system.
    dir: PathBuf,
    room_bytes: u64,
    /// Space that the guest's writable disk file used at the last check.
    used_bytes: u64,
    /// True while the guest is held.
    is_held: bool,
}

/// Action on the guest after a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Nothing,
    /// Pause the virtual CPUs.
    Hold,
    /// Resume the virtual CPUs.
    Resume,
}

impl DiskRoom {
    /// Returns the room of `room_bytes` on the file system of `dir`, for a guest that starts with
    /// the writable disk file `disk`. 0 keeps nothing free.
    pub(crate) fn new(dir: &Path, room_bytes: u64, disk: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            room_bytes,
            used_bytes: used(disk),
            is_held: false,
        }
    }

    /// True while the guest is held.
    pub(crate) const fn is_held(&self) -> bool {
        self.is_held
    }

    /// Records whether the guest is held.
    pub(crate) const fn note_held(&mut self, held: bool) {
        self.is_held = held;
    }

    /// Checks the free space. `disk` is the guest's writable disk file, and `is_stalled` is true if
    /// the VMM has paused the guest because the disk is full. Also returns the time until the next
    /// check.
    ///
    /// If the free space cannot be read, nothing is held.
    pub(crate) fn check(&mut self, disk: Option<&Path>, is_stalled: bool) -> (Action, Duration) {
        let used_bytes = disk.map_or(0, used);
        let has_written = used_bytes > std::mem::replace(&mut self.used_bytes, used_bytes);
        let free_bytes = free(&self.dir).unwrap_or(u64::MAX);
        let is_short = free_bytes < self.room_bytes;
        let action = match (is_short, self.is_held || is_stalled) {
            (false, true) => Action::Resume,
            (true, false) if has_written => Action::Hold,
            _ => Action::Nothing,
        };
        (action, self.next_check(free_bytes))
    }

    fn next_check(&self, free_bytes: u64) -> Duration {
        let (min, max) = CHECK_EVERY;
        if self.room_bytes == 0 {
            return max;
        }
        let until_room = free_bytes.saturating_sub(self.room_bytes);
        let ms = until_room.saturating_mul(1000) / FILL_SPEED;
        Duration::from_millis(ms).clamp(min, max)
    }
}

/// Returns the space that a file uses on disk, in bytes; 0 if it cannot be read.
fn used(path: &Path) -> u64 {
    // `st_blocks` counts units of 512 bytes, whatever the block size of the file system is.
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Returns the free space for users other than root, in bytes. VMMs are such users.
fn free(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_writes_is_held_while_space_is_short() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, vec![1; 4096]).unwrap();
        let mut room = DiskRoom::new(dir.path(), u64::MAX, &disk);
        // What the file used when the guest started does not count: a resumed guest can run.
        assert_eq!(room.check(Some(disk.as_path()), false).0, Action::Nothing);
        fs::write(&disk, vec![1; 65536]).unwrap();
        assert_eq!(room.check(Some(disk.as_path()), false).0, Action::Hold);
        room.note_held(true);
        assert_eq!(room.check(Some(disk.as_path()), false).0, Action::Nothing);
        // A guest that the VMM paused retries only when there is space.
        room.note_held(false);
        assert_eq!(room.check(Some(disk.as_path()), true).0, Action::Nothing);
    }

    #[test]
    fn a_held_guest_continues_when_there_is_space() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let mut room = DiskRoom::new(dir.path(), 1, &disk);
        assert_eq!(room.check(None, false).0, Action::Nothing);
        room.note_held(true);
        assert_eq!(room.check(None, false).0, Action::Resume);
        room.note_held(false);
        assert_eq!(room.check(None, true).0, Action::Resume);
        // Without a room, only the VMM pauses the guest.
        let mut none = DiskRoom::new(Path::new("/nowhere"), 0, Path::new("/nowhere"));
        assert_eq!(none.check(None, true).0, Action::Resume);
    }

    #[test]
    fn checks_are_frequent_only_if_the_room_could_be_reached_soon() {
        let room = DiskRoom::new(Path::new("/"), 1 << 30, Path::new("/nowhere"));
        assert_eq!(room.next_check(0), CHECK_EVERY.0);
        assert_eq!(room.next_check(3 << 29), Duration::from_millis(500));
        assert_eq!(room.next_check(1 << 40), CHECK_EVERY.1);
        assert_eq!(
            DiskRoom::new(Path::new("/"), 0, Path::new("/nowhere")).next_check(0),
            CHECK_EVERY.1
        );
    }
}
