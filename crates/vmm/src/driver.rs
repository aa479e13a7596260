//! The contract between a supervisor and a virtual machine monitor.

use std::{future::Future, io, os::fd::OwnedFd, path::PathBuf, time::Duration};

use tokio::net::unix::pipe;
use wrenn_proto::supervise::Accel;

/// Starts machines of one kind of VMM.
pub trait VmmDriver {
    /// A machine of this kind.
    type Machine: Machine;

    /// Starts a VMM in its jail, with the guest running, and waits for the VMM's first answer.
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

    /// The guest's serial console, once: what the guest prints, to be read all the time (a full pipe stops the guest).
    fn take_console(&mut self) -> Option<pipe::Receiver>;

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
    /// The sandbox's disk, on the host: a qcow2 overlay whose backing file is [`jail::BASE_DISK`](crate::jail::BASE_DISK).
    pub disk: PathBuf,
    /// The image under it, on the host, raw.
    pub base_disk: PathBuf,
    /// MAC address of the guest's network device.
    pub guest_mac: String,
    /// Network namespace to run in.
    pub netns: PathBuf,
    /// cgroup directories to join.
    pub cgroups: Vec<PathBuf>,
    /// User and group id to run as.
    pub uid: u32,
}

/// Descriptors that a machine takes over.
#[derive(Debug)]
pub struct MachineFds {
    /// Guest memory: a memfd of [`MachineConfig::memory_mib`].
    pub memory: OwnedFd,
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
    #[error("the VMM refused `{command}`: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its own words.
        reason: String,
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
