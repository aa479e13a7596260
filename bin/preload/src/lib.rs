//! `LD_PRELOAD` library that gives QEMU lazily loaded guest memory.
//!
//! QEMU maps the file of its memory backend shared. This library intercepts `open` of that path and
//! returns an inherited, read-only descriptor of the snapshot's memory. It also intercepts `mmap`
//! of that descriptor, in one of two modes:
//!
//! - `paged`: maps the memory *privately* and registers the mapping with userfaultfd. The page
//!   server is notified by Firecracker's handshake. QEMU still treats the memory as shared, so a
//!   migration with `x-ignore-shared` skips it.
//! - `anonymous`: maps private memory without content, for a cold boot. The same message, without a
//!   descriptor, reports the address of the mapping.
//!
//! Pages that the guest gives back (free page reporting) become zeros in this VM, and the memory
//! that they took is free; see `discard.rs`. The snapshot's memory is read-only and never changes.
//!
//! The library never lets QEMU run on any other memory: every failure is reported on standard error
//! and ends the process. Without `WRENN_MEMORY_PATH` in the environment (see `config.rs`) the
//! library does nothing. All work is done by direct system calls. The library calls nothing in the
//! C library that could call back, and takes no lock after startup.
//!
//! The userfaultfd stays open until the process ends. If the page server dies, threads that need a
//! page wait; they are not given zeros.
#![allow(
    unsafe_code,
    reason = "stands in for functions of the C library, whose arguments are plain pointers"
)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("only 64-bit Linux passes offsets and modes as this library takes them");

mod config;
mod discard;
mod map;
mod open;
mod report;

/// Runs when the library is loaded, before `main` and before the process has threads.
extern "C" fn start() {
    config::read();
}

#[used]
// SAFETY: the C library calls the entries of this section once, as functions that may ignore their
// arguments.
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;
