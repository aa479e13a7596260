//! Kernel, initramfs and modules, built from Debian's kernel package.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{BuildError, Builder, CommandError};
use crate::{
    StoreError, bzimage,
    cpio::Archive,
    store::{MODULES_FILE, io_error},
};

/// Name of the description of a kernel.
const MANIFEST: &str = "manifest.json";

const QUICK: Duration = Duration::from_secs(60);
const DOWNLOAD: Duration = Duration::from_secs(600);

/// Content of a kernel's `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
struct KernelManifest {
    /// Package that contains the kernel.
    package: String,
    /// Release, as `uname -r` prints it.
    release: String,
    /// Modules in the initramfs.
    modules: Vec<String>,
    /// Hash of `modules.tar`, hexadecimal.
    modules_sha256: String,
}

/// Modules of a kernel in the image store.
#[derive(Debug)]
pub(super) struct Modules {
    /// Tar file that contains the directory `modules`.
    pub(super) tar: PathBuf,
    /// Release of the kernel.
    pub(super) release: String,
    /// Hash of the tar file, hexadecimal.
    pub(super) sha256: String,
}

impl Modules {
    /// Reads the description of a kernel's modules.
    pub(super) fn of(kernel_dir: &Path) -> Result<Self, StoreError> {
        let path = kernel_dir.join(MANIFEST);
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        let manifest: KernelManifest =
            serde_json::from_slice(&text).map_err(|_| StoreError::Damaged { path })?;
        Ok(Self {
            tar: kernel_dir.join(MODULES_FILE),
            release: manifest.release,
            sha256: manifest.modules_sha256,
        })
    }
}

/// Builds `vmlinux`, `initrd.img`, `modules.tar` and `manifest.json` in `dir`. `init` is the
/// kernel's first program.
pub(super) fn build(builder: &Builder<'_>, init: &[u8], dir: &Path) -> Result<(), BuildError> {
    let work = dir.join("work");
    fs::create_dir(&work).map_err(io_error("create", &work))?;
    let package = kernel_package(builder)?;
    let tree = download(builder, &package, &work)?;
    let image = find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| missing(&package, "boot/vmlinuz"))?;
    let image = fs::read(&image).map_err(io_error("read", &image))?;
    write(&dir.join("vmlinux"), &bzimage::extract_vmlinux(&image)?)?;
    let recipe = builder.recipe;
    let release_dir = find(&tree.join("lib/modules"), |_| true)
        .ok_or_else(|| missing(&package, "lib/modules"))?;
    let modules = read_modules(&release_dir, recipe.modules, &package)?;
    write(&dir.join("initrd.img"), &initramfs(init, &modules))?;
    let manifest = KernelManifest {
        release: file_name(&release_dir),
        modules: modules.into_iter().map(|module| module.name).collect(),
        modules_sha256: pack_modules(builder, &tree, &dir.join(MODULES_FILE))?,
        package,
    };
    let path = dir.join(MANIFEST);
    let text = serde_json::to_vec(&manifest).map_err(std::io::Error::from);
    write(&path, &text.map_err(io_error("write", &path))?)?;
    fs::remove_dir_all(&work).map_err(io_error("remove", &work))?;
    Ok(())
}

/// Packs all modules of the package, with the kernel's lists of them. Returns the hash of the file.
/// The same package always gives the same file.
fn pack_modules(builder: &Builder<'_>, tree: &Path, tar: &Path) -> Result<String, BuildError> {
    let mut pack = Command::new("tar");
    pack.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    // Without `lib`, which is a link in the root file system.
    pack.arg("-cf").arg(tar).arg("-C").arg(tree.join("lib"));
    builder.run(pack.arg("modules"), QUICK)?;
    let content = fs::read(tar).map_err(io_error("read", tar))?;
    Ok(hex::encode(Sha256::digest(content)))
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Returns the package that contains the kernel: the one that the recipe's package depends on.
fn kernel_package(builder: &Builder<'_>) -> Result<String, BuildError> {
    let name = builder.recipe.kernel_package;
    let mut query = Command::new("apt-cache");
    let depends = run_apt(builder, query.args(["depends", name]), QUICK)?;
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| {
            missing(
                name,
                "dependency on a kernel package (`apt-get update` may be needed)",
            )
        })
}

/// Runs an apt tool, and if it fails, runs it again with updated package lists. A machine without
/// lists, such as many containers, does not know the package; a machine with old lists requests a
/// version that mirrors no longer have.
fn run_apt(
    builder: &Builder<'_>,
    tool: &mut Command,
    deadline: Duration,
) -> Result<String, CommandError> {
    match builder.run(tool, deadline) {
        Err(CommandError::Failed { .. }) => {
            builder.run(Command::new("apt-get").arg("update"), DOWNLOAD)?;
            builder.run(tool, deadline)
        }
        done => done,
    }
}

fn download(builder: &Builder<'_>, package: &str, work: &Path) -> Result<PathBuf, BuildError> {
    // By default apt drops root privileges for downloads, and then could not write to this
    // directory.
    let mut download = Command::new("apt-get");
    download.args(["-o", "APT::Sandbox::User=root", "download", package]);
    run_apt(builder, download.current_dir(work), DOWNLOAD)?;
    let deb = find(work, |name| name.ends_with(".deb"))
        .ok_or_else(|| missing(package, "downloaded .deb file"))?;
    let tree = work.join("tree");
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(&tree);
    builder.run(&mut unpack, QUICK)?;
    Ok(tree)
}

/// Kernel module.
#[derive(Debug)]
struct Module {
    name: String,
    content: Vec<u8>,
}

/// Returns kernel modules, each after its dependencies.
fn read_modules(dir: &Path, wanted: &[&str], package: &str) -> Result<Vec<Module>, BuildError> {
    let paths = module_paths(&dir.join("kernel"));
    let mut modules = Vec::new();
    for name in wanted {
        add_module(&canonical(name), &paths, &mut modules, package)?;
    }
    Ok(modules)
}

fn add_module(
    name: &str,
    paths: &HashMap<String, PathBuf>,
    files: &mut Vec<Module>,
    package: &str,
) -> Result<(), BuildError> {
    if files.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let path = paths
        .get(name)
        .ok_or_else(|| missing(package, &format!("module {name}")))?;
    let content = fs::read(path).map_err(io_error("read", path))?;
    for needed in depends_of(&content) {
        add_module(&canonical(&needed), paths, files, package)?;
    }
    files.push(Module {
        name: name.to_owned(),
        content,
    });
    Ok(())
}

/// Returns the dependencies that a module lists in its `.modinfo` section: `depends=a,b`,
/// NUL-terminated.
fn depends_of(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return vec![];
    };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn module_paths(dir: &Path) -> HashMap<String, PathBuf> {
    let mut found = HashMap::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return found;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            found.extend(module_paths(&path));
        } else if path.extension().is_some_and(|e| e == "ko") {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            found.insert(canonical(&stem), path);
        }
    }
    found
}

/// Normalizes a module name: the kernel treats `-` and `_` as the same character.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// Builds the initramfs: `init`, and the modules that it loads, listed in the order and format that
/// `init` expects (`wrenn-init`, `drivers`).
fn initramfs(init: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = Archive::default();
    for dir in ["dev", "newroot", "lib", "lib/modules"] {
        archive.directory(dir);
    }
    // The kernel opens it for the first program's output, before a devtmpfs is mounted.
    archive.device("dev/console", 5, 1);
    let mut list = String::new();
    for module in modules {
        let name = format!("{}.ko", module.name);
        archive.file(&format!("lib/modules/{name}"), &module.content);
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules", list.as_bytes());
    archive.file("init", init);
    archive.finish()
}

fn find(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    fs::read_dir(dir)
        .ok()?
        .flatten()
        .find(|entry| wanted(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
}

fn missing(package: &str, what: &str) -> BuildError {
    BuildError::Missing {
        package: package.to_owned(),
        what: what.to_owned(),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<(), BuildError> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, content).map_err(io_error("write", path))?;
    // The VMM of every sandbox reads the file under its own user id; no process writes it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o444))
        .map_err(io_error("set the permissions of", path))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_needs_are_read_from_its_information() {
        assert_eq!(
            depends_of(b"junk\0license=GPL\0depends=virtio,virtio_ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        assert!(depends_of(b"\0depends=\0").is_empty());
        assert!(depends_of(b"").is_empty());
    }

    #[test]
    fn modules_come_behind_what_they_need() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let kernel = dir.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).expect("made");
        for (name, depends) in [
            ("virtio-rng", "virtio"),
            ("virtio", "virtio_ring"),
            ("virtio_ring", ""),
        ] {
            let content = format!("\0depends={depends}\0");
            fs::write(kernel.join(format!("{name}.ko")), content).expect("written");
        }
        let modules = read_modules(dir.path(), &["virtio-rng", "virtio"], "p").expect("found");
        let names: Vec<_> = modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "virtio_rng"]);
        assert!(matches!(
            read_modules(dir.path(), &["nonesuch"], "p"),
            Err(BuildError::Missing { .. })
        ));
    }
}
