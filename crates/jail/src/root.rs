//! Root file system of the jail, assembled on a tmpfs.

use std::{
    fs,
    os::{
        fd::AsRawFd as _,
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, mknod},
    unistd::{Gid, Uid, chdir, chown, pivot_root},
};
use rustix::mount::{MoveMountFlags, move_mount};

use crate::{
    DISK_LAYERS, HOME, SOCKETS,
    error::{JailError, failed, failed_nix},
    spec::{JailFile, JailSpec},
};

/// Mount point on which the new root is assembled: a directory that exists on every host. The tmpfs
/// hides its content in this mount namespace only.
const NEW_ROOT: &str = "/tmp";

/// Assembles the new root on a tmpfs and makes it the only root.
pub(crate) fn build_root(spec: &JailSpec) -> Result<(), JailError> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    do_mount(None, Path::new("/"), None, private, None)?;
    let root = Path::new(NEW_ROOT);
    // Sources may be below the directory that the tmpfs hides, so they are opened first.
    let dirs = open_sources(&spec.dirs)?;
    let files: Vec<PathBuf> = spec.files.iter().map(|file| file.source.clone()).collect();
    let files = open_sources(&files)?;
    let sockets: Option<PathBuf> = spec.sockets.map(|fd| format!("/proc/self/fd/{fd}").into());
    let sockets = open_sources(sockets.as_slice())?;
    do_mount(
        Some("tmpfs"),
        root,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0755,size=1m"),
    )?;
    for dir in ["/proc", "/dev", "/old", HOME, DISK_LAYERS] {
        make_dirs(&inside(root, Path::new(dir)))?;
    }
    for (dir, source) in spec.dirs.iter().zip(&dirs) {
        bind_dir(&inside(root, dir), source)?;
    }
    for name in ["lib", "lib64"] {
        show_library_dir(name, root)?;
    }
    make_devices(spec, root)?;
    for (file, source) in spec.files.iter().zip(&files) {
        bind_file(file, source, root)?;
    }
    for mount in &sockets {
        attach(mount, &inside(root, Path::new(SOCKETS)))?;
    }
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    do_mount(
        Some("proc"),
        &root.join("proc"),
        Some("proc"),
        hardened,
        Some("hidepid=2,subset=pid"),
    )?;
    enter_root(root, hardened)
}

fn enter_root(root: &Path, hardened: MsFlags) -> Result<(), JailError> {
    pivot_root(root, &root.join("old")).map_err(failed_nix("pivot to the new root"))?;
    chdir("/").map_err(failed_nix("enter the new root"))?;
    umount2("/old", MntFlags::MNT_DETACH).map_err(failed_nix("unmount the old root"))?;
    fs::remove_dir("/old").map_err(failed("remove the old root's mount point"))?;
    do_mount(
        None,
        Path::new("/"),
        None,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | hardened,
        None,
    )
}

/// Returns the place of an absolute path below the new root.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn open_sources(paths: &[PathBuf]) -> Result<Vec<fs::File>, JailError> {
    let open = |path: &PathBuf| {
        fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_PATH | nix::libc::O_CLOEXEC)
            .open(path)
            .map_err(failed(format!("open {}", path.display())))
    };
    paths.iter().map(open).collect()
}

/// Makes `/lib` and `/lib64`, in which programs look for their dynamic linker, visible: a link into
/// `/usr` on a merged system, otherwise a bind mount.
fn show_library_dir(name: &str, root: &Path) -> Result<(), JailError> {
    let source = Path::new("/").join(name);
    let target = root.join(name);
    match fs::read_link(&source) {
        Ok(link) => std::os::unix::fs::symlink(&link, &target)
            .map_err(failed(format!("link {}", target.display()))),
        Err(_) if source.is_dir() => {
            let opened = open_sources(&[source])?;
            bind_dir(&target, &opened[0])
        }
        Err(_) => Ok(()),
    }
}

fn bind_dir(target: &Path, source: &fs::File) -> Result<(), JailError> {
    make_dirs(target)?;
    bind(target, source, MsFlags::MS_RDONLY)
}

/// Creates one node per device that only this sandbox's user can open. The host's own nodes may be
/// restricted to root.
fn make_devices(spec: &JailSpec, root: &Path) -> Result<(), JailError> {
    do_mount(
        Some("tmpfs"),
        &root.join("dev"),
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=0755,size=64k"),
    )?;
    for device in &spec.devices {
        let target = inside(root, device);
        if let Some(parent) = target.parent() {
            make_dirs(parent)?;
        }
        let number = fs::metadata(device)
            .map_err(failed(format!("inspect {}", device.display())))?
            .rdev();
        mknod(
            &target,
            SFlag::S_IFCHR,
            Mode::S_IRUSR | Mode::S_IWUSR,
            number,
        )
        .map_err(failed_nix(format!("create {}", target.display())))?;
        let (user, group) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.uid));
        chown(&target, Some(user), Some(group)).map_err(failed_nix(format!(
            "change the owner of {}",
            target.display()
        )))?;
    }
    Ok(())
}

fn bind_file(file: &JailFile, source: &fs::File, root: &Path) -> Result<(), JailError> {
    let target = inside(root, &file.target);
    if let Some(parent) = target.parent() {
        make_dirs(parent)?;
    }
    if is_dir(source) {
        make_dirs(&target)?;
    } else {
        fs::File::create(&target).map_err(failed(format!("create {}", target.display())))?;
    }
    let mut flags = MsFlags::empty();
    if !file.executable {
        flags |= MsFlags::MS_NOEXEC;
    }
    if !file.writable {
        flags |= MsFlags::MS_RDONLY;
    }
    bind(&target, source, flags)
}

/// True if an open file is a directory. The file's attributes are not read: the server of a FUSE
/// file may not answer, or the file may be closed to root.
fn is_dir(source: &fs::File) -> bool {
    // The path exists in a directory only. The kernel knows the type of an open file.
    let path = format!("/proc/self/fd/{}/.", source.as_raw_fd());
    fs::symlink_metadata(path).is_ok()
}

/// Binds an open file or directory, without devices and setuid programs, and with more flags.
fn bind(target: &Path, source: &fs::File, flags: MsFlags) -> Result<(), JailError> {
    let source = format!("/proc/self/fd/{}", source.as_raw_fd());
    do_mount(Some(&source), target, None, MsFlags::MS_BIND, None)?;
    let flags =
        flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    do_mount(None, target, None, flags, None)
}

/// Attaches a mount that is attached nowhere else yet.
fn attach(mount: &fs::File, target: &Path) -> Result<(), JailError> {
    make_dirs(target)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount, "", rustix::fs::CWD, target, flags)
        .map_err(std::io::Error::from)
        .map_err(failed(format!("attach {}", target.display())))
}

fn make_dirs(path: &Path) -> Result<(), JailError> {
    fs::create_dir_all(path).map_err(failed(format!("create {}", path.display())))
}

fn do_mount(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), JailError> {
    mount(source, target, kind, flags, options)
        .map_err(failed_nix(format!("mount {}", target.display())))
}
