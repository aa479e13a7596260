//! Requests and answers of Firecracker's API, one type per endpoint that the driver uses.
//!
//! Source: `src/firecracker/swagger/firecracker.yaml` in Firecracker's repository, versions 1.10 to
//! 1.16. Firecracker rejects unknown fields, so a field that came with a later version is absent
//! unless the running version has it.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use wrenn_proto::supervise::DiskRate;

use super::version::Version;

/// ID of the guest's disk. Part of the path of its endpoint.
pub const DRIVE_ID: &str = "rootfs";

/// ID of the guest's network device. Part of the path of its endpoint.
pub const INTERFACE_ID: &str = "eth0";

/// Time in which a bucket of a rate limiter is filled, in milliseconds. Its size is then a rate per
/// second.
const REFILL_MS: u64 = 1000;

/// Interval between two balloon statistics of the guest, in seconds.
const BALLOON_STATISTICS_SEC: u16 = 5;

/// Request of the API.
pub trait Request: Serialize {
    /// Method and path.
    const CALL: &'static str;
    /// Body of a successful answer; `()` if it has none.
    type Answer: DeserializeOwned;
}

/// Declares the endpoint of a request.
macro_rules! endpoint {
    ($request:ty, $call:literal) => {
        endpoint!($request, $call, ());
    };
    ($request:ty, $call:literal, $answer:ty) => {
        impl Request for $request {
            const CALL: &'static str = $call;
            type Answer = $answer;
        }
    };
}

/// Requests the state of the process.
#[derive(Debug, Serialize)]
pub struct DescribeInstance;
endpoint!(DescribeInstance, "GET /", InstanceInfo);

/// State of the process.
#[derive(Debug, Deserialize)]
pub struct InstanceInfo {
    /// ID from the command line.
    pub id: String,
    /// State of the VM.
    pub state: InstanceState,
}

/// State of the VM in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// The process has no VM yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The virtual CPUs run.
    Running,
    /// The virtual CPUs are paused.
    Paused,
}

/// Requests the version.
#[derive(Debug, Serialize)]
pub struct GetVersion;
endpoint!(GetVersion, "GET /version", VersionInfo);

/// Version of the process.
#[derive(Debug, Deserialize)]
pub struct VersionInfo {
    /// Version, such as `1.16.1`.
    pub firecracker_version: String,
}

/// Configuration of the log.
#[derive(Debug, Serialize)]
pub struct Logger<'a> {
    /// Path of the file or pipe.
    pub log_path: &'a str,
    /// Least severe level that is logged.
    pub level: LogLevel,
    /// True if a line contains its level.
    pub show_level: bool,
    /// True if a line contains its place in the source.
    pub show_log_origin: bool,
}
endpoint!(Logger<'_>, "PUT /logger");

/// Level of the log.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum LogLevel {
    /// Warnings and errors. The level below logs each request of the API.
    Warning,
}

/// Configuration of the metrics.
#[derive(Debug, Serialize)]
pub struct Metrics<'a> {
    /// Path of the file or pipe.
    pub metrics_path: &'a str,
}
endpoint!(Metrics<'_>, "PUT /metrics");

/// Virtual CPUs and memory.
#[derive(Debug, Serialize)]
pub struct MachineConfiguration {
    /// Number of virtual CPUs.
    pub vcpu_count: u32,
    /// Memory, MiB.
    pub mem_size_mib: u32,
    /// True if two virtual CPUs are shown as threads of one core.
    pub smt: bool,
    /// True if diff snapshots contain exactly the pages that were written to.
    pub track_dirty_pages: bool,
}
endpoint!(MachineConfiguration, "PUT /machine-config");

/// Kernel of the guest.
#[derive(Debug, Serialize)]
pub struct BootSource<'a> {
    /// Path of the kernel.
    pub kernel_image_path: &'a str,
    /// Path of the initial RAM disk.
    pub initrd_path: &'a str,
    /// Kernel command line.
    pub boot_args: &'a str,
}
endpoint!(BootSource<'_>, "PUT /boot-source");

/// Disk of the guest.
#[derive(Debug, Serialize)]
pub struct Drive<'a> {
    /// ID of the disk, [`DRIVE_ID`].
    pub drive_id: &'static str,
    /// Path of the raw file.
    pub path_on_host: &'a str,
    /// True if Firecracker adds `root=` to the kernel command line. The guest's initial RAM disk
    /// mounts the disk instead.
    pub is_root_device: bool,
    /// True if the guest cannot write.
    pub is_read_only: bool,
    /// Handling of the guest's flush requests.
    pub cache_type: CacheType,
    /// Way in which requests are executed.
    pub io_engine: IoEngine,
    /// Limits; `None` if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
endpoint!(Drive<'_>, "PUT /drives/rootfs");

/// Handling of the guest's flush requests.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum CacheType {
    /// A flush reaches the host's disk.
    Writeback,
}

/// Way in which disk requests are executed.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum IoEngine {
    /// Blocking calls. The other engine is `io_uring`, which the jail denies.
    Sync,
}

/// New limits of the disk of a guest that was started.
#[derive(Debug, Serialize)]
pub struct DriveUpdate {
    /// ID of the disk, [`DRIVE_ID`].
    pub drive_id: &'static str,
    /// Limits.
    pub rate_limiter: RateLimiter,
}
endpoint!(DriveUpdate, "PATCH /drives/rootfs");

/// Limits of a device. A bucket that is absent does not change the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RateLimiter {
    /// Limit in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit in requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// Limit. A bucket of size 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TokenBucket {
    /// Number of tokens that fit.
    pub size: u64,
    /// Time in which the bucket is filled, in milliseconds.
    pub refill_time: u64,
}

impl TokenBucket {
    fn per_second(rate: u64) -> Self {
        let refill_time = if rate == 0 { 0 } else { REFILL_MS };
        Self {
            size: rate,
            refill_time,
        }
    }
}

impl RateLimiter {
    /// Returns the limits of a new disk; `None` if there are none.
    #[must_use]
    pub fn of_new_disk(rate: DiskRate) -> Option<Self> {
        let bucket = |rate| (rate != 0).then(|| TokenBucket::per_second(rate));
        let limiter = Self {
            bandwidth: bucket(rate.bytes_per_sec),
            ops: bucket(rate.ops_per_sec),
        };
        let has_limit = limiter.bandwidth.is_some() || limiter.ops.is_some();
        has_limit.then_some(limiter)
    }

    /// Returns the limits that replace those of a disk, whatever they are.
    #[must_use]
    pub fn replacing(rate: DiskRate) -> Self {
        Self {
            bandwidth: Some(TokenBucket::per_second(rate.bytes_per_sec)),
            ops: Some(TokenBucket::per_second(rate.ops_per_sec)),
        }
    }
}

/// Network device of the guest.
#[derive(Debug, Serialize)]
pub struct NetworkInterface<'a> {
    /// ID of the device, [`INTERFACE_ID`].
    pub iface_id: &'static str,
    /// Name of the TAP device.
    pub host_dev_name: &'static str,
    /// MAC address of the guest.
    pub guest_mac: &'a str,
}
endpoint!(NetworkInterface<'_>, "PUT /network-interfaces/eth0");

/// Source of random numbers for the guest, without a limit.
#[derive(Debug, Serialize)]
pub struct EntropyDevice {}
endpoint!(EntropyDevice, "PUT /entropy");

/// Memory balloon, by which the guest reports free memory. It is never inflated.
#[derive(Debug, Serialize)]
pub struct Balloon {
    /// Memory to take from the guest, MiB.
    pub amount_mib: u32,
    /// True if the guest may take memory back when it has none left.
    pub deflate_on_oom: bool,
    /// Interval between two statistics of the guest, in seconds.
    pub stats_polling_interval_s: u16,
    /// True if the guest reports free memory on its own. `None` if the version cannot do this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_reporting: Option<bool>,
}
endpoint!(Balloon, "PUT /balloon");

impl Balloon {
    /// Returns the balloon of a guest.
    ///
    /// Free page hinting is not used: the guest may reuse a page before Firecracker discards it.
    #[must_use]
    pub fn for_version(version: &Version) -> Self {
        Self {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: BALLOON_STATISTICS_SEC,
            free_page_reporting: version.has_free_page_reporting().then_some(true),
        }
    }
}

/// Requests the statistics of the balloon.
#[derive(Debug, Serialize)]
pub struct GetBalloonStatistics;
endpoint!(
    GetBalloonStatistics,
    "GET /balloon/statistics",
    BalloonStatistics
);

/// Memory of the guest as the guest reports it. Values that the guest has not reported are `None`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BalloonStatistics {
    /// Memory that the balloon holds, MiB.
    pub actual_mib: u32,
    /// Memory without any use, in bytes.
    pub free_memory: Option<u64>,
    /// Memory of the guest, in bytes.
    pub total_memory: Option<u64>,
    /// Memory that new programs could use without swapping, in bytes.
    pub available_memory: Option<u64>,
    /// Memory of the page cache that can be reclaimed at once, in bytes.
    pub disk_caches: Option<u64>,
}

/// Metadata service of the guest.
#[derive(Debug, Serialize)]
pub struct MmdsConfig {
    /// Version of the protocol.
    pub version: MmdsVersion,
    /// Network devices on which the service is reachable.
    pub network_interfaces: [&'static str; 1],
    /// Address of the service.
    pub ipv4_address: Ipv4Addr,
}
endpoint!(MmdsConfig, "PUT /mmds/config");

/// Version of the metadata service's protocol.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum MmdsVersion {
    /// With session tokens.
    V2,
}

/// Content of the metadata service.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct MmdsContent<'a>(pub &'a Value);
endpoint!(MmdsContent<'_>, "PUT /mmds");

/// Action on the VM.
#[derive(Debug, Serialize)]
pub struct InstanceAction {
    /// The action.
    pub action_type: ActionType,
}
endpoint!(InstanceAction, "PUT /actions");

/// Kind of an action.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum ActionType {
    /// Boots the guest.
    InstanceStart,
}

/// New state of the virtual CPUs.
#[derive(Debug, Serialize)]
pub struct VmUpdate {
    /// The state.
    pub state: VmState,
}
endpoint!(VmUpdate, "PATCH /vm");

/// State of the virtual CPUs.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum VmState {
    /// They do not run.
    Paused,
    /// They run.
    Resumed,
}

/// Snapshot to create.
#[derive(Debug, Serialize)]
pub struct SnapshotCreate<'a> {
    /// Pages that are written.
    pub snapshot_type: SnapshotType,
    /// Path of the file for the state of CPUs and devices.
    pub snapshot_path: &'a str,
    /// Path of the file for the memory.
    pub mem_file_path: &'a str,
}
endpoint!(SnapshotCreate<'_>, "PUT /snapshot/create");

/// Pages that a snapshot contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SnapshotType {
    /// All pages.
    Full,
    /// Pages that were written to since the start or the last snapshot of the process.
    Diff,
}

/// Snapshot to load.
#[derive(Debug, Serialize)]
pub struct SnapshotLoad<'a> {
    /// Path of the state of CPUs and devices.
    pub snapshot_path: &'a str,
    /// Source of the memory.
    pub mem_backend: MemoryBackend<'a>,
    /// True if diff snapshots contain exactly the pages that were written to. `None` before 1.13.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// The same, for versions before 1.13. `None` since then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_diff_snapshots: Option<bool>,
    /// True if the virtual CPUs run at once.
    pub resume_vm: bool,
}
endpoint!(SnapshotLoad<'_>, "PUT /snapshot/load");

/// Source of the memory of a snapshot.
#[derive(Debug, Serialize)]
pub struct MemoryBackend<'a> {
    /// Kind of the source.
    pub backend_type: BackendType,
    /// Path of the file, or of the socket that takes the userfaultfd.
    pub backend_path: &'a str,
}

/// Kind of a source of memory.
#[derive(Debug, Clone, Copy, Serialize)]
pub enum BackendType {
    /// File that Firecracker maps privately.
    File,
    /// Page server that resolves page faults.
    Uffd,
}

/// Body of an answer that reports a failure.
#[derive(Debug, Deserialize)]
pub(super) struct Fault {
    /// Reason. The HTTP server of the API uses another name for a request that it cannot parse.
    #[serde(alias = "error")]
    pub(super) fault_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_of_zero_is_no_limit() {
        let rate = |bytes_per_sec, ops_per_sec| DiskRate {
            bytes_per_sec,
            ops_per_sec,
        };
        let bucket = |size, refill_time| Some(TokenBucket { size, refill_time });
        assert_eq!(RateLimiter::of_new_disk(rate(0, 0)), None);
        let bytes_only = RateLimiter::of_new_disk(rate(9, 0)).expect("a limit");
        assert_eq!(
            (bytes_only.bandwidth, bytes_only.ops),
            (bucket(9, 1000), None)
        );
        // A bucket that is absent would leave the limit of the snapshot in place.
        let replaced = RateLimiter::replacing(rate(0, 7));
        assert_eq!(replaced.bandwidth, bucket(0, 0));
        assert_eq!(replaced.ops, bucket(7, 1000));
    }

    #[test]
    fn the_paths_of_devices_contain_their_ids() {
        assert_eq!(Drive::CALL, format!("PUT /drives/{DRIVE_ID}"));
        assert_eq!(DriveUpdate::CALL, format!("PATCH /drives/{DRIVE_ID}"));
        let interface = format!("PUT /network-interfaces/{INTERFACE_ID}");
        assert_eq!(NetworkInterface::CALL, interface);
    }
}
