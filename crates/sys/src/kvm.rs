//! Asking the kernel whether it can make a virtual machine here.
//!
//! `/dev/kvm` also exists on machines whose processor offers no hardware virtualization, so the only honest question is
//! to make a machine with one processor. Both are freed when their descriptors close, at the end of the call.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

/// The only version that the interface ever had.
const API_VERSION: i32 = 12;

// `_IO(0xAE, n)` of <linux/kvm.h>: no direction, no size.
const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;

/// Why no virtual machine could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmUnusable {
    /// The device cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// The device.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not KVM, or a version that nobody knows.
    #[error("KVM answers with version {0}, expected {API_VERSION}")]
    Version(i32),
    /// The kernel refused a machine.
    #[error("KVM cannot make a virtual machine")]
    CreateVm(#[source] io::Error),
    /// The kernel refused a processor.
    #[error("KVM cannot make a virtual processor")]
    CreateVcpu(#[source] io::Error),
}

/// Makes a machine with one processor by `device` (`/dev/kvm`), and throws both away.
///
/// # Errors
/// Names the step that failed.
pub fn probe(device: &Path) -> Result<(), KvmUnusable> {
    let kvm = File::options()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|source| KvmUnusable::Open {
            path: device.display().to_string(),
            source,
        })?;
    match ioctl(kvm.as_fd(), KVM_GET_API_VERSION) {
        Ok(API_VERSION) => {}
        Ok(version) => return Err(KvmUnusable::Version(version)),
        Err(_) => return Err(KvmUnusable::Version(-1)),
    }
    let vm = ioctl_fd(kvm.as_fd(), KVM_CREATE_VM).map_err(KvmUnusable::CreateVm)?;
    ioctl_fd(vm.as_fd(), KVM_CREATE_VCPU).map_err(KvmUnusable::CreateVcpu)?;
    Ok(())
}

/// One of the three requests above, with the argument 0.
fn ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: `fd` is open while it is borrowed, and each request that this module passes takes a plain integer (0 is
    // "the default type" and "processor 0"), so the kernel reads and writes no memory of ours.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

/// A request whose answer is a new descriptor.
fn ioctl_fd(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<OwnedFd> {
    let raw = ioctl(fd, request)?;
    // SAFETY: both callers pass a request that answers with a descriptor made for this call, which nobody else has.
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
    fn a_device_that_is_not_kvm_is_refused() {
        assert!(matches!(
            probe(Path::new("/dev/null")),
            Err(KvmUnusable::Version(-1))
        ));
    }
}
