//! Reseeding of the kernel's random number generator, for guests whose generator state may be
//! shared with other guests.
//!
//! Source: `random(4)` and the kernel's `include/uapi/linux/random.h`.

use std::{io, os::fd::AsRawFd as _};

/// Maximum amount of entropy per call, in bytes.
pub const MAX_ENTROPY_BYTES: usize = 256;

/// `struct rand_pool_info` with room for [`MAX_ENTROPY_BYTES`].
#[repr(C)]
struct RandPoolInfo {
    /// Entropy credited for the bytes, in bits.
    entropy_count: libc::c_int,
    /// Number of bytes in `buf`.
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY_BYTES],
}

/// `_IOW('R', 0x03, int[2])`
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)`
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Mixes `bytes` into the kernel's generator and reseeds the generator from its pool.
///
/// The kernel credits eight bits of entropy per byte. Needs `CAP_SYS_ADMIN`.
///
/// # Errors
/// `InvalidInput` if `bytes` is empty or longer than [`MAX_ENTROPY_BYTES`]; otherwise the kernel's
/// error.
pub fn reseed(bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() || bytes.len() > MAX_ENTROPY_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let count = |number: usize| libc::c_int::try_from(number).unwrap_or(libc::c_int::MAX);
    let mut pool = RandPoolInfo {
        entropy_count: count(bytes.len() * 8),
        buf_size: count(bytes.len()),
        buf: [0; MAX_ENTROPY_BYTES],
    };
    pool.buf[..bytes.len()].copy_from_slice(bytes);
    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/urandom")?;
    // SAFETY: the request takes a pointer to a `rand_pool_info` followed by `buf_size` bytes.
    // `pool` has this layout and outlives the call. The descriptor is open.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument. The descriptor is open.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_up_to_the_maximum_is_accepted() {
        reseed(&[7; 64]).expect("root may");
        assert!(reseed(&[]).is_err());
        assert!(reseed(&[0; MAX_ENTROPY_BYTES + 1]).is_err());
    }
}
