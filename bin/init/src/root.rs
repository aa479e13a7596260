//! Change from the initramfs to the root file system on the disk.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{chdir, chroot},
};

const DISK: &str = "/dev/vda";
const NEW_ROOT: &str = "/newroot";

/// Maximum time until the disk appears. Almost always, the drivers find the disk while they are
/// loaded.
const DISK_DEADLINE: Duration = Duration::from_secs(10);

/// Mount options, in the order in which they are tried. The first set turns off the background
/// initialization of inode tables, which the image has done already, and the prefetching of all
/// block bitmaps. Every guest that is restored from a snapshot taken soon after boot would repeat
/// that work. Kernels that do not know these options use the second set.
const OPTIONS: [&str; 2] = ["discard,noinit_itable,no_prefetch_block_bitmaps", "discard"];

/// Makes the disk's file system the root. Empties the initramfs, because its files take memory.
pub(crate) fn enter() -> io::Result<()> {
    mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID, None)?;
    await_disk()?;
    mount_disk()?;
    empty(Path::new("/"));
    mount_move("/dev", format!("{NEW_ROOT}/dev").as_str())?;
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    Ok(chdir("/")?)
}

fn await_disk() -> io::Result<()> {
    let begun = Instant::now();
    while !Path::new(DISK).exists() {
        if begun.elapsed() > DISK_DEADLINE {
            let message = format!("disk {DISK} did not appear");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn mount_disk() -> io::Result<()> {
    let mut last = Errno::INVAL;
    for options in OPTIONS {
        let options = std::ffi::CString::new(options)?;
        match mount(
            DISK,
            NEW_ROOT,
            "ext4",
            MountFlags::NOATIME,
            options.as_c_str(),
        ) {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last.into())
}

/// Removes the files of the initramfs from its own file system only. Files that cannot be removed
/// remain.
fn empty(root: &Path) {
    for name in ["modules", "init"] {
        let _ = fs::remove_file(root.join(name));
    }
    let _ = fs::remove_dir_all(root.join("lib"));
}
