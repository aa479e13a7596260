//! The control plane against a fake host agent: no machine is booted here.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod support;

mod basics;
