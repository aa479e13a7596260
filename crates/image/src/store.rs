//! Directory of images: its contents, and how images are added and removed.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rand::RngExt as _;
use serde::{Deserialize, Serialize};
use wrenn_model::TemplateName;

use crate::Recipe;

/// Directory of images.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// Template: the files and defaults that sandboxes are created from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Name of the template.
    pub name: TemplateName,
    /// Path of the uncompressed kernel (ELF).
    pub kernel: PathBuf,
    /// Path of the initial RAM disk.
    pub initrd: PathBuf,
    /// Path of the raw file system image; never written to.
    pub rootfs: PathBuf,
    /// Default number of virtual CPUs of a sandbox.
    pub vcpus: u32,
    /// Default memory of a sandbox, in MiB.
    pub memory_mib: u32,
    /// Disk space of its parts, in bytes.
    pub size_bytes: u64,
    /// Creation time, in milliseconds since 1970.
    pub created_unix_ms: i64,
    /// User that runs commands when a request names none.
    pub default_user: String,
}

/// Content of `templates/<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TemplateRecord {
    pub(crate) kernel_key: String,
    pub(crate) rootfs_key: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) default_user: String,
    pub(crate) created_unix_ms: i64,
}

/// Errors of the image store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The template does not exist.
    #[error(
        "template `{name}` not found; if it is a built-in template, build it with `wrenn image build {name}`"
    )]
    NotFound {
        /// Name of the template.
        name: TemplateName,
    },
    /// A sandbox or a snapshot depends on the template.
    #[error("template `{name}` is in use; remove its sandboxes and snapshots first")]
    InUse {
        /// Name of the template.
        name: TemplateName,
    },
    /// A file of the store is damaged, or a file that it references is missing.
    #[error("{path}, or a file that it references, is damaged; rebuild the template or remove it")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
    },
    /// A file system operation failed.
    #[error("failed to {step} {path}")]
    Io {
        /// Operation that failed.
        step: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Cause of the failure.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn io_error<'a>(
    step: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}

/// Exclusive lock on a store, held by one process at a time.
#[derive(Debug)]
pub struct StoreLock(#[expect(dead_code, reason = "held, not used")] Flock<fs::File>);

/// Files in the directory of a kernel.
pub(crate) const KERNEL_FILES: [&str; 2] = ["vmlinux", "initrd.img"];

/// File in the directory of a kernel that builds of root file systems read.
pub(crate) const MODULES_FILE: &str = "modules.tar";

/// File in the directory of a root file system.
pub(crate) const ROOTFS_FILE: &str = "rootfs.ext4";

impl ImageStore {
    /// Opens a store and creates its missing directories.
    ///
    /// # Errors
    /// If a directory cannot be created.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["kernels", "rootfs", "templates", "cache", "tmp"] {
            let path = root.join(dir);
            fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Returns one template.
    ///
    /// # Errors
    /// `NotFound`, or `Damaged` if a part of the template is missing.
    pub fn template(&self, name: &TemplateName) -> Result<Template, StoreError> {
        let record = self
            .record(name)?
            .ok_or_else(|| StoreError::NotFound { name: name.clone() })?;
        self.resolve(name, &record)
    }

    /// Returns all templates, sorted by name; for a damaged one, its error.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn each(&self) -> Result<Vec<Result<Template, StoreError>>, StoreError> {
        let mut all = Vec::new();
        for name in self.names()? {
            match self.template(&name) {
                // Removed after its name was read.
                Err(StoreError::NotFound { .. }) => {}
                template => all.push(template),
            }
        }
        Ok(all)
    }

    /// Returns all templates, sorted by name.
    ///
    /// # Errors
    /// If the directory cannot be read or a template is damaged.
    pub fn templates(&self) -> Result<Vec<Template>, StoreError> {
        self.each()?.into_iter().collect()
    }

    /// Removes a template, and those of its parts that no other template shares. `in_use` returns
    /// true if a sandbox or a snapshot depends on a file.
    ///
    /// # Errors
    /// `NotFound`; `InUse`, with nothing changed.
    pub fn remove(
        &self,
        _lock: &StoreLock,
        name: &TemplateName,
        in_use: impl Fn(&Path) -> bool,
    ) -> Result<(), StoreError> {
        let record = self.record(name)?;
        let record = record.ok_or_else(|| StoreError::NotFound { name: name.clone() })?;
        if in_use(&self.rootfs_dir(&record.rootfs_key).join(ROOTFS_FILE)) {
            return Err(StoreError::InUse { name: name.clone() });
        }
        let path = self.record_path(name);
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        self.remove_unreferenced(&in_use)
    }

    /// Removes kernels and root file systems that no template references and no sandbox depends on,
    /// and package layers that no template was built from.
    fn remove_unreferenced(&self, in_use: &impl Fn(&Path) -> bool) -> Result<(), StoreError> {
        let names = self.names()?;
        let records = names
            .iter()
            .map(|name| self.record(name))
            .collect::<Result<Vec<_>, _>>()?;
        let kept = |key: &str| {
            let mut records = records.iter().flatten();
            records.any(|r| r.kernel_key == key || r.rootfs_key == key)
        };
        for (kind, file) in [("kernels", KERNEL_FILES[0]), ("rootfs", ROOTFS_FILE)] {
            let dir = self.root.join(kind);
            for key in list(&dir)? {
                let path = dir.join(&key);
                if !kept(&key) && !in_use(&path.join(file)) {
                    self.discard(&path)?;
                }
            }
        }
        let layers: Vec<PathBuf> = names
            .iter()
            .filter_map(Recipe::named)
            .flat_map(|recipe| recipe.layer_keys())
            .map(|key| self.layer_path(&key))
            .collect();
        let cache = self.root.join("cache");
        for name in list(&cache)? {
            let path = cache.join(name);
            if !layers.contains(&path) {
                self.discard(&path)?;
            }
        }
        Ok(())
    }

    /// Removes a file or directory. Even if this is interrupted, no part of it is left under its
    /// name.
    fn discard(&self, path: &Path) -> Result<(), StoreError> {
        let away = self.temporary()?.join("discarded");
        fs::rename(path, &away).map_err(io_error("remove", path))?;
        remove(&away)
    }

    /// Removes a directory that lacks one of `files`, so that it is built again.
    pub(crate) fn discard_unless_whole(
        &self,
        dir: &Path,
        files: &[&str],
    ) -> Result<(), StoreError> {
        if dir.exists() && !files.iter().all(|file| dir.join(file).exists()) {
            self.discard(dir)?;
        }
        Ok(())
    }

    /// Returns the directory in which template snapshots are made. An interrupted run may leave a
    /// running VM there, which the next run ends.
    #[must_use]
    pub fn template_snapshot_dir(&self) -> PathBuf {
        self.root.join("warm")
    }

    pub(crate) fn kernel_dir(&self, key: &str) -> PathBuf {
        self.root.join("kernels").join(key)
    }

    pub(crate) fn rootfs_dir(&self, key: &str) -> PathBuf {
        self.root.join("rootfs").join(key)
    }

    pub(crate) fn layer_path(&self, key: &str) -> PathBuf {
        self.root.join("cache").join(format!("{key}.tar"))
    }

    /// Creates a new directory to build in.
    pub(crate) fn temporary(&self) -> Result<PathBuf, StoreError> {
        let name = format!("{:016x}", rand::rng().random::<u64>());
        let path = self.root.join("tmp").join(name);
        fs::create_dir(&path).map_err(io_error("create", &path))?;
        Ok(path)
    }

    /// Waits for the exclusive lock, and removes the files that killed builders left. `waits` is
    /// called if another process holds the lock.
    ///
    /// # Errors
    /// If files cannot be locked or removed.
    pub fn lock(&self, waits: impl FnOnce()) -> Result<StoreLock, StoreError> {
        if let Some(lock) = self.try_lock()? {
            return Ok(lock);
        }
        waits();
        let lock = self.flock(FlockArg::LockExclusive)?;
        let lock = lock.ok_or_else(|| io_error("lock", &self.root)(Errno::EWOULDBLOCK.into()))?;
        self.locked(lock)
    }

    /// Like [`lock`](Self::lock), but returns `None` if another process holds the lock.
    ///
    /// # Errors
    /// Same as [`lock`](Self::lock).
    pub fn try_lock(&self) -> Result<Option<StoreLock>, StoreError> {
        let lock = self.flock(FlockArg::LockExclusiveNonblock)?;
        lock.map(|lock| self.locked(lock)).transpose()
    }

    /// Returns `None` if the lock is held and `how` does not wait.
    fn flock(&self, how: FlockArg) -> Result<Option<Flock<fs::File>>, StoreError> {
        let path = self.root.join("lock");
        let file = fs::File::create(&path).map_err(io_error("open", &path))?;
        match Flock::lock(file, how) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// Removes the files that killed builders left.
    fn locked(&self, lock: Flock<fs::File>) -> Result<StoreLock, StoreError> {
        let tmp = self.root.join("tmp");
        for name in list(&tmp)? {
            remove(&tmp.join(name))?;
        }
        Ok(StoreLock(lock))
    }

    pub(crate) fn record(&self, name: &TemplateName) -> Result<Option<TemplateRecord>, StoreError> {
        let path = self.record_path(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|_| StoreError::Damaged { path })
    }

    pub(crate) fn put_record(
        &self,
        name: &TemplateName,
        record: &TemplateRecord,
    ) -> Result<(), StoreError> {
        let path = self.record_path(name);
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        text.and_then(|text| wrenn_durable::replace(&path, &text, 0o644))
            .map_err(io_error("write", &path))
    }

    pub(crate) fn resolve(
        &self,
        name: &TemplateName,
        record: &TemplateRecord,
    ) -> Result<Template, StoreError> {
        let kernel_dir = self.kernel_dir(&record.kernel_key);
        let rootfs_dir = self.rootfs_dir(&record.rootfs_key);
        let [kernel, initrd] = KERNEL_FILES.map(|file| kernel_dir.join(file));
        let parts = [kernel, initrd, rootfs_dir.join(ROOTFS_FILE)];
        let mut size_bytes = 0;
        for path in &parts {
            let metadata = fs::metadata(path).map_err(|_| StoreError::Damaged {
                path: self.record_path(name),
            })?;
            // For a sparse file, its disk space rather than its length.
            size_bytes += metadata.blocks() * 512;
        }
        let [kernel, initrd, rootfs] = parts;
        Ok(Template {
            name: name.clone(),
            kernel,
            initrd,
            rootfs,
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
            size_bytes,
            created_unix_ms: record.created_unix_ms,
            default_user: record.default_user.clone(),
        })
    }

    fn record_path(&self, name: &TemplateName) -> PathBuf {
        self.root.join("templates").join(format!("{name}.json"))
    }

    fn names(&self) -> Result<Vec<TemplateName>, StoreError> {
        let mut names: Vec<TemplateName> = list(&self.root.join("templates"))?
            .iter()
            .filter_map(|file| file.strip_suffix(".json")?.parse().ok())
            .collect();
        names.sort();
        Ok(names)
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    let removed = if path.is_dir() && !path.is_symlink() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.map_err(io_error("remove", path))
}

fn list(dir: &Path) -> Result<Vec<String>, StoreError> {
    let entries = fs::read_dir(dir).map_err(io_error("read", dir))?;
    Ok(entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, ImageStore) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = ImageStore::open(dir.path()).expect("opened");
        (dir, store)
    }

    fn put(store: &ImageStore, name: &str, kernel: &str, rootfs: &str) -> TemplateName {
        for (dir, files) in [
            (store.kernel_dir(kernel), &["vmlinux", "initrd.img"][..]),
            (store.rootfs_dir(rootfs), &["rootfs.ext4"]),
        ] {
            fs::create_dir_all(&dir).expect("made");
            for file in files {
                fs::write(dir.join(file), "x").expect("written");
            }
        }
        let name: TemplateName = name.parse().expect("valid");
        let record = TemplateRecord {
            kernel_key: kernel.into(),
            rootfs_key: rootfs.into(),
            vcpus: 1,
            memory_mib: 512,
            default_user: "root".into(),
            created_unix_ms: 5,
        };
        store.put_record(&name, &record).expect("written");
        name
    }

    #[test]
    fn a_template_is_found_by_name_with_all_its_parts() {
        let (_dir, store) = store();
        let name = put(&store, "minimal", "k", "r");
        let template = store.template(&name).expect("found");
        assert!(template.rootfs.ends_with("rootfs/r/rootfs.ext4"));
        assert_eq!(store.templates().expect("readable"), [template]);
        let missing = "other".parse().expect("valid");
        assert!(matches!(
            store.template(&missing),
            Err(StoreError::NotFound { .. })
        ));
    }

    #[test]
    fn a_template_with_a_missing_part_is_said_to_be_damaged() {
        let (_dir, store) = store();
        let name = put(&store, "minimal", "k", "r");
        fs::remove_file(store.kernel_dir("k").join("initrd.img")).expect("removed");
        assert!(matches!(
            store.template(&name),
            Err(StoreError::Damaged { .. })
        ));
    }

    #[test]
    fn removing_keeps_what_others_stand_on() {
        let (_dir, store) = store();
        let first = put(&store, "first", "k", "r1");
        put(&store, "second", "k", "r2");
        let lock = store.lock(|| {}).expect("locked");
        store.remove(&lock, &first, |_| false).expect("removed");
        assert!(!store.rootfs_dir("r1").exists());
        assert!(store.kernel_dir("k").exists(), "the second has it too");
        assert!(store.rootfs_dir("r2").exists());
    }

    #[test]
    fn what_a_sandbox_stands_on_is_not_removed() {
        let (_dir, store) = store();
        let name = put(&store, "minimal", "k", "r");
        let lock = store.lock(|| {}).expect("locked");
        assert!(matches!(
            store.remove(&lock, &name, |_| true),
            Err(StoreError::InUse { .. })
        ));
        store.template(&name).expect("still there");
    }

    #[test]
    fn what_a_dead_builder_left_is_removed_by_the_next() {
        let (dir, store) = store();
        let left = store.temporary().expect("made");
        fs::write(left.join("half"), "x").expect("written");
        let half = dir.path().join("tmp/minimal.json");
        fs::write(&half, "{").expect("written");
        drop(store.lock(|| {}).expect("locked"));
        assert!(!left.exists() && !half.exists());
    }

    #[test]
    fn who_waits_for_another_is_told() {
        let (_dir, store) = store();
        let held = store.lock(|| panic!("the lock is free")).expect("locked");
        let (told, tells) = std::sync::mpsc::channel();
        let other = store.clone();
        let waiting = std::thread::spawn(move || {
            other
                .lock(|| told.send(()).expect("heard"))
                .expect("locked")
        });
        tells.recv().expect("it waits");
        drop(held);
        waiting.join().expect("its turn");
    }

    #[test]
    fn a_damaged_template_can_be_removed_and_its_parts_made_again() {
        let (_dir, store) = store();
        let name = put(&store, "minimal", "k", "r");
        fs::remove_file(store.rootfs_dir("r").join(ROOTFS_FILE)).expect("removed");
        store
            .discard_unless_whole(&store.kernel_dir("k"), &KERNEL_FILES)
            .expect("kept");
        store
            .discard_unless_whole(&store.rootfs_dir("r"), &[ROOTFS_FILE])
            .expect("discarded");
        assert!(store.kernel_dir("k").exists() && !store.rootfs_dir("r").exists());
        let lock = store.lock(|| {}).expect("locked");
        store.remove(&lock, &name, |_| false).expect("removed");
        assert!(!store.kernel_dir("k").exists());
    }

    #[test]
    fn packages_go_with_the_last_template_that_was_made_of_them() {
        let (_dir, store) = store();
        let minimal = put(&store, "minimal", "k", "r1");
        let base = put(&store, "base", "k", "r2");
        let layer = |name: &TemplateName| {
            let key = Recipe::named(name).expect("known").layer_key();
            store.layer_path(&key)
        };
        let layers = [&minimal, &base].map(layer);
        for path in &layers {
            fs::write(path, "x").expect("written");
        }
        let lock = store.lock(|| {}).expect("locked");
        store.remove(&lock, &minimal, |_| false).expect("removed");
        assert!(layers[0].exists(), "the other is made above it");
        store.remove(&lock, &base, |_| false).expect("removed");
        assert!(!layers[0].exists() && !layers[1].exists());
    }
}
