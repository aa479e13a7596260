//! Guest images: kernel, initramfs and root file systems, built from Debian packages without
//! Docker.
//!
//! [`ImageStore`] owns a directory:
//!
//! ```text
//! kernels/<key>/   vmlinux, initrd.img, modules.tar,    key: hash of the recipe's kernel part
//!                  manifest.json
//! rootfs/<key>/    rootfs.ext4, manifest.json           key: hash of packages, modules, envd,
//!                                                       guest files
//! templates/<name>.json                                 the kernel and rootfs of a template
//! cache/<key>.tar                                       package layers, to skip the bootstrap
//! tmp/<random>/                                         builds in progress
//! lock                                                  held by the builder
//! ```
//!
//! Everything is built in `tmp/`, synced, and renamed into place: a file under its final name is
//! complete. Nothing is modified afterwards, because paused and running sandboxes depend on it.
//! Files that a killed builder left in `tmp/` are removed by the next one.
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
