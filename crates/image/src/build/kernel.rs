//! Kernel and initramfs, from Debian's kernel package.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::{BuildError, Builder, command, guest};
use crate::{bzimage, cpio::Archive, store::io_error};

const BUSYBOX: &str = "/bin/busybox";
const QUICK: Duration = Duration::from_secs(60);
const DOWNLOAD: Duration = Duration::from_secs(600);

/// Builds `vmlinux`, `initrd.img` and `manifest.json` in `dir`.
pub(super) fn build(builder: &Builder<'_>, dir: &Path) -> Result<(), BuildError> {
    let work = dir.join("work");
    fs::create_dir(&work).map_err(io_error("make", &work))?;
    let package = kernel_package(builder)?;
    let tree = download(builder, &package, &work)?;
    let image = find(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| missing(&package, "boot/vmlinuz"))?;
    let image = fs::read(&image).map_err(io_error("read", &image))?;
    write(&dir.join("vmlinux"), &bzimage::extract_vmlinux(&image)?)?;
    let modules = module_files(&tree, builder.recipe.modules, &package)?;
    let busybox = Path::new(BUSYBOX);
    let busybox = fs::read(busybox).map_err(io_error("read", busybox))?;
    write(&dir.join("initrd.img"), &initramfs(&busybox, &modules)?)?;
    let manifest = serde_json::json!({ "package": package, "modules": builder.recipe.modules });
    write(&dir.join("manifest.json"), manifest.to_string().as_bytes())?;
    fs::remove_dir_all(&work).map_err(io_error("remove", &work))?;
    Ok(())
}

/// The package that has the kernel: the one that the recipe's package depends on.
fn kernel_package(builder: &Builder<'_>) -> Result<String, BuildError> {
    let name = builder.recipe.kernel_package;
    let depends = Command::new("apt-cache")
        .args(["depends", name])
        .into_output(builder)?;
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| missing(name, "dependency on a kernel (is `apt-get update` needed?)"))
}

fn download(builder: &Builder<'_>, package: &str, work: &Path) -> Result<PathBuf, BuildError> {
    // apt drops root for downloads, and must be able to write here.
    let mut download = Command::new("apt-get");
    download.args(["-o", "APT::Sandbox::User=root", "download", package]);
    command::run(download.current_dir(work), DOWNLOAD, builder.progress)?;
    let deb = find(work, |name| name.ends_with(".deb")).ok_or_else(|| missing(package, "file"))?;
    let tree = work.join("tree");
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(&tree);
    command::run(&mut unpack, QUICK, builder.progress)?;
    Ok(tree)
}

/// Modules and what they depend on, each behind what it needs.
fn module_files(
    tree: &Path,
    wanted: &[&str],
    package: &str,
) -> Result<Vec<(String, Vec<u8>)>, BuildError> {
    let release =
        find(&tree.join("lib/modules"), |_| true).ok_or_else(|| missing(package, "lib/modules"))?;
    let files = module_paths(&release.join("kernel"));
    let mut ordered = Vec::new();
    let mut seen = HashSet::new();
    for name in wanted {
        add_module(&canonical(name), &files, &mut seen, &mut ordered, package)?;
    }
    Ok(ordered)
}

fn add_module(
    name: &str,
    files: &HashMap<String, PathBuf>,
    seen: &mut HashSet<String>,
    ordered: &mut Vec<(String, Vec<u8>)>,
    package: &str,
) -> Result<(), BuildError> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let path = files
        .get(name)
        .ok_or_else(|| missing(package, &format!("module {name}")))?;
    let content = fs::read(path).map_err(io_error("read", path))?;
    for needed in depends_of(&content) {
        add_module(&canonical(&needed), files, seen, ordered, package)?;
    }
    ordered.push((name.to_owned(), content));
    Ok(())
}

/// What a module says in its `.modinfo` section that it depends on: `depends=a,b`, NUL-terminated.
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

/// The kernel takes `-` and `_` in module names for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn initramfs(busybox: &[u8], modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>, BuildError> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "modules", "newroot", "proc"] {
        archive.directory(dir);
    }
    // The kernel opens it for the first program's output, before any devtmpfs.
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", busybox);
    let mut order = String::new();
    for (name, content) in modules {
        archive.file(&format!("modules/{name}.ko"), content);
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    archive.file("init", guest::INITRAMFS_INIT.as_bytes());
    Ok(archive.finish())
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
    // Every sandbox's VMM reads it, as a user of its own; nobody writes it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o444))
        .map_err(io_error("protect", path))?;
    Ok(())
}

/// A command whose output is wanted.
trait IntoOutput {
    fn into_output(&mut self, builder: &Builder<'_>) -> Result<String, BuildError>;
}

impl IntoOutput for Command {
    fn into_output(&mut self, builder: &Builder<'_>) -> Result<String, BuildError> {
        Ok(command::run(self, QUICK, builder.progress)?)
    }
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
        let kernel = dir.path().join("lib/modules/6.1/kernel/drivers");
        fs::create_dir_all(&kernel).expect("made");
        for (name, depends) in [
            ("virtio-rng", "virtio"),
            ("virtio", "virtio_ring"),
            ("virtio_ring", ""),
        ] {
            let content = format!("\0depends={depends}\0");
            fs::write(kernel.join(format!("{name}.ko")), content).expect("written");
        }
        let files = module_files(dir.path(), &["virtio-rng", "virtio"], "p").expect("found");
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["virtio_ring", "virtio", "virtio_rng"]);
        assert!(matches!(
            module_files(dir.path(), &["nonesuch"], "p"),
            Err(BuildError::Missing { .. })
        ));
    }
}
