//! TAP devices: network interfaces whose other end is a file descriptor.
//!
//! Source of the constants and of `struct ifreq`: `linux/if_tun.h`, `linux/if.h`, `netdevice(7)`.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// `_IOW('T', 203, int)`.
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// `struct ifreq` as `TUNSETIFF` reads it: 16 bytes of name, then flags; 40 bytes in total.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    _padding: [u8; 22],
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "three flags of the lower 15 bits (linux/if_tun.h)"
)]
const FLAGS: libc::c_short =
    (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;

const _: () = assert!(size_of::<IfReq>() == size_of::<libc::ifreq>());

/// Opens the TAP device `name` in the calling thread's network namespace, and creates the device if
/// it does not exist.
///
/// Packets carry a virtio-net header (`IFF_VNET_HDR`) and no packet information (`IFF_NO_PI`). A
/// device created here is removed when the descriptor is closed, unless [`make_persistent`] was
/// called.
///
/// # Errors
/// The operating system's error; `InvalidInput` if the name is empty, longer than 15 bytes or
/// contains a NUL byte; `ResourceBusy` if another descriptor is attached.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = IfReq {
        name: [0; libc::IFNAMSIZ],
        flags: FLAGS,
        _padding: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`. `request` has the size of that
    // structure (asserted above) and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}

/// Keeps the device when its descriptor is closed. The device is then removed with its network
/// namespace.
///
/// # Errors
/// The operating system's error.
pub fn make_persistent(tap: &OwnedFd) -> io::Result<()> {
    let on: libc::c_ulong = 1;
    // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory of this process.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, on) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_name_of_invalid_length_is_rejected() {
        for name in ["", "sixteen-letters-", "nul\0"] {
            let error = open(name).expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
