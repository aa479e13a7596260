//! Thin, typed wrappers over Linux facilities that need `unsafe`, over `/proc/meminfo`, and over
//! programs that run for a limited time.
//!
//! Every other crate forbids unsafe code and calls this one. File descriptors cross the API as
//! `OwnedFd` and `BorrowedFd`, never as numbers. Each unsafe block names the invariant that makes
//! it sound.
#![allow(
    unsafe_code,
    reason = "this crate is the one place where unsafe code lives"
)]

pub mod failpoint;
pub mod heap;
pub mod kvm;
pub mod mapping;
pub mod meminfo;
pub mod oom;
pub mod pagemap;
pub mod pinned;
pub mod program;
pub mod random;
pub mod scm;
pub mod session;
pub mod spawn;
pub mod tap;
pub mod tsc;
pub mod uffd;
