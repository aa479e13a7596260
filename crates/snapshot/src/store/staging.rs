//! A snapshot in the making.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use super::{Store, StoreError, diff_name, failed, sync_dir};
use crate::{BuildId, Manifest, layout};

/// A directory to write a snapshot to. Gone with all that is in it when it is dropped, unless it was published.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    build: BuildId,
    dir: PathBuf,
}

impl Store {
    /// Begins a snapshot.
    ///
    /// # Errors
    /// If its directory cannot be made.
    pub fn stage(&self, build: BuildId) -> Result<Staging, StoreError> {
        let dir = self.root.join("staging").join(build.to_string());
        fs::create_dir(&dir).map_err(failed("make", &dir))?;
        Ok(Staging {
            store: self.clone(),
            build,
            dir,
        })
    }
}

impl Staging {
    /// Where to write it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Its build id.
    #[must_use]
    pub const fn build(&self) -> BuildId {
        self.build
    }

    /// Puts it into its place. `layers` are frozen files of its disk that are not in the store yet, with their names there; they
    /// are linked, and stay where they are.
    ///
    /// # Errors
    /// If a file is missing or the disk is full. Then nothing of it is there.
    pub fn publish(
        self,
        manifest: &Manifest,
        layers: &[(BuildId, PathBuf)],
    ) -> Result<(), StoreError> {
        let _lock = self.store.lock(FlockOperation::LockShared)?;
        let path = self.dir.join(layout::MANIFEST);
        let text = serde_json::to_vec_pretty(manifest).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(&path, text))
            .map_err(failed("write", &path))?;
        for name in [
            layout::HEADER,
            layout::DEVICE,
            layout::MEMORY,
            layout::MANIFEST,
        ] {
            flush(&self.dir.join(name))?;
        }
        for (build, source) in layers {
            flush(source)?;
            let target = self.store.layer(*build);
            fs::hard_link(source, &target).map_err(failed("link", &target))?;
        }
        sync_dir(&self.store.root.join("disks"))?;
        let memory = self.store.memory_dir();
        let target = memory.join(diff_name(self.build));
        fs::rename(self.dir.join(layout::MEMORY), &target).map_err(failed("place", &target))?;
        sync_dir(&memory)?;
        sync_dir(&self.dir)?;
        let target = self.store.snapshot_dir(self.build);
        fs::rename(&self.dir, &target).map_err(failed("place", &target))?;
        sync_dir(&self.store.root.join("snapshots"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.dir.display(), %error, "a snapshot that was not finished is left");
            }
            _ => {}
        }
    }
}

fn flush(path: &Path) -> Result<(), StoreError> {
    let file = fs::File::open(path).map_err(failed("open", path))?;
    file.sync_all().map_err(failed("flush", path))
}
