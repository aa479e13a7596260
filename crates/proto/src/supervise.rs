//! Local protocol between the host agent and the supervisor of a sandbox.
//!
//! The agent writes [`SupervisorSpec`] to `spec.json` in the sandbox's directory and starts
//! `wrenn supervise --dir DIR`. The supervisor listens on `supervisor.sock` in that directory. The
//! socket is `SOCK_SEQPACKET`: each packet is one JSON message of at most [`MAX_MESSAGE_BYTES`],
//! the kernel preserves message boundaries, and a message may carry file descriptors. The
//! supervisor then prints `ready` and a line feed to its standard output.
//!
//! An open connection shows that the supervisor is alive. When the agent reads end of file, the
//! supervisor has exited, and so has its VM. The last known state is in `status.json`.
//!
//! A supervisor that was started by an older agent must stay usable. Fields are therefore only
//! added, with a default, and the words on the wire never change, even if the code has other names
//! for them.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use wrenn_model::{CpuModel, MachineSize, SandboxId, TemplateName};

use crate::machine::MachineProfile;

/// File names in a sandbox's directory.
pub mod files {
    /// Parameters of the sandbox. The agent writes this file once.
    pub const SPEC: &str = "spec.json";
    /// Final status of the VM. The supervisor writes this file when the VM ends, by rename.
    pub const STATUS: &str = "status.json";
    /// Socket on which the supervisor listens.
    pub const SOCKET: &str = "supervisor.sock";
    /// Log of the supervisor and of the VMM: JSON lines, at most [`super::MAX_LOG_BYTES`].
    pub const LOG: &str = "supervisor.log";
    /// Lines before those in [`LOG`], of the same size.
    pub const OLD_LOG: &str = "supervisor.log.1";
    /// Output of the guest's serial console; at least the last [`super::CONSOLE_KEEP_BYTES`].
    pub const CONSOLE: &str = "console.log";
    /// Disk of the sandbox, a qcow2 overlay.
    pub const DISK: &str = "rootfs.qcow2";
    /// Directory with the raw view of the disk, for a VMM that does not read qcow2. A supervisor
    /// that is killed leaves it behind with a mount.
    pub const EXPORT: &str = "export";
}

/// Maximum size of a message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Maximum size of each file of a supervisor's log, in bytes.
pub const MAX_LOG_BYTES: u64 = 512 * 1024;

/// Minimum amount of serial console output to keep, in bytes. The log is bounded, because a guest
/// that prints without end must not fill the host's disk.
pub const CONSOLE_KEEP_BYTES: u64 = 256 * 1024;

/// Execution mode of guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation by QEMU. Works on every host.
    Tcg,
}

impl Accel {
    /// Returns the CPU model of VMs whose specification or snapshot names none. These are the VMs
    /// of release 0.1.0 and of versions shortly after it. Their saved state can only be restored
    /// with this model.
    #[must_use]
    pub fn cpu_of_0_1_0(self) -> CpuModel {
        let model = match self {
            Self::Kvm => "host",
            Self::Tcg => "Nehalem-v1,+arat",
        };
        model.parse().expect("the model is valid")
    }

    /// True if a guest with this CPU model sees the processor of the host, so that the model alone
    /// does not determine the CPU.
    #[must_use]
    pub fn shows_host_cpu(self, model: &CpuModel) -> bool {
        let name = model.as_str().split(',').next();
        self == Self::Kvm && matches!(name, Some("host" | "max"))
    }
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Contents of `spec.json`: all parameters that a supervisor needs to run a sandbox and that an
/// agent needs to adopt it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SupervisorSpec {
    /// Version of this structure: 1.
    pub version: u32,
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Template from which the sandbox was created.
    pub template: TemplateName,
    /// Execution mode of guest code.
    pub accel: Accel,
    /// CPU model of the VM; `None` in specifications of release 0.1.0. See [`Self::cpu`].
    #[serde(default, rename = "cpu")]
    pub cpu_model: Option<CpuModel>,
    /// Virtual hardware; `None` in specifications of release 0.1.0. See [`Self::profile`].
    #[serde(default)]
    pub machine: Option<MachineProfile>,
    /// Virtual CPUs, memory and disk.
    #[serde(flatten)]
    pub size: MachineSize,
    /// Idle time after which the sandbox ends, in seconds; 0 means never.
    pub timeout_sec: u32,
    /// Creation time, in milliseconds since 1970.
    pub created_unix_ms: i64,
    /// Path of the uncompressed kernel (ELF).
    pub kernel: PathBuf,
    /// Path of the initial RAM disk.
    pub initrd: PathBuf,
    /// Kernel command line of the image (`wrenn_image::kernel_args`). The supervisor appends the
    /// parameters that are specific to this sandbox.
    pub kernel_args: String,
    /// Path of the immutable base image (raw) below all layers of the sandbox's disk.
    pub base_disk: PathBuf,
    /// Paths of the read-only layers (qcow2) between the base image and the sandbox's own overlay,
    /// lowest first.
    #[serde(default)]
    pub disk_layers: Vec<PathBuf>,
    /// Snapshot to restore; `None` boots the VM.
    #[serde(default)]
    pub restore: Option<RestoreSpec>,
    /// User and group id of the VMM, used by this sandbox only.
    pub uid: u32,
    /// Cgroup directories of the sandbox, one per hierarchy (several on cgroup v1, one on v2). May
    /// be empty.
    pub cgroups: Vec<PathBuf>,
    /// Network of the sandbox.
    pub network: NetworkSpec,
    /// Token that the guest agent requires from its clients.
    pub envd_token: String,
    /// Environment of every process in the sandbox.
    pub envs: std::collections::BTreeMap<String, String>,
    /// Nameservers of the guest. Empty if the guest has no egress.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Nameservers to which the supervisor forwards DNS requests that the guest sends to its
    /// gateway. Empty if there is no forwarder.
    #[serde(default)]
    pub dns_upstreams: Vec<IpAddr>,
    /// User that runs commands if a request names none.
    #[serde(default)]
    pub default_user: String,
    /// Space on the host's disk that the guest must leave free, in bytes. A guest that writes while
    /// less is free is held until there is space.
    #[serde(default)]
    pub disk_room_bytes: u64,
    /// Cgroup directories that the supervisor joins.
    #[serde(default)]
    pub supervisor_cgroups: Vec<PathBuf>,
    /// Limits of the guest's disk requests.
    #[serde(default)]
    pub disk_rate: DiskRate,
    /// Firecracker, if it is the VMM of the sandbox; `None` for QEMU.
    #[serde(default)]
    pub firecracker: Option<FirecrackerSpec>,
}

/// Parameters of a sandbox that only Firecracker needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirecrackerSpec {
    /// Path of the program.
    pub program: PathBuf,
    /// User and group ID of the process that presents the sandbox's disk to the VMM as a raw file.
    /// Used by this sandbox only.
    pub exporter_uid: u32,
}

/// Limits of a guest's disk requests. 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRate {
    /// Bytes read and written per second.
    pub bytes_per_sec: u64,
    /// Requests per second.
    pub ops_per_sec: u64,
}

impl SupervisorSpec {
    /// Returns the CPU model of the VM.
    #[must_use]
    pub fn cpu(&self) -> CpuModel {
        let model = self.cpu_model.clone();
        model.unwrap_or_else(|| self.accel.cpu_of_0_1_0())
    }

    /// Returns the virtual hardware of the VM.
    #[must_use]
    pub fn profile(&self) -> MachineProfile {
        let profile = self.machine.clone();
        profile.unwrap_or_else(MachineProfile::first)
    }
}

/// Snapshot from which a VM is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// Id of the snapshot, 32 hexadecimal digits.
    pub build: String,
    /// Directory of the snapshot: memory header, device state, working set.
    pub snapshot: PathBuf,
    /// Directories that contain the diff files named by the header, in search order.
    pub memory: Vec<PathBuf>,
    /// Kind and version of the VMM that saved the device state, such as `qemu 7.2.22`. Empty from
    /// older agents.
    #[serde(default)]
    pub vmm: String,
    /// True if the pages that were needed after the last restore are prefetched.
    #[serde(default = "yes")]
    pub prefetch: bool,
    /// Object store with the diff files that are in none of the directories. `None` if all are in
    /// one.
    #[serde(default)]
    pub remote: Option<RemoteSpec>,
}

/// Object store, and the cache of the host. The credentials are in the environment of the
/// supervisor, in the variables of AWS's own tools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSpec {
    /// Bucket and prefix: `s3://bucket/prefix`.
    pub url: String,
    /// URL of the server; `None` for that of AWS.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Region; `None` for the default.
    #[serde(default)]
    pub region: Option<String>,
    /// Time for which a failed request is repeated, in seconds.
    pub retry_sec: u64,
    /// Directory of the cache.
    pub cache: PathBuf,
    /// Maximum size of the cache, in bytes.
    pub cache_bytes: u64,
    /// Space on the disk that the cache leaves free, in bytes.
    #[serde(default)]
    pub room_bytes: u64,
}

const fn yes() -> bool {
    true
}

/// Network of the sandbox. The agent creates it before it starts the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Slot number, 1 to 32767, unique on the host.
    pub slot: u16,
    /// Path of the network namespace.
    pub netns: PathBuf,
    /// Address of the guest as seen from the host.
    pub host_ip: Ipv4Addr,
    /// True if the guest may reach addresses beyond the host.
    pub egress: bool,
    /// IPv4 addresses and CIDR blocks that are allowed even without `egress`.
    #[serde(default)]
    pub allow: Vec<String>,
    /// IPv4 addresses and CIDR blocks that are denied unless `allow` contains them.
    #[serde(default)]
    pub deny: Vec<String>,
    /// MTU of the guest's link.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
}

/// Returns the MTU of guests of release 0.1.0.
const fn default_mtu() -> u32 {
    crate::guest::DEFAULT_MTU
}

/// Request of the agent to a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Returns [`Reply::Status`].
    Status,
    /// Stops the VM. Returns [`Reply::Stopped`] after the VM is gone; then the supervisor exits.
    Stop,
    /// Pauses the vCPUs and writes a snapshot to a directory. Returns [`Reply::SnapshotTaken`]. If
    /// a step fails, the VM is resumed at once and the reply is [`Reply::Rejected`].
    #[serde(rename = "freeze")]
    Snapshot {
        /// Staging directory of the snapshot, owned by the agent.
        staging: PathBuf,
        /// Id of the snapshot, 32 hexadecimal digits.
        build: String,
        /// Empty overlay (qcow2) to which the VM writes from now on; `None` if the VM is not to be
        /// resumed.
        next_disk: Option<PathBuf>,
    },
    /// Resumes a paused VM. Returns [`Reply::Resumed`]. No effect on a running VM.
    #[serde(rename = "thaw")]
    Resume,
    /// Reports the outcome of the last snapshot. Returns [`Reply::Noted`]. The next snapshot
    /// depends on it only if it was published.
    Published {
        /// True if the snapshot is complete and in its final place.
        published: bool,
        /// Directory that now contains the memory diff of the snapshot.
        memory: PathBuf,
    },
    /// Requests the shared memory of the snapshot from which the VM was restored. Returns
    /// [`Reply::ImageMemory`] with one file descriptor. Rejected if the VM was booted.
    ImageMemory,
}

/// Reply of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Status of the VM.
    Status(MachineStatus),
    /// The VM is gone.
    Stopped,
    /// The vCPUs are paused, and memory and device state are written.
    #[serde(rename = "frozen")]
    SnapshotTaken(SnapshotReport),
    /// The VM runs.
    #[serde(rename = "thawed")]
    Resumed,
    /// Acknowledgement without data.
    Noted,
    /// The attached file descriptor is the memory.
    ImageMemory,
    /// The request is invalid or failed.
    #[serde(rename = "refused")]
    Rejected {
        /// Reason, for the log.
        reason: String,
        /// Kind of the failure. `None` from older supervisors.
        #[serde(default)]
        code: Option<RejectionCode>,
    },
}

impl Reply {
    /// Returns a rejection with the code [`RejectionCode::Other`].
    pub fn rejected(reason: impl Into<String>) -> Self {
        Self::Rejected {
            reason: reason.into(),
            code: Some(RejectionCode::Other),
        }
    }
}

/// Kind of a failure. Agents handle each kind differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RejectionCode {
    /// The host's disk is full, or a quota is used up.
    OutOfSpace,
    /// Another failure, or a code of a newer supervisor.
    #[serde(other)]
    Other,
}

/// Result of a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Generation of the written memory; the first is 0.
    pub generation: u64,
    /// Complete, read-only disk files above the base image, lowest first.
    pub disk_layers: Vec<PathBuf>,
    /// Number of examined memory pages of 4096 bytes.
    pub pages_seen: u64,
    /// Number of examined pages that differ from the parent snapshot and were written.
    pub pages_written: u64,
    /// Time from the start of the pause to this reply, in milliseconds.
    #[serde(rename = "frozen_ms")]
    pub paused_ms: u32,
    /// Kind and version of the VMM, such as `qemu 7.2.22`; empty if unknown.
    #[serde(default)]
    pub vmm: String,
}

/// Counters of the page server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerStatus {
    /// Number of resolved faults.
    pub faults: u64,
    /// Number of resolved faults on zero pages.
    pub zero_faults: u64,
    /// Number of pages loaded because of a fault.
    pub pages_loaded: u64,
    /// Number of prefetched pages.
    pub pages_prefetched: u64,
    /// Number of non-zero pages in the snapshot.
    pub pages_stored: u64,
}

/// Status of a running VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// True if the vCPUs are paused by [`Request::Snapshot`].
    #[serde(default, rename = "frozen")]
    pub paused: bool,
    /// True while a snapshot is being written. During this time, the supervisor answers status
    /// requests and obeys a stop; other requests wait.
    #[serde(default, rename = "freezing")]
    pub snapshotting: bool,
    /// Disk files above the base image, lowest first. The last one is writable.
    #[serde(default)]
    pub disk: Vec<PathBuf>,
    /// Counters of the page server; `None` if the VM was booted.
    #[serde(default)]
    pub pager: Option<PagerStatus>,
    /// Time from the start of the supervisor until the restored VM ran, in milliseconds; `None` if
    /// the VM was booted.
    #[serde(default)]
    pub restored_ms: Option<u32>,
    /// Process id of the VMM.
    pub vmm_pid: u32,
    /// Time from the start of the supervisor to the VMM's first response, in milliseconds.
    pub vmm_started_ms: Option<u32>,
    /// Time from the start of the supervisor to the first user-space line of the guest (from its
    /// initramfs), in milliseconds.
    pub kernel_ms: Option<u32>,
    /// Time from the start of the supervisor to the start of the guest agent, in milliseconds.
    pub init_ms: Option<u32>,
    /// Reason why the guest's init failed the boot, as printed after [`marks::BOOT_FAILED`].
    #[serde(default)]
    pub boot_failure: Option<String>,
    /// Processor time of the VMM. `None` from older supervisors, and on kernels without scheduler
    /// statistics.
    #[serde(default)]
    pub vmm_time: Option<VmmTime>,
    /// True if the VMM paused the guest after a host write error (disk full).
    #[serde(default)]
    pub waits_for_disk: bool,
}

/// Processor time of all threads of a VMM since its start.
///
/// The VMM of a hung guest neither runs nor waits. On a busy host, the VMM of a working guest
/// waits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmTime {
    /// Time on a processor, in milliseconds.
    pub running_ms: u64,
    /// Time spent ready to run, waiting for a processor, in milliseconds.
    pub waiting_ms: u64,
}

/// Contents of `status.json`: how the VM of a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalStatus {
    /// True if the end was requested.
    pub requested: bool,
    /// Reason for the end, shown to users.
    pub reason: String,
}

/// Lines on the guest's console that the supervisor reads, and parameters on the kernel command
/// line that the guest reads.
pub mod marks {
    /// First line that the initramfs prints.
    pub const KERNEL_DONE: &str = "wrenn: kernel up";
    /// Line that `wrenn-init` prints immediately before it starts the guest agent.
    pub const INIT_DONE: &str = "wrenn: starting envd";
    /// Start of the line that `wrenn-init` prints when it fails the boot. The reason follows. The
    /// guest then waits until it is ended.
    pub const BOOT_FAILED: &str = "wrenn: boot failed: ";
    /// Parameter of the kernel command line: the error of the kernel's timer calibration that
    /// `wrenn-init` tolerates, in percent.
    pub const TIMER_TOLERANCE: &str = "wrenn.timer_tolerance=";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specification_without_a_cpu_model_is_one_of_release_0_1_0() {
        let spec = |cpu: &str| -> SupervisorSpec {
            let text = format!(
                r#"{{"version":1,"id":"sb-1","template":"minimal","accel":"tcg",{cpu}"vcpus":1,
                    "memory_mib":256,"disk_mib":1024,"timeout_sec":0,"created_unix_ms":0,
                    "kernel":"/k","initrd":"/i","kernel_args":"","base_disk":"/b","uid":1,
                    "cgroups":[],"network":{{"slot":1,"netns":"/n","host_ip":"127.0.0.1",
                    "egress":false}},"envd_token":"t","envs":{{}}}}"#
            );
            serde_json::from_str(&text).expect("a specification")
        };
        assert_eq!(spec("").cpu().as_str(), "Nehalem-v1,+arat");
        assert_eq!(spec("").profile(), MachineProfile::first());
        let named = spec(r#""cpu":"max,-avx","#);
        assert_eq!(named.cpu().as_str(), "max,-avx");
        let text = serde_json::to_string(&named).expect("plain data");
        assert!(text.contains(r#""cpu":"max,-avx""#), "{text}");
        assert_eq!(Accel::Kvm.cpu_of_0_1_0().as_str(), "host");
    }

    #[test]
    fn host_cpu_is_shown_by_some_models_under_kvm_only() {
        for (model, shown) in [
            ("host", true),
            ("host,-avx", true),
            ("max", true),
            ("Haswell-v4", false),
        ] {
            let model: CpuModel = model.parse().expect("valid");
            assert_eq!(Accel::Kvm.shows_host_cpu(&model), shown, "{model}");
            assert!(!Accel::Tcg.shows_host_cpu(&model), "{model}");
        }
    }

    #[test]
    fn request_has_the_documented_json() {
        let text = serde_json::to_string(&Request::Status).expect("plain data");
        assert_eq!(text, r#"{"op":"status"}"#);
    }

    #[test]
    fn a_rejection_by_an_older_or_newer_supervisor_is_read() {
        for (text, expected) in [
            (r#"{"reply":"refused","reason":"no"}"#, None),
            (
                r#"{"reply":"refused","reason":"no","code":"out_of_space"}"#,
                Some(RejectionCode::OutOfSpace),
            ),
            (
                r#"{"reply":"refused","reason":"no","code":"of the future"}"#,
                Some(RejectionCode::Other),
            ),
        ] {
            let reply: Reply = serde_json::from_str(text).expect("valid");
            let reason = "no".to_owned();
            let code = expected;
            assert_eq!(reply, Reply::Rejected { reason, code });
        }
    }

    fn json(message: &impl Serialize) -> String {
        serde_json::to_string(message).expect("plain data")
    }

    /// The words of release 0.1.0, whose supervisors may still run.
    #[test]
    fn words_on_the_wire_are_those_of_release_0_1_0() {
        let snapshot = Request::Snapshot {
            staging: "/s".into(),
            build: "b".to_owned(),
            next_disk: None,
        };
        let published = Request::Published {
            published: true,
            memory: "/m".into(),
        };
        let report = SnapshotReport {
            paused_ms: 5,
            ..SnapshotReport::default()
        };
        let paused = MachineStatus {
            paused: true,
            snapshotting: true,
            ..MachineStatus::default()
        };
        for (text, expected) in [
            (
                json(&snapshot),
                r#"{"op":"freeze","staging":"/s","build":"b","next_disk":null}"#,
            ),
            (json(&Request::Resume), r#"{"op":"thaw"}"#),
            (json(&Request::Stop), r#"{"op":"stop"}"#),
            (
                json(&published),
                r#"{"op":"published","published":true,"memory":"/m"}"#,
            ),
            (json(&Request::ImageMemory), r#"{"op":"image_memory"}"#),
            (json(&Reply::Resumed), r#"{"reply":"thawed"}"#),
            (json(&Reply::Noted), r#"{"reply":"noted"}"#),
            (
                json(&Reply::rejected("no")),
                r#"{"reply":"refused","reason":"no","code":"other"}"#,
            ),
            (
                json(&Reply::SnapshotTaken(report)),
                r#"{"reply":"frozen","generation":0,"disk_layers":[],"pages_seen":0,"pages_written":0,"frozen_ms":5,"vmm":""}"#,
            ),
        ] {
            assert_eq!(text, expected);
        }
        let status = json(&Reply::Status(paused));
        assert!(
            status.starts_with(r#"{"reply":"status","frozen":true,"freezing":true,"#),
            "{status}"
        );
    }

    #[test]
    fn reply_round_trips_through_json() {
        for reply in [
            Reply::Stopped,
            Reply::Status(MachineStatus {
                vmm_pid: 7,
                kernel_ms: Some(3),
                ..Default::default()
            }),
            Reply::rejected("no"),
            Reply::Rejected {
                reason: "full".into(),
                code: Some(RejectionCode::OutOfSpace),
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
