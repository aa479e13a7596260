//! The client with a real guest agent, which runs in the test's process: its processes and files
//! are the host's, and its commands run as root.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod files;
mod processes;
mod support;
