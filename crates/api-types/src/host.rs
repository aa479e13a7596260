//! Server and host.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_model::Boundary;

/// Response of `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// Version of the server.
    pub version: String,
    /// Isolation of sandboxes that are created now. Absent if the host has not answered yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
}

/// Isolation of a virtual machine from its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Isolation {
    /// Accelerator: `kvm` (hardware virtualization) or `tcg` (software emulation).
    pub accel: String,
    /// True if the virtual machine is a security boundary. False with software emulation.
    pub security_boundary: bool,
    /// Warning, if the virtual machine is not a security boundary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Isolation {
    /// Describes an accelerator; `None` if it is not known.
    #[must_use]
    pub fn of_accel(accel: String) -> Option<Self> {
        if accel.is_empty() {
            return None;
        }
        let boundary = Boundary::of_accel(&accel);
        Some(Self {
            accel,
            security_boundary: boundary == Boundary::Vm,
            note: boundary.note().map(str::to_owned),
        })
    }
}

/// Host that runs sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Id of the host agent's data directory.
    pub id: String,
    /// Id of the control plane's database.
    pub installation_id: String,
    /// Version of the host agent.
    pub version: String,
    /// Accelerator: `kvm` (hardware virtualization) or `tcg` (software emulation).
    pub accel: String,
    /// Isolation of sandboxes that are created now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Kind and version of the VMM of virtual machines that boot, such as `qemu 7.2.22`. Empty if
    /// the host agent does not report it.
    #[serde(default)]
    pub vmm: String,
    /// CPU model of virtual machines that boot, in QEMU's notation.
    #[serde(default)]
    pub cpu: String,
    /// Number of processors.
    pub cpu_count: u32,
    /// Total memory, in MiB.
    pub memory_total_mb: u64,
    /// Available memory, in MiB.
    pub memory_available_mb: u64,
    /// Memory that is promised to sandboxes that are not paused, in MiB.
    #[serde(default)]
    pub memory_promised_mb: u64,
    /// Memory that may be promised, in MiB. More than the host has if over-commit is configured.
    #[serde(default)]
    pub memory_promise_limit_mb: u64,
    /// Free disk space of the data directory, in MiB.
    pub disk_free_mb: u64,
    /// Number of sandboxes, including paused ones.
    pub sandboxes: u32,
    /// Boots since the host agent started.
    pub boots: BootCounts,
    /// Number of times since the host agent started that rules of the host's packet filter or its
    /// forwarding were restored, because another program had changed them.
    pub network_restored: u64,
    /// Templates without a usable template snapshot. Sandboxes that are created from them boot from
    /// disk, which takes seconds. `wrenn image build` makes new template snapshots.
    #[serde(default)]
    pub cold_templates: Vec<ColdTemplate>,
}

/// Template without a usable template snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ColdTemplate {
    /// Name of the template.
    pub name: String,
    /// Reason why it cannot be restored.
    pub reason: String,
}

/// Number of boots from disk since the host agent started. A restore from a snapshot is not a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootCounts {
    /// Boots that were started.
    pub started: u64,
    /// Attempts that were made because the previous attempt of the same boot made no progress.
    pub retried: u64,
    /// Boots that failed because their last attempt made no progress.
    pub stalled: u64,
}
