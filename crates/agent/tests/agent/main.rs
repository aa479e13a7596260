//! The agent on a host of the tests' own, with stand-ins for supervisors and guests.

#[path = "../support/agent.rs"]
mod agent;
#[path = "../support/private_host.rs"]
mod private_host;
#[path = "../support/world.rs"]
mod world;

mod adoption;
mod cold_boot;
mod failures;
mod freezing;
mod guest_calls;
mod host_network;
mod isolation;
mod lifecycle;
mod ownership;
mod policy;
mod quarantine;
mod tunnel;
mod upgrade;
