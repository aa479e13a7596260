//! Cache of the snapshot files whose checksums were verified.
//!
//! A damaged page would make a VM fail at some later time, so every file is verified before a VM is
//! restored from it. This happens once, as long as the file does not change: a template snapshot
//! has about 60 MB, and a create takes a quarter of a second.

use std::{collections::HashSet, fs::Metadata, os::unix::fs::MetadataExt as _, path::Path};

use parking_lot::Mutex;
use wrenn_snapshot::{Chain, ChainError, StoreError, verify_layer};

/// Maximum number of cached files. When it is reached, all entries are dropped: few files are in
/// use, and verifying one again is harmless.
const MOST: usize = 4096;

/// Identity of a file's content, valid as long as the file is not written to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl Identity {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

/// Files that this agent has verified.
#[derive(Debug, Default)]
pub(super) struct Verified(Mutex<HashSet<Identity>>);

impl Verified {
    /// Verifies the files of a chain that were not verified before. Blocks until they have been
    /// read.
    pub(super) fn verify(&self, chain: &Chain) -> Result<(), ChainError> {
        for diff in chain.files() {
            if let Some(meta) = diff.metadata()? {
                self.once(&meta, || diff.verify())?;
            }
        }
        Ok(())
    }

    /// Verifies a disk layer, if it was not verified before and has a checksum. Blocks until it has
    /// been read.
    pub(super) fn verify_layer(&self, path: &Path) -> Result<(), StoreError> {
        let meta = std::fs::metadata(path).map_err(|source| StoreError::Io {
            step: "inspect",
            path: path.to_owned(),
            source,
        })?;
        self.once(&meta, || verify_layer(path))
    }

    /// Runs `verify` unless it succeeded for the same content before.
    fn once<E>(&self, meta: &Metadata, verify: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let identity = Identity::of(meta);
        if self.lock().contains(&identity) {
            return Ok(());
        }
        verify()?;
        let mut known = self.lock();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(identity);
        Ok(())
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, HashSet<Identity>> {
        self.0.lock()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use wrenn_snapshot::{DiffWriter, SnapshotId};

    #[test]
    fn file_is_verified_once_and_again_after_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let build = SnapshotId::random();
        let path = dir.path().join(format!("{build}.mem"));
        let mut writer = DiffWriter::create(&path, build, 8192, None).unwrap();
        writer.push(0, &[7; 8192]).unwrap();
        let (header, _) = writer.finish().unwrap();
        let open = || Chain::open(&[dir.path().to_owned()], &header).unwrap();
        let verified = Verified::default();
        verified.verify(&open()).unwrap();
        verified.verify(&open()).unwrap();
        assert_eq!(verified.lock().len(), 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[5000] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        // File timestamps are coarse. The modification time is set explicitly, so that a write
        // within the same tick is detected here.
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
        std::fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(later)
            .unwrap();
        let error = verified.verify(&open()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
