//! Root file system: the packages, the kernel's modules, Wrenn's files and the guest agent, as an
//! ext4 image.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::Path,
    process::Command,
    time::Duration,
};

use super::{BuildError, Builder, guest, kernel::Modules};
use crate::store::io_error;

const UNPACK: Duration = Duration::from_secs(300);
const FORMAT: Duration = Duration::from_secs(600);

/// External servers that a package's default configuration could reference.
const FOREIGN: [&str; 4] = ["pool.ntp.org", "8.8.8.8", "1.1.1.1", "9.9.9.9"];

/// Parts of a root file system.
pub(super) struct Parts<'a> {
    /// Tar file of the packages.
    pub(super) layer: &'a Path,
    /// Modules of the kernel.
    pub(super) modules: &'a Modules,
    /// Wrenn's programs.
    pub(super) programs: &'a guest::Programs,
}

/// Builds `rootfs.ext4` and `manifest.json` in `dir`.
pub(super) fn build(
    builder: &Builder<'_>,
    parts: &Parts<'_>,
    dir: &Path,
) -> Result<(), BuildError> {
    let root = dir.join("root");
    fs::create_dir(&root).map_err(io_error("create", &root))?;
    let mut unpack = Command::new("tar");
    unpack.args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"]);
    unpack
        .arg(parts.layer)
        .arg("-C")
        .arg(&root)
        .arg("--exclude=./dev/*");
    builder.run(&mut unpack, UNPACK)?;
    add_modules(builder, &root, parts.modules)?;
    furnish(&root, parts.programs)?;
    // Lets wrenn-init grow the file system only if the disk is larger.
    let sectors = u64::from(builder.recipe.size.disk_mib) * 2048;
    put(
        &root,
        "etc/wrenn-disk-sectors",
        0o644,
        format!("{sectors}\n").as_bytes(),
    )?;
    forbid_foreign_servers(&root)?;
    let image = dir.join("rootfs.ext4");
    format(builder, &root, &image)?;
    let manifest = serde_json::json!({
        "suite": builder.recipe.suite,
        "packages": builder.recipe.all_packages(),
        "kernel": parts.modules.release,
        "disk_mib": builder.recipe.size.disk_mib,
    });
    let path = dir.join("manifest.json");
    fs::write(&path, manifest.to_string()).map_err(io_error("write", &path))?;
    fs::remove_dir_all(&root).map_err(io_error("remove", &root))?;
    Ok(())
}

/// Adds the kernel's modules, and the indexes that `modprobe` needs. The indexes are made by the
/// guest's own `depmod`, which has the version of its `modprobe`.
fn add_modules(builder: &Builder<'_>, root: &Path, modules: &Modules) -> Result<(), BuildError> {
    let mut unpack = Command::new("tar");
    unpack.arg("-xpf").arg(&modules.tar);
    builder.run(unpack.arg("-C").arg(root.join("usr/lib")), UNPACK)?;
    let mut index = Command::new("chroot");
    index.arg(root).args(["/sbin/depmod", "--all"]);
    builder.run(index.arg(&modules.release), UNPACK)?;
    Ok(())
}

/// Adds Wrenn's files to the tree and removes the files that guests must not have.
fn furnish(root: &Path, programs: &guest::Programs) -> Result<(), BuildError> {
    for name in guest::REMOVED {
        let path = root.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(error).into());
            }
            _ => {}
        }
    }
    for name in [
        "var/log",
        "var/cache/apt/archives/partial",
        "var/lib/apt/lists/partial",
    ] {
        let path = root.join(name);
        fs::create_dir_all(&path).map_err(io_error("create", &path))?;
    }
    put(root, "usr/local/bin/envd", 0o755, &programs.envd)?;
    put(root, "usr/local/bin/wrenn-init", 0o755, &programs.init)?;
    for file in &guest::FILES {
        put(root, file.path, file.mode, file.content.as_bytes())?;
    }
    for name in guest::IDENTITY {
        let link = root.join("etc").join(name);
        remove_if_there(&link)?;
        symlink(format!("/run/wrenn/etc/{name}"), &link).map_err(io_error("create", &link))?;
    }
    // `fusermount3` finds its mounts in this file.
    let mounts = root.join("etc/mtab");
    remove_if_there(&mounts)?;
    symlink("../proc/self/mounts", &mounts).map_err(io_error("create", &mounts))?;
    add_users(root)
}

fn put(root: &Path, name: &str, mode: u32, content: &[u8]) -> Result<(), BuildError> {
    let path = root.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    }
    // A link of the package (such as /etc/resolv.conf) must not be followed out of the tree.
    remove_if_there(&path)?;
    fs::write(&path, content).map_err(io_error("write", &path))?;
    let permissions = fs::Permissions::from_mode(mode);
    fs::set_permissions(&path, permissions).map_err(io_error("set the permissions of", &path))?;
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), BuildError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("replace", path)(error).into())
        }
        _ => Ok(()),
    }
}

fn add_users(root: &Path) -> Result<(), BuildError> {
    for (name, line) in guest::USER_LINES {
        let path = root.join(name);
        let append = || {
            let mut text = fs::read_to_string(&path)?;
            text.push_str(line);
            fs::write(&path, text)
        };
        append().map_err(io_error("add a user to", &path))?;
    }
    for (name, user) in guest::HOMES {
        let home = root.join(name);
        fs::create_dir_all(&home).map_err(io_error("create", &home))?;
        fill_home(root, &home, user).map_err(io_error("populate", &home))?;
    }
    Ok(())
}

/// Copies the files of `/etc/skel` to a home directory, and makes a user its owner.
fn fill_home(root: &Path, home: &Path, user: u32) -> io::Result<()> {
    for entry in fs::read_dir(root.join("etc/skel"))? {
        let entry = entry?;
        let target = home.join(entry.file_name());
        fs::copy(entry.path(), &target)?;
        chown(&target, Some(user), Some(user))?;
    }
    chown(home, Some(user), Some(user))
}

/// Fails if a configuration file references a server that a guest would contact on its own.
fn forbid_foreign_servers(root: &Path) -> Result<(), BuildError> {
    for name in [
        "etc/chrony",
        "etc/resolv.conf",
        "etc/network",
        "etc/systemd",
    ] {
        search(root, &root.join(name))?;
    }
    Ok(())
}

fn search(root: &Path, path: &Path) -> Result<(), BuildError> {
    if path.is_symlink() {
        return Ok(());
    }
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten() {
            search(root, &entry.path())?;
        }
        return Ok(());
    }
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    match FOREIGN.into_iter().find(|word| text.contains(word)) {
        Some(word) => Err(BuildError::PhonesHome {
            path: path
                .strip_prefix(root)
                .unwrap_or(path)
                .display()
                .to_string(),
            word,
        }),
        None => Ok(()),
    }
}

/// Creates a sparse file system of the recipe's size from the tree.
fn format(builder: &Builder<'_>, root: &Path, image: &Path) -> Result<(), BuildError> {
    let size = u64::from(builder.recipe.size.disk_mib) * 1024 * 1024;
    let file = fs::File::create(image).map_err(io_error("create", image))?;
    file.set_len(size).map_err(io_error("create", image))?;
    let mut format = Command::new("mkfs.ext4");
    format
        .args(["-q", "-F", "-m", "0", "-L", "wrenn-root"])
        // Initializes all inode tables now, on the host: a guest would do this in the background
        // during its first minutes.
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0"])
        // A journal for a small disk is sufficient; its blocks would be copied into every overlay
        // that writes to them.
        .args(["-J", "size=16"])
        .arg("-d")
        .arg(root)
        .arg(image);
    builder.run(&mut format, FORMAT)?;
    let permissions = fs::Permissions::from_mode(0o444);
    fs::set_permissions(image, permissions).map_err(io_error("set the permissions of", image))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_server_in_a_setting_is_found() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let chrony = dir.path().join("etc/chrony/sources.d");
        fs::create_dir_all(&chrony).expect("made");
        fs::write(chrony.join("good"), "server 169.254.0.22").expect("written");
        forbid_foreign_servers(dir.path()).expect("nothing found");
        fs::write(chrony.join("bad"), "pool 2.debian.pool.ntp.org").expect("written");
        let error = forbid_foreign_servers(dir.path()).expect_err("found");
        assert!(
            error.to_string().contains("etc/chrony/sources.d/bad"),
            "{error}"
        );
    }

    #[test]
    fn a_link_in_the_tree_is_replaced_not_followed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let outside = dir.path().join("outside");
        fs::write(&outside, "untouched").expect("written");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).expect("made");
        std::os::unix::fs::symlink(&outside, root.join("etc/resolv.conf")).expect("linked");
        put(&root, "etc/resolv.conf", 0o644, b"").expect("written");
        assert_eq!(fs::read(&outside).expect("there"), b"untouched");
        assert!(!root.join("etc/resolv.conf").is_symlink());
    }
}
