//! The directory of images: what is in it, and how things come into it and leave it.

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
use wrenn_proto::TemplateName;

use crate::Recipe;

/// A directory of images.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// What sandboxes are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Uncompressed kernel (ELF).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// File system image, raw; never written to.
    pub rootfs: PathBuf,
    /// Virtual CPUs of a sandbox that does not say.
    pub vcpus: u32,
    /// Memory of a sandbox that does not say, MiB.
    pub memory_mib: u32,
    /// Space that its parts take on the disk, bytes.
    pub size_bytes: u64,
    /// When it was made, milliseconds since 1970.
    pub created_unix_ms: i64,
    /// User that commands run as when a request names none.
    pub default_user: String,
}

/// `templates/<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TemplateRecord {
    pub(crate) kernel_key: String,
    pub(crate) rootfs_key: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) default_user: String,
    pub(crate) created_unix_ms: i64,
}

/// Why the store could not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no such template.
    #[error("there is no template `{name}`; `wrenn image build {name}` makes one if it is known")]
    NotFound {
        /// The name.
        name: TemplateName,
    },
    /// Something stands on it.
    #[error("the template `{name}` is in use: destroy its sandboxes and snapshots first")]
    InUse {
        /// The name.
        name: TemplateName,
    },
    /// A file of the store is not what it should be.
    #[error("{path} is damaged, or what it names; build the template again, or remove it")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("could not {step} {path}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Its failure.
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

/// The right to change a store, held by one process at a time.
#[derive(Debug)]
pub struct StoreLock(#[expect(dead_code, reason = "held, not used")] Flock<fs::File>);

/// What a kernel's directory holds.
pub(crate) const KERNEL_FILES: [&str; 2] = ["vmlinux", "initrd.img"];

/// What a root file system's directory holds.
pub(crate) const ROOTFS_FILE: &str = "rootfs.ext4";

impl ImageStore {
    /// Opens a store, and makes its directories if they are not there.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["kernels", "rootfs", "templates", "cache", "tmp"] {
            let path = root.join(dir);
            fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// One template.
    ///
    /// # Errors
    /// `NotFound`, or `Damaged` if a part of it is missing.
    pub fn template(&self, name: &TemplateName) -> Result<Template, StoreError> {
        let record = self
            .record(name)?
            .ok_or_else(|| StoreError::NotFound { name: name.clone() })?;
        self.resolve(name, &record)
    }

    /// All templates, by name: each, or what is wrong with it.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn each(&self) -> Result<Vec<Result<Template, StoreError>>, StoreError> {
        let mut all = Vec::new();
        for name in self.names()? {
            match self.template(&name) {
                // Removed since its name was read.
                Err(StoreError::NotFound { .. }) => {}
                template => all.push(template),
            }
        }
        Ok(all)
    }

    /// All templates, by name.
    ///
    /// # Errors
    /// If the directory cannot be read or a template is damaged.
    pub fn templates(&self) -> Result<Vec<Template>, StoreError> {
        self.each()?.into_iter().collect()
    }

    /// Removes a template, and of its parts those that no other template has. `in_use` says whether a sandbox stands on
    /// a root file system.
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

    /// Removes kernels and root file systems that no template has and no sandbox stands on, and packages that no template
    /// was made of.
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

    /// Removes a file or directory, of which no part is found under its name afterwards, however this is interrupted.
    fn discard(&self, path: &Path) -> Result<(), StoreError> {
        let away = self.temporary()?.join("discarded");
        fs::rename(path, &away).map_err(io_error("remove", path))?;
        remove(&away)
    }

    /// Removes a directory that lacks one of its files, so that it is made again.
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

    /// Where templates are booted once. A run that is interrupted leaves a machine there, which the next one ends.
    #[must_use]
    pub fn warm_dir(&self) -> PathBuf {
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

    /// A new directory to build in.
    pub(crate) fn temporary(&self) -> Result<PathBuf, StoreError> {
        let name = format!("{:016x}", rand::rng().random::<u64>());
        let path = self.root.join("tmp").join(name);
        fs::create_dir(&path).map_err(io_error("make", &path))?;
        Ok(path)
    }

    /// Waits for the right to change the store, and removes what dead builders left. `waits` is called if another process
    /// has it.
    ///
    /// # Errors
    /// If files cannot be locked or removed.
    pub fn lock(&self, waits: impl FnOnce()) -> Result<StoreLock, StoreError> {
        let path = self.root.join("lock");
        let file = fs::File::create(&path).map_err(io_error("open", &path))?;
        let failed = |errno: Errno| io_error("lock", &path)(errno.into());
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => {
                waits();
                let waited = Flock::lock(file, FlockArg::LockExclusive);
                waited.map_err(|(_, errno)| failed(errno))?
            }
            Err((_, errno)) => return Err(failed(errno)),
        };
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
        let temporary = self.root.join("tmp").join(format!("{name}.json"));
        let write = || {
            fs::write(&temporary, serde_json::to_vec_pretty(record)?)?;
            fs::File::open(&temporary)?.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(io_error("write", &path))
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
            // Of a sparse file: what it takes, not what it seems.
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
        let held = store.lock(|| panic!("nobody has it")).expect("locked");
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
