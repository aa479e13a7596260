//! Settings and their sources, in order of precedence: flag, environment variable, one TOML file,
//! default.
//!
//! Owns the names of all settings. Every source is parsed into the same [`Layer`] of optional
//! values, and [`Settings`] takes the first value found for each. Never writes anything. An error
//! about an invalid value names its source.

mod load;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::Ipv4Net;
use serde::Deserialize;
use wrenn_agent::{CgroupPolicy, HostLimits, ObjectStoreConfig, SandboxLimits, Subnets};
use wrenn_control::Limits;
use wrenn_model::{CpuModel, Egress, EgressLimit};
use wrenn_proto::supervise::Accel;

pub(crate) use load::{address, load};

/// Default data directory.
pub(crate) const DEFAULT_DIR: &str = "/var/lib/wrenn";

/// System-wide settings file.
pub(crate) const SYSTEM_FILE: &str = "/etc/wrenn.toml";

/// Accelerator setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AccelChoice {
    /// Hardware virtualization if available, otherwise software emulation
    #[default]
    Auto,
    /// Hardware virtualization
    Kvm,
    /// Software emulation by QEMU; works everywhere
    Tcg,
}

impl AccelChoice {
    /// Returns the accelerator that the setting requires; `None` if the machine decides.
    pub(crate) fn forced(self) -> Option<Accel> {
        match self {
            Self::Auto => None,
            Self::Kvm => Some(Accel::Kvm),
            Self::Tcg => Some(Accel::Tcg),
        }
    }
}

/// VMM setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum VmmChoice {
    /// Firecracker if it is installed and hardware virtualization is available, otherwise QEMU
    #[default]
    Auto,
    /// QEMU
    Qemu,
    /// Firecracker; requires hardware virtualization
    Firecracker,
}

/// Settings of one source. The fields are the keys of the TOML file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layer {
    /// Data directory.
    pub(crate) dir: Option<PathBuf>,
    /// Listen address of the REST API.
    pub(crate) listen: Option<SocketAddr>,
    /// Listen address for requests to ports of sandboxes.
    pub(crate) traffic_listen: Option<SocketAddr>,
    /// Listen address of the host agent.
    pub(crate) agent_listen: Option<SocketAddr>,
    /// URL of the host agent, for a control plane that runs alone.
    pub(crate) agent_url: Option<String>,
    /// Directory of kernels, root file systems and templates.
    pub(crate) images_dir: Option<PathBuf>,
    /// URL of the REST API, for client commands.
    pub(crate) api_url: Option<String>,
    /// API key of client commands.
    pub(crate) api_key: Option<String>,
    /// Database URL of the control plane.
    pub(crate) database_url: Option<String>,
    /// Accelerator.
    pub(crate) accel: Option<AccelChoice>,
    /// VMM of VMs that boot.
    pub(crate) vmm: Option<VmmChoice>,
    /// Path of Firecracker.
    pub(crate) firecracker: Option<PathBuf>,
    /// False to use KVM without checking that it runs a guest.
    pub(crate) kvm_check: Option<bool>,
    /// Arguments that are appended to the kernel command line of every guest.
    pub(crate) kernel_args: Option<String>,
    /// CPU model of VMs that boot.
    pub(crate) cpu: Option<CpuModel>,
    /// Default egress policy of sandboxes.
    pub(crate) egress: Option<Egress>,
    /// Maximum egress that clients may request.
    pub(crate) egress_limit: Option<EgressLimit>,
    /// Ranges that clients may request although the limit does not permit them.
    #[serde(default, deserialize_with = "load::blocks_of_file")]
    pub(crate) egress_open: Option<Vec<Ipv4Net>>,
    /// Ranges that clients may not request.
    #[serde(default, deserialize_with = "load::blocks_of_file")]
    pub(crate) egress_closed: Option<Vec<Ipv4Net>>,
    /// Subnets of sandboxes: of guests, of links.
    #[serde(default, deserialize_with = "load::subnets_of_file")]
    pub(crate) subnets: Option<Subnets>,
    /// Name servers of guests with egress.
    pub(crate) dns: Option<Vec<IpAddr>>,
    /// Maximum number of concurrent connections per listener.
    pub(crate) max_clients: Option<NonZeroUsize>,
    /// Maximum number of concurrent connections per listener and peer.
    pub(crate) max_clients_per_peer: Option<NonZeroUsize>,
    /// Maximum size of all bodies that are held in memory as a whole, in MiB.
    pub(crate) max_buffered_mib: Option<NonZeroUsize>,
    /// Maximum lifetime that a client of the E2B API can request, in seconds.
    pub(crate) max_lifetime_sec: Option<NonZeroU32>,
    /// Days that the row of a sandbox is kept after its end; 0: for ever.
    pub(crate) retention_days: Option<u32>,
    /// Memory that may be promised to sandboxes, in percent of the usable memory.
    pub(crate) memory_commit_percent: Option<NonZeroU32>,
    /// Memory of the host that sandboxes never get, in MiB.
    pub(crate) memory_reserve_mb: Option<u32>,
    /// Disk space that guests leave free, in MiB.
    pub(crate) disk_reserve_mb: Option<u64>,
    /// Maximum disk space of all sandboxes and snapshots, in MiB.
    pub(crate) disk_budget_mb: Option<u64>,
    /// Maximum disk space of one sandbox, in MiB.
    pub(crate) sandbox_disk_budget_mb: Option<u64>,
    /// Data that a sandbox reads and writes on its disk, in MiB per second; 0: no limit.
    pub(crate) disk_mb_per_sec: Option<u32>,
    /// Disk requests of a sandbox per second; 0: no limit.
    pub(crate) disk_ops_per_sec: Option<u32>,
    /// Network traffic of a sandbox, in Mbit per second and direction; 0: no limit.
    pub(crate) network_mbit_per_sec: Option<u32>,
    /// Connections that a guest has open; 0: no limit.
    pub(crate) sandbox_connections: Option<u32>,
    /// Swap space of a sandbox, in MiB.
    pub(crate) sandbox_swap_mb: Option<u32>,
    /// Policy for a host without cgroup controllers.
    #[serde(default, deserialize_with = "load::cgroups_of_file")]
    pub(crate) cgroups: Option<CgroupPolicy>,
    /// Object store of snapshots: `s3://bucket/prefix`.
    pub(crate) store_url: Option<String>,
    /// URL of the object store's server.
    pub(crate) store_endpoint: Option<String>,
    /// Region of the object store.
    pub(crate) store_region: Option<String>,
    /// Maximum size of the cache of the object store, in MiB.
    pub(crate) store_cache_mb: Option<NonZeroU32>,
    /// Time for which a failed request to the object store is repeated, in seconds.
    pub(crate) store_retry_sec: Option<NonZeroU32>,
    /// Log filter in the syntax of `tracing`.
    pub(crate) log: Option<String>,
    /// Path of the guest agent's binary, for image builds.
    pub(crate) envd: Option<PathBuf>,
}

impl Layer {
    /// Returns this layer with missing values taken from `lower`.
    fn or(self, lower: Self) -> Self {
        Self {
            dir: self.dir.or(lower.dir),
            listen: self.listen.or(lower.listen),
            traffic_listen: self.traffic_listen.or(lower.traffic_listen),
            agent_listen: self.agent_listen.or(lower.agent_listen),
            agent_url: self.agent_url.or(lower.agent_url),
            images_dir: self.images_dir.or(lower.images_dir),
            api_url: self.api_url.or(lower.api_url),
            api_key: self.api_key.or(lower.api_key),
            database_url: self.database_url.or(lower.database_url),
            accel: self.accel.or(lower.accel),
            vmm: self.vmm.or(lower.vmm),
            firecracker: self.firecracker.or(lower.firecracker),
            kvm_check: self.kvm_check.or(lower.kvm_check),
            kernel_args: self.kernel_args.or(lower.kernel_args),
            cpu: self.cpu.or(lower.cpu),
            egress: self.egress.or(lower.egress),
            egress_limit: self.egress_limit.or(lower.egress_limit),
            egress_open: self.egress_open.or(lower.egress_open),
            egress_closed: self.egress_closed.or(lower.egress_closed),
            subnets: self.subnets.or(lower.subnets),
            dns: self.dns.or(lower.dns),
            max_clients: self.max_clients.or(lower.max_clients),
            max_clients_per_peer: self.max_clients_per_peer.or(lower.max_clients_per_peer),
            max_buffered_mib: self.max_buffered_mib.or(lower.max_buffered_mib),
            max_lifetime_sec: self.max_lifetime_sec.or(lower.max_lifetime_sec),
            retention_days: self.retention_days.or(lower.retention_days),
            memory_commit_percent: self.memory_commit_percent.or(lower.memory_commit_percent),
            memory_reserve_mb: self.memory_reserve_mb.or(lower.memory_reserve_mb),
            disk_reserve_mb: self.disk_reserve_mb.or(lower.disk_reserve_mb),
            disk_budget_mb: self.disk_budget_mb.or(lower.disk_budget_mb),
            sandbox_disk_budget_mb: self.sandbox_disk_budget_mb.or(lower.sandbox_disk_budget_mb),
            disk_mb_per_sec: self.disk_mb_per_sec.or(lower.disk_mb_per_sec),
            disk_ops_per_sec: self.disk_ops_per_sec.or(lower.disk_ops_per_sec),
            network_mbit_per_sec: self.network_mbit_per_sec.or(lower.network_mbit_per_sec),
            sandbox_connections: self.sandbox_connections.or(lower.sandbox_connections),
            sandbox_swap_mb: self.sandbox_swap_mb.or(lower.sandbox_swap_mb),
            cgroups: self.cgroups.or(lower.cgroups),
            store_url: self.store_url.or(lower.store_url),
            store_endpoint: self.store_endpoint.or(lower.store_endpoint),
            store_region: self.store_region.or(lower.store_region),
            store_cache_mb: self.store_cache_mb.or(lower.store_cache_mb),
            store_retry_sec: self.store_retry_sec.or(lower.store_retry_sec),
            log: self.log.or(lower.log),
            envd: self.envd.or(lower.envd),
        }
    }
}

/// Effective settings of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Data directory.
    pub(crate) dir: PathBuf,
    /// Listen address of the REST API.
    pub(crate) listen: SocketAddr,
    /// Listen address for requests to ports of sandboxes.
    pub(crate) traffic_listen: SocketAddr,
    /// Listen address of the host agent.
    pub(crate) agent_listen: SocketAddr,
    /// URL of the host agent, for a control plane that runs alone.
    pub(crate) agent_url: String,
    /// Directory of kernels, root file systems and templates.
    pub(crate) images_dir: PathBuf,
    /// URL of the REST API, for client commands.
    pub(crate) api_url: String,
    /// API key of client commands. If `None`, it is read from [`Settings::key_file`].
    pub(crate) api_key: Option<String>,
    /// Database URL of the control plane.
    pub(crate) database_url: String,
    /// Accelerator.
    pub(crate) accel: AccelChoice,
    /// VMM of VMs that boot.
    pub(crate) vmm: VmmChoice,
    /// Path of Firecracker; `None`: `firecracker` in `PATH`.
    pub(crate) firecracker: Option<PathBuf>,
    /// False to use KVM without checking that it runs a guest.
    pub(crate) kvm_check: bool,
    /// Arguments that are appended to the kernel command line of every guest.
    pub(crate) kernel_args: String,
    /// CPU model of VMs that boot; `None`: the default of the accelerator.
    pub(crate) cpu: Option<CpuModel>,
    /// Default egress policy of sandboxes.
    pub(crate) egress: Egress,
    /// Maximum egress that clients may request.
    pub(crate) egress_limit: EgressLimit,
    /// Ranges that clients may request although the limit does not permit them.
    pub(crate) egress_open: Vec<Ipv4Net>,
    /// Ranges that clients may not request.
    pub(crate) egress_closed: Vec<Ipv4Net>,
    /// Subnets of sandboxes; `None`: some that this host does not use.
    pub(crate) subnets: Option<Subnets>,
    /// Name servers of guests; `None`: those of the host.
    pub(crate) dns: Option<Vec<IpAddr>>,
    /// Limits of the control plane.
    pub(crate) limits: Limits,
    /// Limits of the host agent.
    pub(crate) host_limits: HostLimits,
    /// Object store of snapshots; `None`: there is none.
    pub(crate) object_store: Option<ObjectStoreConfig>,
    /// Log filter.
    pub(crate) log: String,
    /// Path of the guest agent's binary; `None`: `envd` in the directory of this program.
    pub(crate) envd: Option<PathBuf>,
}

impl Settings {
    /// Fills in the defaults.
    fn from_layer(layer: Layer) -> Self {
        let host_limits = host_limits(&layer);
        let object_store = object_store(&layer);
        let dir = layer.dir.map_or_else(|| DEFAULT_DIR.into(), absolute);
        let listen = layer
            .listen
            .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 8000).into());
        let limits = Limits::default();
        let agent_listen = layer
            .agent_listen
            .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 50051).into());
        Self {
            listen,
            traffic_listen: layer
                .traffic_listen
                .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 8001).into()),
            agent_listen,
            agent_url: layer.agent_url.unwrap_or_else(|| url_of(agent_listen)),
            images_dir: layer
                .images_dir
                .map_or_else(|| dir.join("images"), absolute),
            api_url: layer.api_url.unwrap_or_else(|| url_of(listen)),
            api_key: layer.api_key,
            database_url: layer
                .database_url
                .unwrap_or_else(|| sqlite_url(&dir.join("wrenn.db"))),
            accel: layer.accel.unwrap_or_default(),
            vmm: layer.vmm.unwrap_or_default(),
            firecracker: layer.firecracker.map(absolute),
            kvm_check: layer.kvm_check.unwrap_or(true),
            kernel_args: layer.kernel_args.unwrap_or_default(),
            cpu: layer.cpu,
            egress: layer.egress.unwrap_or(Egress::Deny),
            egress_limit: layer.egress_limit.unwrap_or_default(),
            egress_open: layer.egress_open.unwrap_or_default(),
            egress_closed: layer.egress_closed.unwrap_or_default(),
            subnets: layer.subnets,
            dns: layer.dns,
            limits: Limits {
                max_clients: layer
                    .max_clients
                    .map_or(limits.max_clients, NonZeroUsize::get),
                max_clients_per_peer: layer
                    .max_clients_per_peer
                    .map_or(limits.max_clients_per_peer, NonZeroUsize::get),
                max_buffered_bytes: layer
                    .max_buffered_mib
                    .map_or(limits.max_buffered_bytes, |mib| {
                        mib.get().saturating_mul(1024 * 1024)
                    }),
                retention: layer.retention_days.map_or(limits.retention, retention),
                max_lifetime_sec: layer
                    .max_lifetime_sec
                    .map_or(limits.max_lifetime_sec, NonZeroU32::get),
                ..limits
            },
            host_limits,
            object_store,
            log: layer.log.unwrap_or_else(|| "info".to_owned()),
            envd: layer.envd.map(absolute),
            dir,
        }
    }

    /// Returns the path of the first API key, a file of mode 0600.
    pub(crate) fn key_file(&self) -> PathBuf {
        self.dir.join("api-key")
    }

    /// Returns the path of the first API key in the format that E2B clients expect, a file of mode
    /// 0600.
    pub(crate) fn e2b_key_file(&self) -> PathBuf {
        self.dir.join("e2b-api-key")
    }

    /// Returns the path of the token between control plane and agent, a file of mode 0600.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir.join("agent-token")
    }
}

/// Default size of the cache of the object store, in MiB.
const STORE_CACHE_MB: u32 = 10 * 1024;

/// Default time for which a failed request to the object store is repeated, in seconds.
const STORE_RETRY_SEC: u32 = 120;

fn object_store(layer: &Layer) -> Option<ObjectStoreConfig> {
    let cache_mb = layer.store_cache_mb.map_or(STORE_CACHE_MB, NonZeroU32::get);
    let retry_sec = layer
        .store_retry_sec
        .map_or(STORE_RETRY_SEC, NonZeroU32::get);
    Some(ObjectStoreConfig {
        url: layer.store_url.clone()?,
        endpoint: layer.store_endpoint.clone(),
        region: layer.store_region.clone(),
        retry: Duration::from_secs(retry_sec.into()),
        cache_bytes: u64::from(cache_mb) * 1024 * 1024,
    })
}

/// Returns the limits of the host agent.
fn host_limits(layer: &Layer) -> HostLimits {
    let default = HostLimits::default();
    let sandbox = default.sandbox;
    HostLimits {
        memory_commit_percent: layer
            .memory_commit_percent
            .map_or(default.memory_commit_percent, NonZeroU32::get),
        memory_reserve_mib: layer
            .memory_reserve_mb
            .unwrap_or(default.memory_reserve_mib),
        disk_reserve_mib: layer.disk_reserve_mb,
        disk_budget_mib: layer.disk_budget_mb,
        sandbox_disk_budget_mib: layer.sandbox_disk_budget_mb,
        sandbox: SandboxLimits {
            disk_mib_per_sec: layer.disk_mb_per_sec.unwrap_or(sandbox.disk_mib_per_sec),
            disk_ops_per_sec: layer.disk_ops_per_sec.unwrap_or(sandbox.disk_ops_per_sec),
            network_mbit_per_sec: layer
                .network_mbit_per_sec
                .unwrap_or(sandbox.network_mbit_per_sec),
            connections: layer.sandbox_connections.unwrap_or(sandbox.connections),
            swap_mib: layer.sandbox_swap_mb.unwrap_or(sandbox.swap_mib),
        },
        cgroups: layer.cgroups.unwrap_or(default.cgroups),
    }
}

/// Returns the time that a number of days means; `None` for 0.
fn retention(days: u32) -> Option<Duration> {
    let time = Duration::from_secs(u64::from(days) * 24 * 3600);
    (days > 0).then_some(time)
}

/// Returns the absolute form of a path, which is valid in every process regardless of its working
/// directory.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// Returns the URL of a listener on this machine. An unspecified address is replaced by the
/// loopback address.
fn url_of(listen: SocketAddr) -> String {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, listen.port()))
}

/// Returns the URL of a SQLite database that is created if it does not exist.
fn sqlite_url(path: &Path) -> String {
    // Characters that would end the path in a URL.
    let path = path
        .display()
        .to_string()
        .replace('%', "%25")
        .replace('?', "%3F")
        .replace('#', "%23");
    format!("sqlite://{path}?mode=rwc")
}
