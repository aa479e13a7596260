//! The control plane against a fake host agent: no machine is booted here.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod support;

mod bad_input;
mod basics;
mod commands;
mod creating;
mod documents;
mod pausing;
mod races;
mod reconciling;
mod snapshots;
mod transfers;
