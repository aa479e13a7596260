//! Tests of the control plane against a fake host agent. No VM is booted.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

#[macro_use]
mod support;

mod bad_input;
mod basics;
mod browsers;
mod buffers;
mod clock_steps;
mod commands;
mod creating;
mod databases;
mod documents;
mod e2b_copies;
mod e2b_creating;
mod e2b_lists;
mod e2b_living;
mod e2b_requests;
mod e2b_resuming;
mod endings;
mod hosts;
mod keys;
mod lifetime;
mod pausing;
mod races;
mod reaping;
mod reconciling;
mod resuming;
mod retention;
mod snapshots;
mod teams;
mod terminals;
mod traffic;
mod transfers;
