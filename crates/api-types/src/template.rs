//! Templates and snapshots.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/snapshots`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Id of the sandbox, which must be running or paused. Its status does not change.
    pub sandbox_id: String,
    /// Name of the new template; default `template-` and 20 letters and digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Template, as returned by `GET /v1/templates` and `GET /v1/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Template name.
    pub name: String,
    /// `base`: an image that sandboxes boot from. `snapshot`: a snapshot of a sandbox that other
    /// sandboxes start from; they have its sizes.
    #[serde(rename = "type")]
    pub kind: String,
    /// Number of virtual CPUs of a sandbox whose create request does not specify it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory of a sandbox whose create request does not specify it, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Disk size, in MiB; absent if the create request can choose it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mb: Option<u32>,
    /// Generation of the memory: the number of earlier snapshots that it derives from. Only for
    /// type `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// Size on the host's disk, in bytes.
    pub size_bytes: u64,
    /// Time of creation.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}
