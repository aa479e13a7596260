//! What the host agent and a sandbox's supervisor tell each other, on one machine.
//!
//! The agent writes [`SupervisorSpec`] to `spec.json` in the sandbox's folder and starts `wrenn supervise --dir FOLDER`.
//! The supervisor listens on `supervisor.sock` there (`SOCK_SEQPACKET`, one JSON message a packet, at most
//! [`MAX_MESSAGE_BYTES`]; the kernel keeps message boundaries, and file descriptors may travel beside a message), then
//! prints `ready` and a line feed to its standard output. An open connection is the sign of life: when the agent reads its
//! end, the supervisor is gone, and so is its VM. What the supervisor knew last is in `status.json`.
//!
//! A supervisor that was started by an older agent must stay usable: fields are only added, with a default.

use std::{net::Ipv4Addr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{SandboxId, TemplateName};

/// File names in a sandbox's folder.
pub mod files {
    /// What the agent asked for; written once.
    pub const SPEC: &str = "spec.json";
    /// What became of it; written by the supervisor when the machine ends, by rename.
    pub const STATUS: &str = "status.json";
    /// Where the supervisor listens.
    pub const SOCKET: &str = "supervisor.sock";
    /// Log of the supervisor and of the VMM.
    pub const LOG: &str = "supervisor.log";
    /// The guest's serial console, its last [`super::CONSOLE_KEEP_BYTES`] at least.
    pub const CONSOLE: &str = "console.log";
    /// The sandbox's own disk, a qcow2 overlay.
    pub const DISK: &str = "rootfs.qcow2";
}

/// The largest message, bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// What is kept of the serial console, bytes: a guest that prints without end must not fill the host's disk.
pub const CONSOLE_KEEP_BYTES: u64 = 256 * 1024;

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software, by QEMU: works everywhere.
    Tcg,
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// `spec.json`: all that a supervisor needs to run one sandbox, and all that an agent needs to adopt it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorSpec {
    /// Version of this structure; 1.
    pub version: u32,
    /// The sandbox.
    pub id: SandboxId,
    /// The template it was made from.
    pub template: TemplateName,
    /// How to run guest code.
    pub accel: Accel,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Size of the disk as the guest sees it, MiB.
    pub disk_mib: u32,
    /// Idle time after which it ends, seconds; 0 means never.
    pub timeout_sec: u32,
    /// Milliseconds since 1970 when it was made.
    pub created_unix_ms: i64,
    /// Uncompressed kernel (ELF).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Kernel command line of the image (`wrenn_image::kernel_args`); the supervisor adds what only this sandbox needs.
    pub kernel_args: String,
    /// The immutable image under all of the sandbox's disk, raw.
    pub base_disk: PathBuf,
    /// Frozen layers (qcow2) between that image and the sandbox's own overlay, the lowest first.
    #[serde(default)]
    pub disk_layers: Vec<PathBuf>,
    /// The frozen moment to begin with; without it the machine boots.
    #[serde(default)]
    pub restore: Option<RestoreSpec>,
    /// User and group id that the VMM runs as; of this sandbox only.
    pub uid: u32,
    /// Directories of the sandbox's cgroup, one a hierarchy (several on cgroup v1, one on v2). May be empty.
    pub cgroups: Vec<PathBuf>,
    /// Its network.
    pub network: NetworkSpec,
    /// Token that the guest agent asks of its clients.
    pub envd_token: String,
    /// Environment of every process in the sandbox.
    pub envs: std::collections::BTreeMap<String, String>,
    /// Nameservers for the guest; none where nothing may leave it.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// User that commands run as when a request names none.
    #[serde(default)]
    pub default_user: String,
}

/// A frozen moment that a machine begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// Build id of the snapshot, 32 hexadecimal digits.
    pub build: String,
    /// Directory of the snapshot: memory header, device state, working set.
    pub snapshot: PathBuf,
    /// Directories that hold the diff files which the header names, in the order in which they are searched.
    pub memory: Vec<PathBuf>,
    /// Whether the pages that were needed after the last restore are loaded ahead of the guest.
    #[serde(default = "yes")]
    pub prefetch: bool,
}

const fn yes() -> bool {
    true
}

/// The sandbox's network, made by the agent before the supervisor starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Slot number, 1 to 32767, unique on the host.
    pub slot: u16,
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// Address at which the host reaches the guest.
    pub host_ip: Ipv4Addr,
    /// Whether the guest may reach what lies beyond the host.
    pub egress: bool,
    /// IPv4 addresses and CIDR blocks that it may reach all the same.
    #[serde(default)]
    pub allow: Vec<String>,
    /// IPv4 addresses and CIDR blocks that it may not reach, unless `allow` has them.
    #[serde(default)]
    pub deny: Vec<String>,
}

/// What the agent asks of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Asks for [`Reply::Status`].
    Status,
    /// End the machine; answered with [`Reply::Stopped`] when it is gone, then the supervisor exits.
    Stop,
    /// Stop the virtual CPUs and write what the machine is to a directory: answered with [`Reply::Frozen`]. If a step fails the
    /// machine goes on at once, and the answer is [`Reply::Refused`].
    Freeze {
        /// Directory of the snapshot in the making; the agent's.
        staging: PathBuf,
        /// Build id of the snapshot, 32 hexadecimal digits.
        build: String,
        /// If the machine is to go on: an empty overlay (qcow2) that it shall write to from now on.
        next_disk: Option<PathBuf>,
    },
    /// Let a frozen machine go on: answered with [`Reply::Thawed`]. Nothing happens to one that runs.
    Thaw,
    /// What became of the snapshot that was frozen last: answered with [`Reply::Noted`]. The next one stands on it only if it was
    /// published.
    Published {
        /// Whether it is complete and in its place.
        published: bool,
        /// Directory that holds its memory diff now.
        memory: PathBuf,
    },
    /// Asks for the memory of the image that the machine was restored from: answered with [`Reply::ImageMemory`] and one
    /// descriptor beside it, or refused if it was booted.
    ImageMemory,
}

/// What a supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// How the machine is.
    Status(MachineStatus),
    /// The machine is gone.
    Stopped,
    /// The machine stands still, and its memory and devices are written.
    Frozen(FrozenMachine),
    /// The machine goes on.
    Thawed,
    /// Understood.
    Noted,
    /// The descriptor beside this is the memory.
    ImageMemory,
    /// The request was not understood or could not be done.
    Refused {
        /// Why, for the log.
        reason: String,
    },
}

/// What a freeze found and wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenMachine {
    /// Generation of the memory that was written; 0 is the first.
    pub generation: u64,
    /// Files that the disk consists of above the image, the lowest first, complete and not written to any more.
    pub disk_layers: Vec<PathBuf>,
    /// Pages of memory that were looked at, 4096 bytes each.
    pub pages_seen: u64,
    /// Of these, pages that were written because they are not as before.
    pub pages_written: u64,
    /// Milliseconds from the freeze to this answer.
    pub frozen_ms: u32,
    /// Kind and version of the VMM, such as `qemu 7.2.22`; empty where it is not known.
    #[serde(default)]
    pub vmm: String,
}

/// What the page server has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerStatus {
    /// Faults that were served.
    pub faults: u64,
    /// Of these, faults on pages that are zero.
    pub zero_faults: u64,
    /// Pages that were loaded because of a fault.
    pub pages_loaded: u64,
    /// Pages that were loaded ahead of the guest.
    pub pages_prefetched: u64,
    /// Pages of the snapshot that are not zero.
    pub pages_stored: u64,
}

/// How a running machine is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Whether its virtual CPUs are stopped by [`Request::Freeze`].
    #[serde(default)]
    pub frozen: bool,
    /// Whether it is being written now: it answers nothing but this question until that has ended.
    #[serde(default)]
    pub freezing: bool,
    /// Its disk above the image: the lowest first, the last is written to.
    #[serde(default)]
    pub disk: Vec<PathBuf>,
    /// What the page server has done; none for a machine that was booted.
    #[serde(default)]
    pub pager: Option<PagerStatus>,
    /// Milliseconds from the supervisor's start until the restored machine ran; none for one that was booted.
    #[serde(default)]
    pub restored_ms: Option<u32>,
    /// Process id of the VMM.
    pub vmm_pid: u32,
    /// Milliseconds from the supervisor's start to the VMM's first answer.
    pub vmm_started_ms: Option<u32>,
    /// Milliseconds from the supervisor's start to the first user-space line of the guest (its initramfs).
    pub kernel_ms: Option<u32>,
    /// Milliseconds from the supervisor's start to the start of the guest agent.
    pub init_ms: Option<u32>,
}

/// `status.json`: how a sandbox's machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalStatus {
    /// True if the end was asked for.
    pub requested: bool,
    /// For a user: why the machine is gone.
    pub reason: String,
}

/// Lines that the guest prints on its console and the supervisor times.
pub mod marks {
    /// Printed by the initramfs as its first act.
    pub const KERNEL_DONE: &str = "wrenn: kernel up";
    /// Printed by `wrenn-init` just before it starts the guest agent.
    pub const INIT_DONE: &str = "wrenn: starting envd";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_as_documented() {
        let text = serde_json::to_string(&Request::Status).expect("plain data");
        assert_eq!(text, r#"{"op":"status"}"#);
    }

    #[test]
    fn a_reply_survives_the_wire() {
        for reply in [
            Reply::Stopped,
            Reply::Status(MachineStatus {
                vmm_pid: 7,
                kernel_ms: Some(3),
                ..Default::default()
            }),
            Reply::Refused {
                reason: "no".into(),
            },
        ] {
            let text = serde_json::to_vec(&reply).expect("plain data");
            assert_eq!(
                serde_json::from_slice::<Reply>(&text).expect("own output"),
                reply
            );
        }
    }
}
