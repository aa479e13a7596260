//! Scenarios in real VMs, one program for all: each program is linked by itself.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod bad_input;
mod boots;
mod call_faults;
mod cli;
mod cpu;
mod docker;
mod e2b;
mod examples;
mod exec;
mod faults;
mod files;
mod guest;
mod jail;
mod leaks;
mod lifecycle;
mod lifetime;
mod live_connections;
mod memory;
mod network;
mod object_store;
mod pause_faults;
mod snapshots;
mod upgrade;
mod vmm;
mod vmm_versions;
mod wrenn_client;
mod wrong_database;
