//! Image directories of VMMs that need a kernel or a template snapshot of their own.
//!
//! The directory has the template `minimal` of the test run. It is made once, by the first test
//! that needs it, and used until a file that it was made from has changed. The other tests wait for
//! a lock meanwhile. If only `wrenn` has changed, it decides if its template snapshot is current.

use std::{
    collections::BTreeMap,
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::service::wrenn_exe;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// File that holds what the directory was made from.
const MADE_FROM: &str = "made-from";

/// File that holds the version of `wrenn` that made or checked the template snapshot.
const CHECKED_BY: &str = "checked-by";

/// Returns the image directory of a VMM. `settings` select the VMM. `kernel` replaces the kernel of
/// the template.
pub(super) fn of(
    name: &str,
    settings: &BTreeMap<String, String>,
    kernel: Option<&Path>,
) -> Result<PathBuf> {
    let source = Source::new()?;
    let root = source.images.with_file_name("images-of-vmms");
    fs::create_dir_all(&root)?;
    let lock = fs::File::create(root.join(format!("{name}.lock")))?;
    lock.lock()?;
    let dir = root.join(name);
    let made_from = source.identity(settings, kernel)?;
    if !holds(&dir.join(MADE_FROM), &made_from) {
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        source.copy_to(&dir, kernel)?;
        // Written last, so that an interrupted copy is repeated.
        fs::write(dir.join(MADE_FROM), made_from)?;
    }
    let wrenn = version_of(&wrenn_exe())?;
    if !holds(&dir.join(CHECKED_BY), &wrenn) {
        snapshot_template(&dir, settings)?;
        fs::write(dir.join(CHECKED_BY), wrenn)?;
    }
    Ok(dir)
}

fn holds(file: &Path, text: &str) -> bool {
    fs::read_to_string(file).is_ok_and(|content| content == text)
}

/// Returns a text that changes with a program.
fn version_of(program: &Path) -> Result<String> {
    let meta = fs::metadata(program)?;
    Ok(format!(
        "{} {} {}",
        program.display(),
        meta.len(),
        meta.mtime()
    ))
}

/// Template `minimal` of the test run.
struct Source {
    images: PathBuf,
    kernel_key: String,
    rootfs_key: String,
}

impl Source {
    fn new() -> Result<Self> {
        let images = env::var_os("WRENN_IMAGES_DIR").context("WRENN_IMAGES_DIR is not set")?;
        let images = fs::canonicalize(images)?;
        let record = fs::read(images.join("templates/minimal.json"))?;
        let record: Value = serde_json::from_slice(&record)?;
        let key = |field: &str| record[field].as_str().map(str::to_owned).context("no key");
        Ok(Self {
            images,
            kernel_key: key("kernel_key")?,
            rootfs_key: key("rootfs_key")?,
        })
    }

    /// Returns a text that changes with each file that the directory is made from. The keys cover
    /// the template's files, among them the guest agent.
    fn identity(
        &self,
        settings: &BTreeMap<String, String>,
        kernel: Option<&Path>,
    ) -> Result<String> {
        let mut lines = vec![self.kernel_key.clone(), self.rootfs_key.clone()];
        lines.extend(
            settings
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        if let Some(kernel) = kernel {
            lines.push(hex::encode(Sha256::digest(fs::read(kernel)?)));
        }
        if let Some(program) = settings.get("WRENN_FIRECRACKER") {
            lines.push(version_of(Path::new(program))?);
        }
        Ok(lines.join("\n"))
    }

    fn copy_to(&self, dir: &Path, kernel: Option<&Path>) -> Result<()> {
        let kernel_dir = Path::new("kernels").join(&self.kernel_key);
        let parts = [
            kernel_dir.clone(),
            Path::new("rootfs").join(&self.rootfs_key),
        ];
        for part in parts {
            let to = dir.join(&part);
            fs::create_dir_all(to.parent().context("no parent")?)?;
            run(Command::new("cp")
                .args(["-a", "--sparse=always"])
                .args([self.images.join(part), to]))?;
        }
        fs::create_dir_all(dir.join("templates"))?;
        fs::copy(
            self.images.join("templates/minimal.json"),
            dir.join("templates/minimal.json"),
        )?;
        if let Some(kernel) = kernel {
            let dir = dir.join(kernel_dir);
            fs::copy(kernel, dir.join("vmlinux"))?;
            // The recorded checksum is that of the replaced file.
            fs::remove_file(dir.join("vmlinux.content.json")).or_else(|error| {
                if error.kind() == std::io::ErrorKind::NotFound {
                    Ok(())
                } else {
                    Err(error)
                }
            })?;
        }
        Ok(())
    }
}

/// Makes the template snapshot.
fn snapshot_template(dir: &Path, settings: &BTreeMap<String, String>) -> Result<()> {
    let data = tempfile::tempdir()?;
    let mut build = Command::new(wrenn_exe());
    build.args(["image", "build", "minimal", "--images-dir"]);
    build
        .arg(dir)
        .env("WRENN_DIR", data.path())
        .env_remove("WRENN_CPU")
        .envs(settings);
    run(&mut build)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok(())
}
