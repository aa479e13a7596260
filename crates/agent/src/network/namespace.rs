//! Named network namespaces in the format of `ip netns`: a file in `/run/netns` on which the
//! namespace is bind-mounted.
//!
//! `setns` and `unshare` act on the calling thread. These functions must therefore run on dedicated
//! threads, never in an async task.

use std::{fs, io, path::Path};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use rustix::fs::{FlockOperation, flock, statfs};

use super::addresses::NETNS_DIR;

/// `f_type` of the namespace file system (`linux/magic.h`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Moves the calling thread into a new network namespace and names that namespace.
///
/// On failure, no name is left behind.
pub(super) fn enter_new(path: &Path) -> io::Result<()> {
    prepare_directory()?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    fs::File::options()
        .write(true)
        .create_new(true)
        .open(path)?;
    let bound = mount(
        Some("/proc/thread-self/ns/net"),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    );
    if let Err(error) = bound {
        let _ = fs::remove_file(path);
        return Err(error.into());
    }
    Ok(())
}

/// Returns the calling thread's namespace, which [`enter`] can restore.
pub(super) fn current() -> io::Result<fs::File> {
    fs::File::open("/proc/thread-self/ns/net")
}

/// Moves the calling thread into a namespace.
pub(super) fn enter(namespace: &fs::File) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Removes the name of a namespace. The kernel frees the namespace when its last process, socket or
/// device is gone. Succeeds if the name does not exist.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not a mount point: a plain file, left by a crash between the two steps or by a reboot of
        // the host.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// True if a namespace has this name. A plain file does not count.
pub(super) fn exists(path: &Path) -> bool {
    #[allow(
        clippy::useless_conversion,
        reason = "the type of f_type differs between architectures"
    )]
    statfs(path).is_ok_and(|fs| i64::from(fs.f_type) == NSFS_MAGIC)
}

/// Makes the directory a shared mount of its own, once, as `ip netns` does. A name that is removed
/// here then also disappears from other mount namespaces, where it would keep the network namespace
/// alive.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let directory = fs::File::open(NETNS_DIR)?;
    // Serializes with other processes that do the same. Released when the descriptor closes.
    flock(&directory, FlockOperation::LockExclusive)?;
    let share = || {
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, NETNS_DIR, None::<&str>, flags, None::<&str>)
    };
    match share() {
        Err(Errno::EINVAL) => {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(
                Some(NETNS_DIR),
                NETNS_DIR,
                None::<&str>,
                flags,
                None::<&str>,
            )?;
            share()?;
        }
        shared => shared?,
    }
    Ok(())
}
