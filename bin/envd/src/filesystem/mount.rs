//! File system type of a path.

use std::{io, path::Path};

/// Magic numbers of file systems that change without this kernel (`statfs(2)`): NFS, SMB, CIFS,
/// SMB2, FUSE.
const NETWORK: [u32; 5] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546];

/// True if files at a path may change without this kernel's knowledge.
///
/// # Errors
/// Returns the kernel's error.
pub fn is_network(path: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(path)?.f_type;
    // The kernel's type is signed and wider than the numbers.
    let low = u32::try_from(kind & 0xffff_ffff).unwrap_or(0);
    Ok(NETWORK.contains(&low))
}
