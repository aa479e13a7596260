//! Groups of commands: one per command, below the group of its kind.
//!
//! A command's group contains the command and all its descendants, however they detach themselves,
//! so that all of them can be killed at once. The groups have no limits of their own: the
//! controllers of the group of the kind apply to all commands in it together.
//!
//! A group is removed when its command has ended. While descendants of the command live on, the
//! kernel refuses that; the group is then left, and is removed when it is empty and another command
//! starts.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use rustix::{
    fs::{AtFlags, Mode, OFlags, mkdirat, openat, unlinkat},
    io::{Errno, write},
};

/// Maximum number of left groups that the start of a command tries to remove, so that a start takes
/// the same time however many descendants of earlier commands live on.
const REMOVED_PER_START: usize = 8;

/// Group of all commands of a kind, with the groups of the commands.
#[derive(Debug)]
pub(super) struct KindGroup {
    directory: File,
    next: AtomicU64,
    /// Names of groups whose command has ended and that were not empty.
    left: Mutex<VecDeque<String>>,
}

impl KindGroup {
    pub(super) fn new(directory: File) -> Self {
        Self {
            directory,
            next: AtomicU64::new(0),
            left: Mutex::default(),
        }
    }

    /// Creates the group of a command.
    pub(super) fn create(self: &Arc<Self>) -> io::Result<CommandGroup> {
        self.remove_left();
        loop {
            let name = format!("command-{}", self.next.fetch_add(1, Ordering::Relaxed));
            match mkdirat(&self.directory, &name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    return Ok(CommandGroup {
                        kind: Arc::clone(self),
                        name,
                    });
                }
                // Left by an earlier agent in this guest.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn remove_left(&self) {
        let mut left = self.left.lock();
        for _ in 0..left.len().min(REMOVED_PER_START) {
            if let Some(name) = left.pop_front()
                && !self.remove(&name)
            {
                left.push_back(name);
            }
        }
    }

    /// Removes a group. Returns false if the group still has processes.
    fn remove(&self, name: &str) -> bool {
        let removed = unlinkat(&self.directory, name, AtFlags::REMOVEDIR);
        // Any other error means that a program in the guest has removed the group.
        !matches!(removed, Err(Errno::BUSY | Errno::NOTEMPTY))
    }
}

/// Group of a command. Dropping it removes the group, now or once the group is empty.
#[derive(Debug)]
pub struct CommandGroup {
    kind: Arc<KindGroup>,
    name: String,
}

impl CommandGroup {
    /// Opens the directory of the group, for the creation of the command's process.
    ///
    /// # Errors
    /// Returns the kernel's error.
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(
            &self.kind.directory,
            &self.name,
            flags,
            Mode::empty(),
        )?)
    }

    /// Kills all processes of the group, including those that are being created.
    ///
    /// # Errors
    /// Returns the kernel's error. Kernels before 5.14 cannot kill a group.
    pub fn kill(&self) -> io::Result<()> {
        let path = format!("{}/cgroup.kill", self.name);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = openat(&self.kind.directory, path, flags, Mode::empty())?;
        write(&file, b"1")?;
        Ok(())
    }
}

impl Drop for CommandGroup {
    fn drop(&mut self) {
        if !self.kind.remove(&self.name) {
            let name = std::mem::take(&mut self.name);
            self.kind.left.lock().push_back(name);
        }
    }
}
