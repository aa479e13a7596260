//! Contract between a supervisor and a virtual machine monitor.

use std::{future::Future, io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::net::unix::pipe;
use wrenn_model::{CpuModel, MachineSize};
use wrenn_proto::{
    machine::MachineProfile,
    supervise::{Accel, DiskRate},
};

/// Starts VMs with one kind of VMM.
pub trait VmmDriver {
    /// Running VM of this VMM.
    type Machine: Machine;

    /// Form in which this VMM takes the disk of a VM.
    fn disk_form(&self) -> DiskForm;

    /// Starts a VMM in its jail and waits for its first response. With [`Start::Boot`] the guest
    /// runs afterwards. With [`Start::Restore`] it waits for [`Machine::load`] and
    /// [`Machine::resume`].
    ///
    /// If this returns an error or the future is dropped, the VMM is killed.
    fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> impl Future<Output = Result<Self::Machine, LaunchError>>;
}

/// Running VM. Dropping it kills the VMM.
pub trait Machine {
    /// Process ID of the VMM.
    fn pid(&self) -> u32;

    /// Kind and version of the VMM, such as `qemu 7.2.22`. [`wrenn_proto::machine::can_load`] says
    /// whose device states it loads. Empty if the VMM did not report its version.
    fn version(&self) -> String;

    /// Returns the guest's serial console output; `None` after the first call. The caller must keep
    /// reading it, because a full pipe blocks the guest.
    fn take_console(&mut self) -> Option<pipe::Receiver>;

    /// Pauses the virtual CPUs. The guest does not change until [`resume`](Self::resume).
    fn pause(&mut self) -> impl Future<Output = Result<(), ControlError>>;

    /// Resumes the virtual CPUs after [`pause`](Self::pause) or [`load`](Self::load).
    fn resume(&mut self) -> impl Future<Output = Result<(), ControlError>>;

    /// True if the VMM paused the guest after a host write error (disk full).
    /// [`resume`](Self::resume) retries the write.
    fn is_stalled(&self) -> bool;

    /// Way in which the caller reaches guest memory. Never changes.
    fn memory_access(&self) -> MemoryAccess;

    /// Writes the state of CPUs and devices, without memory and disk, to an empty file. The VM must
    /// be paused. When this returns, the disk file contains all data that the guest wrote. To
    /// continue the VM afterwards, call [`resume`](Self::resume).
    ///
    /// Returns where the caller finds the memory, as [`memory_access`](Self::memory_access)
    /// announces it. The caller reads the memory before it resumes the VM.
    fn save(&mut self, file: OwnedFd) -> impl Future<Output = Result<SavedMemory, ControlError>>;

    /// Loads CPU and device state from a file written by [`save`](Self::save), into a VM started
    /// with [`Start::Restore`]. Reads guest memory, so the memory must be served. With
    /// [`MemoryAccess::Files`], the caller takes the handshake and starts to serve while this call
    /// runs; otherwise before. If the call fails, the VMM is unusable.
    fn load(&mut self, file: OwnedFd) -> impl Future<Output = Result<(), ControlError>>;

    /// Makes the current disk file a read-only layer and continues on `overlay`, an empty qcow2
    /// file, on top of it. The VM must be paused. Fails with [`ControlError::Unsupported`] if the
    /// disk is not of the form [`DiskForm::Qcow2Chain`].
    fn switch_disk(&mut self, overlay: OwnedFd) -> impl Future<Output = Result<(), ControlError>>;

    /// Waits until the VMM process has exited. Later calls return the same result.
    ///
    /// Cancel safe.
    fn wait(&mut self) -> impl Future<Output = MachineExit>;

    /// Kills the VMM and waits until it has exited. No guest state is saved.
    fn stop(&mut self, deadline: Duration) -> impl Future<Output = Result<(), StopError>>;
}

/// Form in which a VMM takes the disk of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskForm {
    /// Chain of files that the VMM opens itself: an overlay, layers and a base image.
    Qcow2Chain,
    /// One raw file or device with the content of the whole chain. Its exporter also puts an overlay
    /// on top of the chain after a snapshot.
    Raw,
}

/// Way in which the caller of a [`Machine`] reaches guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryAccess {
    /// Through the page tables of the VMM. The pages that the VM changed are the anonymous pages of
    /// its mapping. The launch reports the layout of the mapping on [`MachineFds::pager`]; in a
    /// restore, with the userfaultfd.
    PageTables,
    /// Through files. The VMM writes the changed pages to a file when it saves its state. A launch
    /// reports nothing on [`MachineFds::pager`].
    Files {
        /// True if [`Machine::load`] sends the layout and the userfaultfd on
        /// [`MachineFds::pager`], and the memory must be served from then on. False if the VMM does
        /// not restore, or maps [`MachineFds::memory`] itself.
        sends_handshake: bool,
    },
}

/// Place of the memory that a VM changed, after [`Machine::save`].
#[derive(Debug)]
pub enum SavedMemory {
    /// Page tables of the VMM, as [`MemoryAccess::PageTables`] says.
    PageTables,
    /// File of the size of guest memory. Data is the current content of pages, and may be zeros. A
    /// hole is a page that has not changed since the VM was started: it is zero if the VM was
    /// booted, and has the content of the snapshot if it was restored. Extents consist of whole
    /// pages. Pages that did not change may be in the file as well.
    ///
    /// The VMM can write to the file, so it may change or shrink while it is read.
    File(OwnedFd),
}

/// Configuration of a VM.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Name shown by `ps`.
    pub name: String,
    /// Execution mode of guest code.
    pub accel: Accel,
    /// CPU model that the guest sees.
    pub cpu: CpuModel,
    /// Virtual hardware. In a restore, the hardware of the snapshot.
    pub machine: MachineProfile,
    /// Virtual CPUs, memory and disk. The memory has the size of [`MachineFds::memory`].
    pub size: MachineSize,
    /// Path of the uncompressed kernel (ELF) on the host.
    pub kernel: PathBuf,
    /// Path of the initial RAM disk on the host.
    pub initrd: PathBuf,
    /// Kernel command line.
    pub kernel_args: String,
    /// Path of the sandbox's disk on the host, in the form of [`VmmDriver::disk_form`]: the overlay
    /// of a chain, or a raw file. The backing file in the header of an overlay is ignored.
    pub disk: PathBuf,
    /// Paths of the layers (qcow2, read-only) between the overlay and the base image on the host,
    /// lowest first. Not used with a raw disk.
    pub disk_layers: Vec<PathBuf>,
    /// Path of the raw base image on the host, below all layers. Not used with a raw disk.
    pub base_disk: PathBuf,
    /// Directory on the host for files without a name. They are as large as the memory that the VM
    /// changes.
    pub work_dir: PathBuf,
    /// Metadata that the VMM serves to its guest by Firecracker's MMDS, version 2. `None` if a
    /// service at the gateway serves it. A VM that is restored can have metadata only if it had
    /// some when it was booted.
    pub metadata: Option<serde_json::Value>,
    /// MAC address of the guest's network device.
    pub guest_mac: String,
    /// Network namespace that the VMM runs in.
    pub netns: PathBuf,
    /// Cgroup directories that the VMM joins.
    pub cgroups: Vec<PathBuf>,
    /// User and group ID that the VMM runs as.
    pub uid: u32,
    /// Limits of the guest's disk requests.
    pub disk_rate: DiskRate,
    /// Start mode.
    pub start: Start,
}

/// Start mode of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Boots the kernel, on private memory.
    Boot,
    /// Continues from a snapshot, on memory that is served page by page.
    Restore,
}

/// Descriptors whose ownership passes to the VM.
#[derive(Debug)]
pub struct MachineFds {
    /// Read-only file of the size of the guest's memory. In a restore, guest memory is a private
    /// mapping of it, unless the VMM has anonymous memory that is served page by page. In a boot, it
    /// only defines the size, and guest memory is anonymous.
    pub memory: OwnedFd,
    /// Connected stream socket on which the VMM reports the layout of guest memory and, in a
    /// restore, passes its userfaultfd (Firecracker's handshake). [`Machine::memory_access`] says
    /// when. If the VMM fails first, the socket is closed.
    pub pager: OwnedFd,
    /// Open `/dev/userfaultfd`. Required for a restore.
    pub userfaultfd: Option<OwnedFd>,
    /// TAP device of the guest's network.
    pub tap: OwnedFd,
}

/// Failure to start a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A system call failed.
    #[error("failed to {step}")]
    Io {
        /// Step that failed.
        step: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VMM exited before its first response.
    #[error("the VMM exited before it responded ({exit}): {stderr}")]
    Ended {
        /// Exit of the VMM process.
        exit: MachineExit,
        /// Beginning of the VMM's standard error output.
        stderr: String,
    },
    /// The VMM did not respond in time.
    #[error("the VMM did not respond within {0:?}")]
    Deadline(Duration),
    /// The VMM is too old, or its version is unknown.
    #[error("version `{found}` of the VMM is not supported, at least {minimum} is required")]
    Version {
        /// Version as reported by the VMM.
        found: String,
        /// Oldest supported version.
        minimum: &'static str,
    },
    /// The VMM cannot run this VM.
    #[error("the VMM does not support {0}")]
    Unsupported(&'static str),
    /// The VMM rejected a command.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Failure to control a running VM. The VM may still run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// A system call failed, or the VMM closed the connection.
    #[error("failed to {step}")]
    Io {
        /// Step that failed.
        step: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VMM rejected a command.
    #[error("the VMM rejected `{command}`: {reason}")]
    Rejected {
        /// Rejected command.
        command: &'static str,
        /// Reason as reported by the VMM.
        reason: String,
    },
    /// The VMM accepted the command but failed to complete it.
    #[error("the VMM failed to {step}: {reason}")]
    Failed {
        /// Step that failed.
        step: &'static str,
        /// Reason as reported by the VMM.
        reason: String,
    },
    /// The VMM answered a command with something that is not an answer to it.
    #[error("invalid answer of the VMM to `{command}`: {reason}")]
    Protocol {
        /// Command that was sent.
        command: &'static str,
        /// Reason why the answer is invalid.
        reason: String,
    },
    /// The VMM has no such operation.
    #[error("the VMM cannot {operation}")]
    Unsupported {
        /// Operation that was requested.
        operation: &'static str,
    },
    /// The VMM did not complete the command in time.
    #[error("the VMM timed out after {deadline:?} (step: {step})")]
    Deadline {
        /// Step that timed out.
        step: &'static str,
        /// Deadline that passed.
        deadline: Duration,
    },
}

impl ControlError {
    /// True if the host's disk is full or a quota is used up.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::Rejected { reason, .. } | Self::Failed { reason, .. } => {
                wrenn_qmp::is_out_of_space(reason)
            }
            Self::Protocol { .. } | Self::Unsupported { .. } | Self::Deadline { .. } => false,
        }
    }
}

/// The VMM did not exit after SIGKILL.
#[derive(Debug, thiserror::Error)]
#[error("the VMM (pid {pid}) still exists {deadline:?} after SIGKILL")]
pub struct StopError {
    /// Process ID of the VMM.
    pub pid: u32,
    /// Deadline that passed.
    pub deadline: Duration,
}

/// Exit of a VMM process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineExit {
    /// The guest powered off, rebooted or panicked, and the VMM exited normally.
    Guest {
        /// Reason as reported by the VMM, such as `guest-reset`.
        reason: String,
    },
    /// The VMM exited on its own.
    Exited {
        /// Exit code.
        code: i32,
    },
    /// A signal terminated the VMM.
    Killed {
        /// Signal number.
        signal: i32,
    },
}

impl std::fmt::Display for MachineExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Guest { reason } => write!(
                f,
                "the guest powered off, rebooted or crashed ({reason}); see the console log for details"
            ),
            Self::Exited { code } => {
                write!(f, "the VMM process exited with code {code}")
            }
            Self::Killed { signal: 9 } => f.write_str(
                "the VMM process was killed (signal 9) by another process on the host or for lack of memory",
            ),
            Self::Killed { signal } => write!(
                f,
                "the VMM process was terminated by signal {signal}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn killed_vmm_is_described_for_users() {
        let text = MachineExit::Killed { signal: 9 }.to_string();
        assert!(text.contains("killed (signal 9)"), "{text}");
    }
}
