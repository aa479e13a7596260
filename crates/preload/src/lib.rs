//! A library for `LD_PRELOAD` that gives QEMU lazily loaded guest memory.
//!
//! QEMU maps the file of its memory backend shared. This library answers its `open` of that path with an inherited,
//! read-only descriptor of the snapshot's memory, and its `mmap` of it in one of two ways:
//!
//! - `paged`: a *private* mapping, registered with userfaultfd; the page server is told by Firecracker's handshake. QEMU
//!   still believes the memory to be shared, so a migration with `x-ignore-shared` skips it.
//! - `anonymous`: private memory without content, for a cold boot; the same message without a descriptor tells where it is.
//!
//! It never lets QEMU run on other memory than that: whatever fails is said on standard error and ends the process. Without
//! `WRENN_MEMORY_PATH` in its environment (see `config.rs`) it does nothing. Everything is a system call; nothing is looked up in
//! the C library that could call back, and no lock is taken after start.
//!
//! The userfaultfd stays open in the process to its end: if the page server dies, threads that need a page wait, and are
//! not given zeros.
#![allow(
    unsafe_code,
    reason = "stands in for functions of the C library, whose arguments are plain pointers"
)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("only 64-bit Linux passes offsets and modes as this library takes them");

mod config;
mod map;
mod open;
mod report;

/// Runs when the library is loaded, before `main` and before there are threads.
extern "C" fn start() {
    config::read();
}

#[used]
// SAFETY: the C library calls the entries of this section once, as functions that may ignore their arguments.
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
