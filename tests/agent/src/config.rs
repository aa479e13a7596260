//! Settings of the agents under test.

use std::{
    io,
    path::{Path, PathBuf},
};

use wrenn_agent::{AgentConfig, BootPolicy, EgressCeiling, HostLimits, VmmConfig};
use wrenn_proto::supervise::Accel;

/// Returns the settings of an agent under test, in the process of the test or in one of its own: an
/// agent adopts the sandboxes of the one before it, so both kinds have the same settings.
///
/// # Errors
/// Never for the literals in it.
pub fn agent_config(data_dir: &Path, token: &str, wrenn_exe: PathBuf) -> io::Result<AgentConfig> {
    Ok(AgentConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        data_dir: data_dir.to_owned(),
        images_dir: data_dir.join("images"),
        token: token.to_owned(),
        vmm: VmmConfig::qemu(Accel::Tcg),
        cpu: "max".parse().map_err(io::Error::other)?,
        default_egress: false,
        // The external network of most tests.
        egress_ceiling: EgressCeiling {
            open: vec!["10.99.0.0/24".parse().map_err(io::Error::other)?],
            ..EgressCeiling::default()
        },
        subnets: None,
        wrenn_exe,
        dns: Vec::new(),
        snapshots_dir: None,
        template_snapshots: true,
        prefetch: true,
        keep_page_cache: false,
        boot: BootPolicy::default(),
        limits: HostLimits::default(),
        object_store: None,
    })
}
