//! Probes that test whether the kernel can create a virtual machine on this host, and run it.
//!
//! `/dev/kvm` also exists on machines whose processor has no hardware virtualization. On some of
//! them, KVM interprets the code of a guest's kernel, about a thousand times slower than hardware,
//! and no stock kernel boots. The only reliable test is to run code in the kernel mode of a guest.
//! VM and vCPU are freed when their descriptors close, at the end of the call.

mod tiny_guest;

pub use tiny_guest::{TinyGuestError, run_tiny_guest};

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

/// The only API version that KVM has ever had.
const API_VERSION: i32 = 12;

// `_IO(0xAE, n)` of <linux/kvm.h>: no direction, no size.
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;

/// Reason why no virtual machine could be created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmUnavailable {
    /// The device cannot be opened.
    #[error("failed to open {path}")]
    Open {
        /// Path of the device.
        path: String,
        /// Error returned by the kernel.
        source: io::Error,
    },
    /// The device is not KVM, or has an unknown API version.
    #[error("unsupported KVM API version {0}, expected {API_VERSION}")]
    Version(i32),
    /// The kernel rejected the creation of a VM.
    #[error("failed to create a virtual machine with KVM")]
    CreateVm(#[source] io::Error),
    /// The kernel rejected the creation of a vCPU.
    #[error("failed to create a vCPU with KVM")]
    CreateVcpu(#[source] io::Error),
}

/// Creates a VM with one vCPU through `device` (`/dev/kvm`) and discards both.
///
/// # Errors
/// The error names the failed step.
pub fn probe(device: &Path) -> Result<(), KvmUnavailable> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|source| KvmUnavailable::Open {
            path: device.display().to_string(),
            source,
        })?;
    match ioctl(kvm.as_fd(), KVM_GET_API_VERSION) {
        Ok(API_VERSION) => {}
        Ok(version) => return Err(KvmUnavailable::Version(version)),
        Err(_) => return Err(KvmUnavailable::Version(-1)),
    }
    let vm = ioctl_fd(kvm.as_fd(), KVM_CREATE_VM).map_err(KvmUnavailable::CreateVm)?;
    ioctl_fd(vm.as_fd(), KVM_CREATE_VCPU).map_err(KvmUnavailable::CreateVcpu)?;
    Ok(())
}

/// Sends one of the three requests above with the argument 0.
fn ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: `fd` is open while it is borrowed. Each request of this module takes a plain integer
    // (0 means "the default type" and "processor 0"), so the kernel reads and writes no memory of
    // this process.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

/// Sends a request that returns a new descriptor.
fn ioctl_fd(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<OwnedFd> {
    let raw = ioctl(fd, request)?;
    // SAFETY: both callers pass a request that returns a descriptor created for this call. No other
    // owner of that descriptor exists.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named() {
        let error = probe(Path::new("/dev/no-such-device")).expect_err("there is none");
        assert!(error.to_string().contains("/dev/no-such-device"), "{error}");
    }

    #[test]
    fn device_other_than_kvm_is_rejected() {
        assert!(matches!(
            probe(Path::new("/dev/null")),
            Err(KvmUnavailable::Version(-1))
        ));
    }
}
