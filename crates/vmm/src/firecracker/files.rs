//! Files without a name into which Firecracker writes its snapshots.
//!
//! Firecracker opens the files of a snapshot by path. A path of the host is not visible in the
//! jail, and a directory that the jail could write to would let a VMM that was broken out of fill
//! the disk. So Firecracker inherits two files without a name, which it opens again as
//! `/proc/self/fd/N`. They belong to the jail's user, have the size that the jail permits for a
//! file, and are gone with the process.
//!
//! The memory file collects changes over the life of the process. Its first snapshot writes the
//! pages that changed since the start; each further one overwrites those that changed since. The
//! holes are therefore the pages that have not changed since the start, whatever became of the
//! snapshots before.

use std::{
    fs::File,
    io::{self, Read, Seek as _, Write},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::fs::FileExt as _,
    },
    path::Path,
};

use rustix::fs::{Gid, Mode, OFlags, SeekFrom, Uid, fchown};

/// Maximum size of the state of CPUs and devices, in bytes. It is some tens of kB.
const MAX_STATE_BYTES: u64 = 16 * 1024 * 1024;

/// Size of a page of guest memory, in bytes.
const PAGE_BYTES: u64 = 4096;

/// Files of the snapshots of one Firecracker process.
#[derive(Debug)]
pub struct SnapshotFiles {
    state: File,
    memory: File,
    /// True if a hole in the memory file can be as small as a page.
    is_exact: bool,
}

impl SnapshotFiles {
    /// Creates the files on the file system of `dir`, for a process that runs as `uid`.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn create(dir: &Path, uid: u32) -> io::Result<Self> {
        let memory = unnamed(dir, uid)?;
        Ok(Self {
            state: unnamed(dir, uid)?,
            is_exact: has_page_holes(&memory)?,
            memory,
        })
    }

    /// Path of the file for the state of CPUs and devices, as Firecracker sees it.
    #[must_use]
    pub fn state_path(&self) -> String {
        descriptor_path(self.state.as_raw_fd())
    }

    /// Path of the file for the memory, as Firecracker sees it.
    #[must_use]
    pub fn memory_path(&self) -> String {
        descriptor_path(self.memory.as_raw_fd())
    }

    /// True if a hole in the memory file can be as small as a page. Otherwise, a page that did not
    /// change may look like a page of zeros, and only full snapshots are usable.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    /// Descriptors that Firecracker inherits.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.state.as_fd(), self.memory.as_fd()]
    }

    /// Replaces the state by the content of `from`.
    pub(super) fn put_state(&self, from: OwnedFd) -> io::Result<()> {
        self.state.set_len(0)?;
        (&self.state).rewind()?;
        copy(File::from(from), &self.state)
    }

    /// Copies the state that Firecracker wrote to `to`, an empty file.
    pub(super) fn take_state(&self, to: OwnedFd) -> io::Result<()> {
        // Firecracker replaced the content through a descriptor of its own.
        (&self.state).rewind()?;
        copy(&self.state, File::from(to))
    }

    /// Opens the memory file for reading. The descriptor has a position of its own.
    pub(super) fn memory(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.memory_path(), flags, Mode::empty())?)
    }
}

/// Returns the path at which a process opens one of its descriptors again.
pub(super) fn descriptor_path(number: RawFd) -> String {
    format!("/proc/self/fd/{number}")
}

/// Creates a file without a name that `uid` can open.
fn unnamed(dir: &Path, uid: u32) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = rustix::fs::open(dir, flags, mode)?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    fchown(&file, Some(user), Some(group))?;
    Ok(file.into())
}

/// True if one page that is written is the only data of an empty file. File systems with larger
/// blocks do not tell pages apart.
fn has_page_holes(file: &File) -> io::Result<bool> {
    const PAGE: [u8; 4096] = [1; 4096];
    let written = 5 * PAGE_BYTES;
    file.set_len(64 * PAGE_BYTES)?;
    file.write_all_at(&PAGE, written)?;
    let data = rustix::fs::seek(file, SeekFrom::Data(0))?;
    let hole = rustix::fs::seek(file, SeekFrom::Hole(written))?;
    file.set_len(0)?;
    Ok((data, hole) == (written, written + PAGE_BYTES))
}

/// Copies the rest of a file, which must not be larger than any state.
fn copy(from: impl Read, mut to: impl Write) -> io::Result<()> {
    let copied = io::copy(&mut from.take(MAX_STATE_BYTES + 1), &mut to)?;
    if copied > MAX_STATE_BYTES {
        let reason = format!("the state is larger than {MAX_STATE_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn files() -> SnapshotFiles {
        let uid = rustix::process::getuid().as_raw();
        SnapshotFiles::create(&std::env::temp_dir(), uid).expect("created")
    }

    #[test]
    fn files_have_no_name_and_belong_to_the_jail() {
        let dir = tempfile::tempdir().expect("a directory");
        let uid = rustix::process::getuid().as_raw();
        let files = SnapshotFiles::create(dir.path(), uid).expect("created");
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 0);
        for path in [files.state_path(), files.memory_path()] {
            use std::os::unix::fs::MetadataExt as _;
            let meta = fs::metadata(path).expect("open");
            assert_eq!((meta.uid(), meta.mode() & 0o777), (uid, 0o600));
            assert_eq!(meta.len(), 0);
        }
        assert_ne!(files.state_path(), files.memory_path());
    }

    #[test]
    fn state_is_replaced_and_taken_as_a_whole() {
        let files = files();
        let given = tempfile::tempfile().expect("a file");
        for state in ["a long state", "short"] {
            (&given).rewind().expect("possible");
            given.set_len(0).expect("possible");
            (&given).write_all(state.as_bytes()).expect("written");
            (&given).rewind().expect("possible");
            let from = given.try_clone().expect("open");
            files.put_state(from.into()).expect("copied");
            assert_eq!(fs::read_to_string(files.state_path()).expect("read"), state);
        }
        // Firecracker opens the file again and replaces its content.
        fs::write(files.state_path(), "saved by the VMM").expect("written");
        let taken = tempfile::NamedTempFile::new().expect("a file");
        let to = taken.reopen().expect("open");
        files.take_state(to.into()).expect("copied");
        assert_eq!(
            fs::read_to_string(taken.path()).expect("read"),
            "saved by the VMM"
        );
    }

    #[test]
    fn a_state_that_is_too_large_is_an_error() {
        let files = files();
        files.state.set_len(MAX_STATE_BYTES + 1).expect("sparse");
        let taken = tempfile::tempfile().expect("a file");
        let error = files.take_state(taken.into()).expect_err("too large");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn memory_is_read_only_for_the_reader_and_has_a_position_of_its_own() {
        let files = files();
        fs::write(files.memory_path(), "memory").expect("written");
        let mut memory = File::from(files.memory().expect("open"));
        memory.write_all(b"x").expect_err("read-only");
        let mut text = String::new();
        memory.read_to_string(&mut text).expect("read");
        assert_eq!(text, "memory");
    }

    #[test]
    fn file_system_of_the_tests_tells_pages_apart() {
        assert!(files().is_exact());
    }
}
