//! Access of commands to the image store: templates, the guest agent's binary, and files in use.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::Deserialize;
use wrenn_image::ImageStore;
use wrenn_proto::supervise::files;

use crate::{config::Settings, output::in_full};

/// Returns the names of the usable templates. A missing store has none and is not created.
pub(crate) fn template_names(images_dir: &Path) -> Result<Vec<String>, String> {
    if !images_dir.join("templates").is_dir() {
        return Ok(Vec::new());
    }
    let store = ImageStore::open(images_dir).map_err(|e| in_full(&e))?;
    let templates = store.templates().map_err(|e| in_full(&e))?;
    Ok(templates.into_iter().map(|t| t.name.into()).collect())
}

/// Returns the path of the guest agent's binary: from the settings, in the directory of this
/// program, or where `make install` puts it.
pub(crate) fn find_envd(settings: &Settings) -> anyhow::Result<PathBuf> {
    if let Some(path) = &settings.envd {
        if !path.is_file() {
            bail!("no guest agent at {}", path.display());
        }
        return Ok(path.clone());
    }
    let exe = std::env::current_exe().context("failed to locate this program's executable")?;
    let dir = exe.parent().unwrap_or(Path::new("/"));
    let candidates = [dir.join("envd"), dir.join("../lib/wrenn/envd")];
    candidates
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .with_context(|| {
            format!(
                "no guest agent at {}; run `make build`, or set its path with --envd or WRENN_ENVD",
                candidates[0].display()
            )
        })
}

/// Returns the path of the kernel's first program, which is built and installed together with the
/// guest agent.
pub(crate) fn find_init(envd: &Path) -> anyhow::Result<PathBuf> {
    let path = envd.with_file_name("wrenn-init");
    if !path.is_file() {
        bail!(
            "no guest init at {}, in the directory of the guest agent {}; run `make build` to build both",
            path.display(),
            envd.display()
        );
    }
    Ok(path)
}

/// Files of the store that sandboxes and snapshots of a data directory depend on.
#[derive(Debug, Default)]
pub(crate) struct InUse {
    paths: Vec<PathBuf>,
    /// Snapshots from which running VMs were restored.
    builds: Vec<String>,
    /// True if the specification of a sandbox or snapshot cannot be read (yet), so that any file
    /// may be in use.
    unknown: bool,
}

impl InUse {
    /// Reads the files that every sandbox and every snapshot of the data directory depends on.
    pub(crate) fn read(dir: &Path, images_dir: &Path) -> io::Result<Self> {
        let mut in_use = Self::default();
        in_use.add_each_of(&dir.join("sandboxes"), files::SPEC, images_dir)?;
        in_use.add_each_of(&dir.join("snapshots/snapshots"), MANIFEST, images_dir)?;
        Ok(in_use)
    }

    /// Adds the files listed in `name` in each subdirectory of `dir`. Relative paths start at the
    /// image directory.
    fn add_each_of(&mut self, dir: &Path, name: &str, images_dir: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        for sandbox_dir in entries {
            let sandbox_dir = sandbox_dir?.path();
            if !sandbox_dir.is_dir() {
                continue;
            }
            match read_parts(&sandbox_dir.join(name)) {
                Some(parts) => {
                    for path in [parts.kernel, parts.initrd, parts.base_disk] {
                        // The directories may have been moved since the path was written.
                        self.paths.extend(moved(images_dir, &path).map(real));
                        self.paths.push(real(images_dir.join(path)));
                    }
                    self.builds.extend(parts.restore.map(|from| from.build));
                }
                // Removed in the meantime, or not written yet.
                None => self.unknown |= sandbox_dir.exists(),
            }
        }
        Ok(())
    }

    /// Returns the snapshots from which running VMs were restored; `None` if unknown.
    pub(crate) fn builds(&self) -> Option<Vec<String>> {
        (!self.unknown).then(|| self.builds.clone())
    }

    /// True if a sandbox or a snapshot depends on this file.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        self.unknown || self.paths.contains(&real(path.to_owned()))
    }
}

/// File that lists the files of a snapshot.
const MANIFEST: &str = "manifest.json";

/// Fields of a `SupervisorSpec` or of a snapshot's manifest that matter here, regardless of the
/// version that wrote it.
#[derive(Debug, Deserialize)]
struct Parts {
    kernel: PathBuf,
    initrd: PathBuf,
    base_disk: PathBuf,
    /// Snapshot from which the VM was restored; absent if it was booted.
    #[serde(default)]
    restore: Option<Origin>,
}

#[derive(Debug, Deserialize)]
struct Origin {
    build: String,
}

fn read_parts(path: &Path) -> Option<Parts> {
    let text = fs::read(path).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Returns the path in the image directory of a file that has this path in another one.
fn moved(images_dir: &Path, path: &Path) -> Option<PathBuf> {
    let file = path.file_name()?;
    let key = path.parent()?;
    let kind = key.parent()?;
    let moved = images_dir.join(kind.file_name()?).join(key.file_name()?);
    Some(moved.join(file))
}

/// Returns the path with symbolic links resolved, so that two paths of one file are equal.
fn real(path: PathBuf) -> PathBuf {
    fs::canonicalize(&path).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_found_in(sandbox_dir: &str, name: &str) {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = dir.path().join("rootfs.ext4");
        fs::write(&disk, "").expect("writable");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&disk, &link).expect("a link");
        let sandbox_dir = dir.path().join(sandbox_dir);
        fs::create_dir_all(&sandbox_dir).expect("a directory");
        let spec = serde_json::json!({
            "id": "sb-1", "kernel": "/k/vmlinux", "initrd": "/k/initrd.img", "base_disk": link,
            "restore": { "build": "00ff" },
        });
        fs::write(sandbox_dir.join(name), spec.to_string()).expect("writable");
        let sandbox_dir = sandbox_dir.with_file_name("2");
        fs::create_dir_all(&sandbox_dir).expect("a directory");
        let spec = serde_json::json!({
            "kernel": "kernels/key/vmlinux", "initrd": "/gone/kernels/key/initrd.img",
            "base_disk": "rootfs/key/rootfs.ext4",
        });
        fs::write(sandbox_dir.join(name), spec.to_string()).expect("writable");

        let images = dir.path().join("images");
        let in_use = InUse::read(dir.path(), &images).expect("readable");
        assert!(in_use.holds(&disk));
        assert!(in_use.holds(&images.join("rootfs/key/rootfs.ext4")));
        assert!(in_use.holds(&images.join("kernels/key/initrd.img")));
        assert!(in_use.holds(Path::new("/k/vmlinux")));
        assert!(!in_use.holds(Path::new("/other")));
        assert_eq!(in_use.builds(), Some(vec!["00ff".to_owned()]));
    }

    #[test]
    fn files_of_sandboxes_and_snapshots_are_in_use_by_any_path() {
        is_found_in("sandboxes/sb-1", files::SPEC);
        is_found_in("snapshots/snapshots/00", MANIFEST);
    }

    #[test]
    fn unreadable_sandbox_may_use_any_file() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(
            !InUse::read(dir.path(), dir.path())
                .expect("none")
                .holds(Path::new("/x"))
        );
        fs::create_dir_all(dir.path().join("sandboxes/sb-1")).expect("a directory");
        let in_use = InUse::read(dir.path(), dir.path()).expect("one");
        assert!(in_use.holds(Path::new("/x")));
        assert_eq!(in_use.builds(), None);
    }

    #[test]
    fn missing_store_is_empty_and_not_created() {
        let dir = tempfile::tempdir().expect("a directory");
        let images = dir.path().join("images");
        assert_eq!(template_names(&images), Ok(vec![]));
        assert!(!images.exists());
    }
}
