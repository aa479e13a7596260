//! Raw view of a disk: one file, backed by FUSE, that a VMM without a reader for qcow2 can use.
//!
//! An [`Export`] owns a mount, and a `qemu-storage-daemon` in a jail that answers the requests for
//! the mounted file. It never creates, deletes or copies a disk file.
//!
//! | step                                         | failure                        | left behind |
//! |----------------------------------------------|--------------------------------|-------------|
//! | 1. the headers of all files are checked      | `Layer`, names the file        | nothing     |
//! | 2. this process mounts FUSE on a file        | `Io`, no `/dev/fuse`           | nothing     |
//! | 3. the exporter starts in its jail           | `Run`, `Failed`, `Deadline`    | nothing     |
//! | 4. the exporter ends by itself ([`wait`])    | readers get `ENOTCONN` or `EIO` | the mount, until the export is dropped |
//! | 5. [`stop`]                                  | `Failed` (disk full), `Deadline` | nothing   |
//! | 6. this process is killed                    | the exporter is killed         | the mount, until [`remove`] |
//!
//! [`wait`]: Export::wait
//! [`stop`]: Export::stop
//!
//! The exporter has no privileges and cannot mount anything. It inherits the descriptor of a FUSE
//! connection that is mounted already (`mount`), and answers requests on it. The connection ends
//! with the exporter, because no other process has the descriptor: from then on the kernel fails
//! every request. Blocks in the kernel's cache can be read for another second. They are current:
//! writes go through this cache to the exporter.
//!
//! Only processes of one user and group can use the file, not even root: a compromised exporter may
//! never answer, and then suspends each reader. Root can bind the file into a jail, which sends no
//! request.

mod daemon;
mod mount;
mod nodes;

use std::{
    fmt, fs,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use wrenn_jail::{BASE_DISK, DISK};

pub use mount::remove;

use crate::{
    DiskError,
    error::failed,
    tool::{self, Identity, STORAGE_DAEMON},
};
use daemon::{Daemon, Exporter};
use mount::Mount;
use nodes::{Nodes, Overlay};

/// Disk to export, and the user and cgroups of its exporter.
#[derive(Debug)]
pub struct ExportConfig<'a> {
    /// Program that enters a jail (`jail --spec FILE`).
    pub wrenn_exe: &'a Path,
    /// Cgroup directories of the exporter.
    pub cgroups: Vec<PathBuf>,
    /// User and group ID of the exporter. No other process has it.
    pub uid: u32,
    /// User and group ID of the processes that can use the raw file.
    pub reader_uid: u32,
    /// Raw image below all layers.
    pub base: &'a Path,
    /// Read-only layers, lowest first.
    pub layers: &'a [PathBuf],
    /// File that writes go to. Belongs to `uid`.
    pub overlay: &'a Path,
    /// Size of the disk, in MiB.
    pub size_mib: u32,
    /// Directory that the export creates and removes, on the file system of the overlays.
    pub dir: &'a Path,
}

/// Running export of a disk. If it is dropped, the exporter is killed and the mount removed.
pub struct Export {
    // Ends before the mount is removed: fields are dropped in this order.
    daemon: Daemon,
    nodes: Nodes,
    size_mib: u32,
    mount: Mount,
}

/// Mounted raw file whose exporter does not run yet. If it is dropped, the mount is removed.
#[derive(Debug)]
pub struct MountedExport<'a> {
    // Closed before the mount is removed, so that requests fail: fields are dropped in this order.
    fuse: OwnedFd,
    mount: Mount,
    config: ExportConfig<'a>,
}

impl MountedExport<'_> {
    /// Returns the path of the raw file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mount.raw()
    }

    /// Starts the exporter. The raw file can be used when this function returns.
    ///
    /// # Errors
    /// See [`DiskError`]. Nothing is left.
    pub async fn start(self) -> Result<Export, DiskError> {
        let Self {
            fuse,
            mount,
            config,
        } = self;
        let mountpoint = format!("/dev/fd/{}", fuse.as_raw_fd());
        let exporter = Exporter {
            args: nodes::start_args(config.layers.len(), &mountpoint),
            files: vec![
                tool::file(config.base, BASE_DISK, false),
                tool::file(config.overlay, DISK, true),
                tool::file(&mount.overlays(), nodes::OVERLAYS, true),
                // The daemon accepts only a regular file as a mount point. libfuse does not open
                // this path: it takes the descriptor with the number.
                tool::file(Path::new(&STORAGE_DAEMON.path()), &mountpoint, false),
            ],
            layers: config.layers,
            fuse,
            size_mib: config.size_mib,
        };
        let identity = Identity {
            wrenn_exe: config.wrenn_exe,
            cgroups: config.cgroups,
            uid: config.uid,
        };
        Ok(Export {
            daemon: Daemon::start(identity, exporter).await?,
            nodes: Nodes::new(),
            size_mib: config.size_mib,
            mount,
        })
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("path", &self.path())
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl Export {
    /// Starts the export. The raw file can be used when this function returns.
    ///
    /// The exporter is killed when the thread ends that polled this function first. What an earlier
    /// export left in `config.dir` is removed.
    ///
    /// # Errors
    /// See [`DiskError`]. Nothing is left.
    pub async fn start(config: ExportConfig<'_>) -> Result<Self, DiskError> {
        Self::mount(config)?.start().await
    }

    /// Mounts the raw file, without the exporter. The file can be bound elsewhere at once. Requests
    /// wait until [`MountedExport::start`] has started the exporter.
    ///
    /// # Errors
    /// See [`DiskError`]. Nothing is left.
    pub fn mount(config: ExportConfig<'_>) -> Result<MountedExport<'_>, DiskError> {
        let all = config.layers.iter().map(PathBuf::as_path);
        tool::check(all.chain([config.overlay]), config.size_mib)?;
        let (mount, fuse) = Mount::new(config.dir, config.reader_uid)?;
        Ok(MountedExport {
            fuse,
            mount,
            config,
        })
    }

    /// Returns the path of the raw file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mount.raw()
    }

    /// Returns the process ID of the exporter, for statistics. `None` once it has ended.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.daemon.pid()
    }

    /// Makes the host's disk hold everything that was written to the raw file, and what is needed to
    /// find it in the overlay.
    ///
    /// # Errors
    /// `Failed` if the exporter could not write or has ended; `Deadline`.
    pub async fn flush(&mut self) -> Result<(), DiskError> {
        self.daemon.call(self.nodes.flush()).await
    }

    /// Makes writes go to another file, `overlay`, which is empty and belongs to the exporter's user.
    /// The file that they went to before is flushed and becomes the highest read-only layer. The
    /// content of the disk stays the same.
    ///
    /// The guest must be paused: a write that is in flight may go to either file.
    ///
    /// # Errors
    /// See [`DiskError`]. Writes then go to the same file as before, except after `Deadline`, when
    /// they may go to either file: the export must be dropped.
    pub async fn switch(&mut self, overlay: &Path) -> Result<(), DiskError> {
        tool::check([overlay].into_iter(), self.size_mib)?;
        let next = self.nodes.open_next();
        // The exporter can only see files that are in its jail, and it opens them by name.
        let link = self.mount.overlays().join(next.file_name());
        fs::hard_link(overlay, &link).map_err(failed("link a new overlay of"))?;
        let switched = self.put_on_top(next).await;
        match switched {
            Ok(()) => self.nodes.switched(next),
            // Best effort: an unused link is removed with the export.
            Err(_) => drop(fs::remove_file(&link)),
        }
        switched
    }

    async fn put_on_top(&mut self, next: Overlay) -> Result<(), DiskError> {
        self.daemon.call(next.open()).await?;
        let done = self.daemon.call(self.nodes.put_on_top(next)).await;
        if done.is_err() {
            // Best effort: an overlay that stays open is not used.
            let _ = self.daemon.call(next.close()).await;
        }
        done
    }

    /// Waits until the exporter ends by itself, and returns how it ended. Cancel safe.
    pub async fn wait(&mut self) -> DiskError {
        self.daemon.wait().await
    }

    /// Flushes the disk, ends the exporter and removes the mount. The VMM must have ended: the raw
    /// file fails its requests from now on. An exporter that takes longer than `deadline` is killed.
    ///
    /// # Errors
    /// See [`DiskError`]. Something that was written to the raw file may then be missing in the
    /// overlay. The exporter and the mount are gone in any case, except if the error says so.
    pub async fn stop(mut self, deadline: Duration) -> Result<(), DiskError> {
        let ended = self.daemon.stop(self.nodes.flush(), deadline).await;
        let removed = self.mount.remove();
        ended.and(removed)
    }
}
