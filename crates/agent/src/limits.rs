//! Limits that the operator sets for the sandboxes of a host. `docs/limits.md` lists them with
//! their settings.

/// Limits of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLimits {
    /// Memory that may be promised to VMs, in percent of the host's memory without
    /// [`memory_reserve_mib`](Self::memory_reserve_mib). More than 100 is over-commit.
    pub memory_commit_percent: u32,
    /// Memory that VMs never get, in MiB. Left for the kernel, the services and the page cache.
    pub memory_reserve_mib: u32,
    /// Disk space that guests leave free, in MiB; `None`: 2 percent of the file system, at most
    /// 4 GiB. New sandboxes and snapshots need twice as much.
    pub disk_reserve_mib: Option<u64>,
    /// Maximum disk space of all sandboxes and snapshots, in MiB; `None`: that of the file system.
    pub disk_budget_mib: Option<u64>,
    /// Maximum disk space of one sandbox with its last snapshot, in MiB; `None`: four times its
    /// disk and memory size.
    pub sandbox_disk_budget_mib: Option<u64>,
    /// Limits of disk requests, network traffic and swap of each sandbox.
    pub sandbox: SandboxLimits,
    /// Policy for a host without cgroup controllers.
    pub cgroups: CgroupPolicy,
}

/// Limits of one sandbox besides those of its size. 0 means no limit, except for swap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxLimits {
    /// Data read from and written to the disk, in MiB per second.
    pub disk_mib_per_sec: u32,
    /// Disk requests per second.
    pub disk_ops_per_sec: u32,
    /// Network traffic, in Mbit per second in each direction.
    pub network_mbit_per_sec: u32,
    /// Connections that the guest has open to addresses beyond its gateway.
    pub connections: u32,
    /// Swap space of the VMM, in MiB. 0 means none.
    pub swap_mib: u32,
}

impl Default for SandboxLimits {
    fn default() -> Self {
        Self {
            disk_mib_per_sec: 400,
            disk_ops_per_sec: 20_000,
            network_mbit_per_sec: 2000,
            connections: 4096,
            swap_mib: 0,
        }
    }
}

/// Policy for a host without a controller for CPU, memory or processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupPolicy {
    /// The agent does not start, unless its data directory is older than this rule and never had
    /// limits.
    #[default]
    Auto,
    /// The agent does not start.
    Required,
    /// Sandboxes run without the missing limits.
    Optional,
}

impl std::str::FromStr for CgroupPolicy {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "required" => Ok(Self::Required),
            "optional" => Ok(Self::Optional),
            _ => Err("expected `auto`, `required` or `optional`".to_owned()),
        }
    }
}

impl Default for HostLimits {
    fn default() -> Self {
        Self {
            memory_commit_percent: 400,
            memory_reserve_mib: 512,
            disk_reserve_mib: None,
            disk_budget_mib: None,
            sandbox_disk_budget_mib: None,
            sandbox: SandboxLimits::default(),
            cgroups: CgroupPolicy::default(),
        }
    }
}
