//! File system type of a path, and what it implies.

use std::{io, os::fd::AsFd, path::Path};

use rustix::fs::{StatFs, fstatfs, statfs};

/// Magic numbers of file systems that change without this kernel (`statfs(2)`): NFS, SMB, CIFS,
/// SMB2, FUSE.
const NETWORK: [u32; 5] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546];

/// Magic numbers of file systems whose files are values of the kernel. Names cannot be created or
/// replaced there.
const KERNEL: [u32; 13] = [
    0x9fa0,      // procfs
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0x4249_4e4d, // binfmt_misc
    0xde5e_81e4, // efivarfs
    0xf97c_ff8c, // selinuxfs
    0x0765_5821, // resctrl
    0x6e73_6673, // nsfs
];

/// Magic numbers of other file systems that store no owner or mode, or leave both to a server.
const NO_OWNERSHIP: [u32; 7] = [
    0x4d44,      // vfat, msdos
    0x2011_bab0, // exfat
    0x5346_544e, // ntfs
    0x7366_746e, // ntfs3
    0x4244,      // hfs
    0x0102_1997, // 9p
    0xcafe_4a11, // bpf
];

/// True if files at a path may change without this kernel's knowledge.
///
/// # Errors
/// Returns the kernel's error.
pub fn is_network(path: &Path) -> io::Result<bool> {
    Ok(NETWORK.contains(&magic(&statfs(path)?)))
}

/// True if the file at a path is a value of the kernel, which can only be written in place.
#[must_use]
pub fn is_kernel(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| KERNEL.contains(&magic(&found)))
}

/// Returns the result of a change of owner or mode. The kernel's rejection is ignored on file
/// systems that have no owners or modes. `changed` is the open file that was changed.
///
/// # Errors
/// Returns the error of the change on other file systems, and errors that are no rejection.
pub fn tolerate(result: io::Result<()>, changed: impl AsFd) -> io::Result<()> {
    result.or_else(|error| {
        let kind = fstatfs(changed).map(|found| magic(&found));
        if kind.is_ok_and(|kind| is_tolerable(&error, kind)) {
            return Ok(());
        }
        Err(error)
    })
}

/// Same as [`tolerate`], for the entry at a path.
///
/// # Errors
/// Same as [`tolerate`].
pub fn tolerate_at(result: io::Result<()>, changed: &Path) -> io::Result<()> {
    result.or_else(|error| {
        let kind = statfs(changed).map(|found| magic(&found));
        if kind.is_ok_and(|kind| is_tolerable(&error, kind)) {
            return Ok(());
        }
        Err(error)
    })
}

fn is_tolerable(error: &io::Error, kind: u32) -> bool {
    let has_no_owners = [&KERNEL[..], &NO_OWNERSHIP, &NETWORK]
        .iter()
        .any(|list| list.contains(&kind));
    let is_rejection = matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::Unsupported
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::ReadOnlyFilesystem
    );
    has_no_owners && is_rejection
}

fn magic(found: &StatFs) -> u32 {
    // The kernel's type is signed and wider than the numbers.
    u32::try_from(found.f_type & 0xffff_ffff).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn only_a_rejection_by_a_file_system_without_owners_is_tolerated() {
        const EXT4: u32 = 0xef53;
        const TMPFS: u32 = 0x0102_1994;
        let is_tolerable = |errno: Errno, kind| is_tolerable(&errno.into(), kind);
        for kind in [0x9fa0, 0x4d44, 0x6573_5546, 0x6969] {
            for errno in [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL] {
                assert!(is_tolerable(errno, kind), "{errno} {kind:x}");
            }
            assert!(!is_tolerable(Errno::IO, kind), "{kind:x}");
            assert!(!is_tolerable(Errno::NOSPC, kind), "{kind:x}");
        }
        for kind in [EXT4, TMPFS] {
            assert!(!is_tolerable(Errno::PERM, kind), "{kind:x}");
        }
    }

    #[test]
    fn kernel_files_are_told_from_others() {
        assert!(is_kernel(Path::new("/proc/sys/kernel/ostype")));
        assert!(!is_kernel(Path::new("/etc/passwd")));
        assert!(!is_kernel(Path::new("/no/such")));
    }

    #[test]
    fn an_error_elsewhere_is_not_tolerated() {
        let dir = tempfile::tempdir().expect("a directory");
        let denied = || Err(Errno::PERM.into());
        tolerate_at(denied(), dir.path()).expect_err("an ordinary file system");
        tolerate_at(denied(), Path::new("/proc/self")).expect("no owners");
        let file = std::fs::File::open("/proc/self/status").expect("there");
        tolerate(denied(), &file).expect("no owners");
        tolerate(Ok(()), &file).expect("no error");
    }
}
