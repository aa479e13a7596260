//! What guests boot from: kernel, initramfs and root file systems, built from Debian packages without Docker.
//!
//! [`ImageStore`] owns a directory:
//!
//! ```text
//! kernels/<key>/   vmlinux, initrd.img, manifest.json    key: hash of the kernel's part of the recipe
//! rootfs/<key>/    rootfs.ext4, manifest.json            key: hash of packages, envd and guest files
//! templates/<name>.json                                  which of them a template is made of
//! cache/<key>.tar                                        package layers, to rebuild without a bootstrap
//! tmp/<random>/                                          what is being built
//! lock                                                   held by the one who builds
//! ```
//!
//! Everything is built below `tmp/`, synced, and renamed into place: what has its final name is whole. Nothing is edited
//! afterwards, because paused and running sandboxes stand on it. What a dead builder left in `tmp/` is removed by the next.
#![forbid(unsafe_code)]

mod build;
mod bzimage;
mod cmdline;
mod cpio;
mod recipe;
mod sources;
mod store;

pub use build::{BuildError, BuildOptions, BuildReport, CommandError, Progress, Stop, build};
pub use bzimage::{KernelFormatError, extract_vmlinux};
pub use cmdline::kernel_args;
pub use recipe::Recipe;
pub use store::{ImageStore, StoreError, StoreLock, Template};
