//! Limit of the disk requests of a group. It backs up the limit that QEMU applies to its guest: a
//! compromised VMM does not apply it.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use rustix::fs::{major, minor};

use crate::limits::SandboxLimits;

/// Limit for one block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IoLimit {
    /// Device numbers, `major:minor`.
    pub(super) device: String,
    /// Bytes per second, in each direction; 0 for no limit.
    pub(super) bytes: u64,
    /// Requests per second, in each direction; 0 for no limit.
    pub(super) ops: u64,
}

impl IoLimit {
    /// Returns the limit for the device that holds `data_dir`; `None` without a limit, or if the
    /// file system has no block device of its own (overlayfs, btrfs, tmpfs, network file systems).
    pub(crate) fn of(limits: &SandboxLimits, data_dir: &Path) -> Option<Self> {
        let bytes = u64::from(limits.disk_mib_per_sec) * 1024 * 1024;
        let ops = u64::from(limits.disk_ops_per_sec);
        if bytes == 0 && ops == 0 {
            return None;
        }
        let number = fs::metadata(data_dir).ok()?.dev();
        let device = whole_disk(Path::new("/sys/dev/block"), major(number), minor(number))?;
        Some(Self { device, bytes, ops })
    }

    /// Returns the values for `io.max` of cgroup v2.
    pub(super) fn v2(&self) -> String {
        let limit = |name: &str, value: u64| match value {
            0 => String::new(),
            value => format!(" r{name}={value} w{name}={value}"),
        };
        format!(
            "{}{}{}",
            self.device,
            limit("bps", self.bytes),
            limit("iops", self.ops)
        )
    }
}

/// Returns the numbers of the disk that contains a block device. Limits apply to whole disks, not
/// to partitions.
fn whole_disk(sys: &Path, major: u32, minor: u32) -> Option<String> {
    let device = sys.join(format!("{major}:{minor}"));
    let number = |dir: &Path| Some(fs::read_to_string(dir.join("dev")).ok()?.trim().to_owned());
    if device.join("partition").exists() {
        let path = fs::canonicalize(&device).ok()?;
        return number(path.parent()?);
    }
    number(&device)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_partition_is_that_of_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let part = sys.path().join("devices/sda/sda1");
        fs::create_dir_all(&part).unwrap();
        fs::write(part.join("partition"), "1\n").unwrap();
        fs::write(part.join("dev"), "8:1\n").unwrap();
        fs::write(part.parent().unwrap().join("dev"), "8:0\n").unwrap();
        let block = sys.path().join("block");
        fs::create_dir(&block).unwrap();
        std::os::unix::fs::symlink(&part, block.join("8:1")).unwrap();
        std::os::unix::fs::symlink(part.parent().unwrap(), block.join("8:0")).unwrap();
        for minor in [0, 1] {
            assert_eq!(whole_disk(&block, 8, minor).as_deref(), Some("8:0"));
        }
        assert_eq!(whole_disk(&block, 0, 30), None);
    }

    #[test]
    fn a_limit_of_zero_is_no_limit() {
        let limit = |bytes, ops| IoLimit {
            device: "8:0".to_owned(),
            bytes,
            ops,
        };
        assert_eq!(limit(5, 7).v2(), "8:0 rbps=5 wbps=5 riops=7 wiops=7");
        assert_eq!(limit(5, 0).v2(), "8:0 rbps=5 wbps=5");
        let none = SandboxLimits {
            disk_mib_per_sec: 0,
            disk_ops_per_sec: 0,
            ..SandboxLimits::default()
        };
        assert_eq!(IoLimit::of(&none, Path::new("/")), None);
    }
}
