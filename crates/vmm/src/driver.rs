//! The contract between a supervisor and a virtual machine monitor.

use std::{future::Future, io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::net::unix::pipe;
use wrenn_proto::supervise::Accel;

/// Starts machines of one kind of VMM.
pub trait VmmDriver {
    /// A machine of this kind.
    type Machine: Machine;

    /// Starts a VMM in its jail and waits for the VMM's first answer. With [`Start::Boot`] the guest runs; with
    /// [`Start::Restore`] it waits for [`Machine::load`] and [`Machine::thaw`].
    ///
    /// The VMM is gone again when this returns an error or its future is dropped.
    fn launch(
        &self,
        config: MachineConfig,
        fds: MachineFds,
    ) -> impl Future<Output = Result<Self::Machine, LaunchError>>;
}

/// A machine that runs. Dropping it kills the VMM.
pub trait Machine {
    /// Process id of the VMM.
    fn pid(&self) -> u32;

    /// Kind and version of the VMM, such as `qemu 7.2.22`: a machine's state fits the version that it was saved by. Empty where
    /// the VMM did not tell.
    fn version(&self) -> String;

    /// The guest's serial console, once: what the guest prints, to be read all the time (a full pipe stops the guest).
    fn take_console(&mut self) -> Option<pipe::Receiver>;

    /// Stops the virtual CPUs: from here until [`thaw`](Self::thaw) nothing of the guest changes.
    fn freeze(&mut self) -> impl Future<Output = Result<(), ControlError>>;

    /// Lets the virtual CPUs run, after [`freeze`](Self::freeze) or [`load`](Self::load).
    fn thaw(&mut self) -> impl Future<Output = Result<(), ControlError>>;

    /// Whether the VMM has stopped the guest by itself, because the host's disk did not take what it wrote. After
    /// [`thaw`](Self::thaw) it tries again.
    fn is_stalled(&self) -> bool;

    /// Writes the state of CPU and devices, without memory and disk, into an empty file. The machine must be frozen; what it
    /// wrote to its disk is in the disk's file when this returns. A machine that is to go on must be thawed.
    fn save(&mut self, file: OwnedFd) -> impl Future<Output = Result<(), ControlError>>;

    /// Takes CPU and devices from a file of [`save`](Self::save), into a machine of [`Start::Restore`]. Reads guest memory:
    /// whoever serves it must do so already.
    fn load(&mut self, file: OwnedFd) -> impl Future<Output = Result<(), ControlError>>;

    /// Freezes the disk's file as it is and goes on with an empty overlay (qcow2) on it. The machine must be frozen.
    fn switch_disk(&mut self, overlay: OwnedFd) -> impl Future<Output = Result<(), ControlError>>;

    /// Waits until the VMM's process is gone. May be called again, and gives the same answer.
    ///
    /// Cancel safe.
    fn wait(&mut self) -> impl Future<Output = MachineExit>;

    /// Kills the VMM and waits until it is gone. Nothing of the guest is saved.
    fn stop(&mut self, deadline: Duration) -> impl Future<Output = Result<(), StopError>>;
}

/// What machine to start.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Name shown by `ps`.
    pub name: String,
    /// How to run guest code.
    pub accel: Accel,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Guest memory, MiB; the size of [`MachineFds::memory`].
    pub memory_mib: u32,
    /// Uncompressed kernel (ELF), on the host.
    pub kernel: PathBuf,
    /// Initial RAM disk, on the host.
    pub initrd: PathBuf,
    /// Kernel command line.
    pub kernel_args: String,
    /// The sandbox's disk, on the host: a qcow2 overlay. What its header says of a backing file is ignored.
    pub disk: PathBuf,
    /// Layers (qcow2, never written to) between the overlay and the image, on the host, the lowest first.
    pub disk_layers: Vec<PathBuf>,
    /// The image under all, on the host, raw.
    pub base_disk: PathBuf,
    /// MAC address of the guest's network device.
    pub guest_mac: String,
    /// Network namespace to run in.
    pub netns: PathBuf,
    /// cgroup directories to join.
    pub cgroups: Vec<PathBuf>,
    /// User and group id to run as.
    pub uid: u32,
    /// How it begins.
    pub start: Start,
}

/// How a machine begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the kernel's first instruction, on memory of its own.
    Boot,
    /// Where a frozen one stood, on memory that is served page by page.
    Restore,
}

/// Descriptors that a machine takes over.
#[derive(Debug)]
pub struct MachineFds {
    /// A file of [`MachineConfig::memory_mib`] that guest memory is a private mapping of, opened for reading only. At a boot it
    /// gives the size and nothing else: memory is anonymous then.
    pub memory: OwnedFd,
    /// Connected stream socket on which the VMM tells where guest memory is, and hands over its userfaultfd at a restore
    /// (Firecracker's handshake).
    pub pager: OwnedFd,
    /// `/dev/userfaultfd`, opened; needed at a restore.
    pub userfaultfd: Option<OwnedFd>,
    /// The TAP device of the guest's network.
    pub tap: OwnedFd,
}

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A system call on the way failed.
    #[error("could not {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// The VMM ended before it answered.
    #[error("the VMM ended before it answered ({exit}): {stderr}")]
    Ended {
        /// How it ended.
        exit: MachineExit,
        /// The last it printed.
        stderr: String,
    },
    /// The VMM did not answer in time.
    #[error("the VMM did not answer within {0:?}")]
    Deadline(Duration),
    /// The VMM refused a command.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// A machine did not do what it was told. It may still run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// A system call failed, or the VMM hung up.
    #[error("could not {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// The VMM refused a command.
    #[error("the VMM refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The VMM began and did not succeed.
    #[error("the VMM could not {step}: {reason}")]
    Failed {
        /// What was tried.
        step: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The VMM did not finish in time.
    #[error("the VMM did not {step} within {deadline:?}")]
    Deadline {
        /// What was tried.
        step: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
}

/// The VMM would not die.
#[derive(Debug, thiserror::Error)]
#[error("the VMM (pid {pid}) is still there {deadline:?} after SIGKILL")]
pub struct StopError {
    /// Process id of the VMM.
    pub pid: u32,
    /// How long was waited.
    pub deadline: Duration,
}

/// How a VMM's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineExit {
    /// The guest powered off, rebooted or panicked, and the VMM left in order.
    Guest {
        /// The VMM's word for it, such as `guest-reset`.
        reason: String,
    },
    /// It exited by itself.
    Exited {
        /// Exit code.
        code: i32,
    },
    /// A signal ended it.
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
                "the guest powered off, rebooted or crashed ({reason}); its console has the last words"
            ),
            Self::Exited { code } => {
                write!(f, "the virtual machine's process exited with code {code}")
            }
            Self::Killed { signal: 9 } => f.write_str(
                "the virtual machine's process was killed (signal 9): by someone on the host, or for lack of memory",
            ),
            Self::Killed { signal } => write!(
                f,
                "the virtual machine's process was ended by signal {signal}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_killed_vmm_is_told_in_words_a_user_understands() {
        let text = MachineExit::Killed { signal: 9 }.to_string();
        assert!(text.contains("killed (signal 9)"), "{text}");
    }
}
