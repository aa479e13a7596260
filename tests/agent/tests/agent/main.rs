//! The agent on a private host, with fake supervisors.

#[path = "../support/agent.rs"]
mod agent;
#[path = "../support/world.rs"]
mod world;

mod adoption;
mod cold_boot;
mod compaction;
mod disk_space;
mod failures;
mod firecracker;
mod guest_calls;
mod host_network;
mod isolation;
mod jail;
mod kill_points;
mod layers;
mod lifecycle;
mod lifetime;
mod limits;
mod live_snapshots;
mod logs;
mod memory;
mod moving;
mod ownership;
mod pause_failures;
mod policy;
mod quarantine;
mod tunnel;
mod upgrade;
mod vmm_versions;

use wrenn_test_host as private_host;
