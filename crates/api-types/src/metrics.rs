//! Resource usage of a sandbox.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Response of `GET /v1/sandboxes/{id}/metrics`: current usage of a running sandbox, last known
/// usage of a paused sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Time of the measurement, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Number of virtual CPUs.
    pub cpu_count: u32,
    /// Used share of all virtual CPUs, in percent.
    pub cpu_pct: f64,
    /// Used memory, in bytes.
    pub mem_bytes: u64,
    /// Total memory, in bytes.
    pub mem_total_bytes: u64,
    /// Used disk space, in bytes.
    pub disk_bytes: u64,
    /// Total disk space, in bytes.
    pub disk_total_bytes: u64,
    /// Usage within the requested range, oldest point first: one point per 15 s for the last hour,
    /// one per 5 min before that.
    #[serde(default)]
    pub points: Vec<MetricsPoint>,
}

/// Usage of a sandbox at one point in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricsPoint {
    /// Time of the measurement, in seconds since 1970.
    pub timestamp_unix: i64,
    /// Used share of all virtual CPUs, in percent.
    pub cpu_pct: f64,
    /// Used memory, in bytes.
    pub mem_bytes: u64,
    /// Used disk space, in bytes.
    pub disk_bytes: u64,
}
