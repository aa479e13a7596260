//! From the initramfs into the root file system on the disk.

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

use crate::drivers;

const DISK: &str = "/dev/vda";
const NEW_ROOT: &str = "/newroot";

/// How long the disk may take to appear. Drivers find it while they are loaded, nearly always.
const DISK_DEADLINE: Duration = Duration::from_secs(10);

/// Background work on tables that the image has ready, and reading all of a disk's bitmaps ahead, would be repeated by every
/// guest that is restored from a moment soon after its boot. Kernels that do not know these words do without.
const OPTIONS: [&str; 2] = ["discard,noinit_itable,no_prefetch_block_bitmaps", "discard"];

/// A module that is to be loaded later: its file's name and content.
pub(crate) type Kept = Vec<(String, Vec<u8>)>;

/// Makes the disk's file system the root, and returns the modules that can wait. The initramfs is emptied: its files take memory.
pub(crate) fn enter() -> io::Result<Kept> {
    mount("dev", "/dev", "devtmpfs", MountFlags::NOSUID, None)?;
    await_disk()?;
    mount_disk()?;
    let kept = keep();
    empty(Path::new("/"));
    mount_move("/dev", format!("{NEW_ROOT}/dev").as_str())?;
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Ok(kept)
}

fn await_disk() -> io::Result<()> {
    let begun = Instant::now();
    while !Path::new(DISK).exists() {
        if begun.elapsed() > DISK_DEADLINE {
            let message = format!("no disk {DISK}");
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

fn keep() -> Kept {
    let (_, late) = drivers::names();
    let read = |name: String| {
        let content = fs::read(format!("{}/{name}", drivers::DIR)).ok()?;
        Some((name, content))
    };
    late.into_iter().filter_map(read).collect()
}

/// Removes the files of the initramfs: of its own file system only, and what cannot be removed stays.
fn empty(root: &Path) {
    for name in ["modules", "init"] {
        let _ = fs::remove_file(root.join(name));
    }
    let _ = fs::remove_dir_all(root.join("lib"));
}
