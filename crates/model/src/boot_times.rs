//! Durations of the steps of a boot.

use serde::{Deserialize, Serialize};

/// Time from the start of the create on the host to the end of each step, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct BootTimes {
    /// Disk, network and cgroups were ready.
    pub prepared_ms: u32,
    /// The VMM sent its first response.
    pub vmm_started_ms: u32,
    /// The guest kernel started its first program.
    pub kernel_ms: u32,
    /// The guest's init started the guest agent.
    pub init_ms: u32,
    /// The guest agent sent its first response.
    pub envd_ms: u32,
}
