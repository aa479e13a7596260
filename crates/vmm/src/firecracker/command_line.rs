//! Start parameters of Firecracker: its arguments, and the files and devices of its jail.

use std::path::{Path, PathBuf};

use wrenn_jail::{self as jail, JailFile, ProcessLimits};
use wrenn_model::MachineSize;

use super::client::API_SOCKET;
use crate::{MachineConfig, Start};

/// Size of a file beyond the largest of disk and memory, MiB.
const FILE_OVERHEAD_MIB: u64 = 64;

/// Number of threads besides those of the virtual CPUs: the main thread and that of the API, and
/// room for those of later versions.
const OTHER_THREADS: u64 = 16;

/// Returns Firecracker's arguments.
///
/// Until `PUT /logger`, Firecracker logs to its standard output, which is the guest's console. Only
/// errors are logged until then. They end the process, and are on its standard error as well. Its
/// filter of system calls is on unless an argument turns it off.
pub(super) fn command_line(exe: &Path, config: &MachineConfig) -> Vec<String> {
    let socket = format!("{}/{API_SOCKET}", jail::OWN_SOCKETS);
    let exe = exe.to_string_lossy();
    let line = [
        exe.as_ref(),
        "--id",
        &config.name,
        "--api-sock",
        &socket,
        "--level",
        "Error",
    ];
    line.map(str::to_owned).to_vec()
}

/// Returns the files of the jail. A restored guest needs no kernel.
pub(super) fn jail_files(config: &MachineConfig) -> Vec<JailFile> {
    let file = |source: &Path, target: &str, writable| JailFile {
        source: source.to_owned(),
        target: target.into(),
        writable,
        executable: false,
    };
    let mut files = vec![file(&config.disk, jail::RAW_DISK, true)];
    if config.start == Start::Boot {
        files.push(file(&config.kernel, jail::KERNEL, false));
        files.push(file(&config.initrd, jail::INITRD, false));
    }
    files
}

/// Returns the devices of the jail. Firecracker opens `/dev/userfaultfd` itself if it restores a
/// guest whose memory is paged.
pub(super) fn jail_devices(is_paged: bool) -> Vec<PathBuf> {
    let mut devices = vec!["/dev/null", "/dev/urandom", "/dev/kvm", "/dev/net/tun"];
    if is_paged {
        devices.push("/dev/userfaultfd");
    }
    devices.into_iter().map(PathBuf::from).collect()
}

/// Returns the resource limits of Firecracker for a VM of this size.
pub(super) fn process_limits(size: MachineSize) -> ProcessLimits {
    let mib = u64::from(size.disk_mib).max(u64::from(size.memory_mib));
    ProcessLimits {
        file_bytes: (mib + FILE_OVERHEAD_MIB) * 1024 * 1024,
        threads: u64::from(size.vcpus) + OTHER_THREADS,
        ..ProcessLimits::default()
    }
}

#[cfg(test)]
mod tests {
    use wrenn_proto::{
        machine::{MachineProfile, VmmKind},
        supervise::{Accel, DiskRate},
    };

    use super::*;

    fn config(start: Start) -> MachineConfig {
        MachineConfig {
            name: "sb-0123abcd".into(),
            accel: Accel::Kvm,
            cpu: "host".parse().expect("valid"),
            machine: MachineProfile::current(VmmKind::Firecracker),
            size: MachineSize {
                vcpus: 2,
                memory_mib: 512,
                disk_mib: 5120,
            },
            kernel: "/host/kernel".into(),
            initrd: "/host/initrd".into(),
            kernel_args: "quiet".into(),
            disk: "/host/disk".into(),
            disk_layers: vec!["/host/layer".into()],
            base_disk: "/host/base".into(),
            work_dir: "/host/work".into(),
            metadata: None,
            guest_mac: "02:FC:00:00:00:05".into(),
            netns: "/n".into(),
            cgroups: vec![],
            uid: 1,
            disk_rate: DiskRate::default(),
            start,
        }
    }

    #[test]
    fn firecracker_keeps_its_filter_and_its_console_clean() {
        let line = command_line(Path::new("/opt/firecracker"), &config(Start::Boot));
        assert_eq!(
            line,
            [
                "/opt/firecracker",
                "--id",
                "sb-0123abcd",
                "--api-sock",
                "/tmp/fc-vm/sockets/own/api.sock",
                "--level",
                "Error",
            ]
        );
    }

    #[test]
    fn jail_shows_the_raw_disk_and_a_kernel_only_to_a_guest_that_boots() {
        let visible = |start| {
            let files = jail_files(&config(start));
            let pair = |file: &JailFile| {
                let path = |path: &PathBuf| path.display().to_string();
                (path(&file.source), path(&file.target), file.writable)
            };
            files.iter().map(pair).collect::<Vec<_>>()
        };
        let file =
            |source: &str, target: &str, writable| (source.to_owned(), target.to_owned(), writable);
        let disk = file("/host/disk", "/tmp/fc-vm/rootfs.ext4", true);
        assert_eq!(visible(Start::Restore), std::slice::from_ref(&disk));
        let kernel = file("/host/kernel", "/tmp/fc-vm/vmlinux", false);
        let initrd = file("/host/initrd", "/tmp/fc-vm/initrd.img", false);
        assert_eq!(visible(Start::Boot), [disk, kernel, initrd]);
    }

    #[test]
    fn jail_has_the_device_for_page_faults_only_if_memory_is_paged() {
        let device = Path::new("/dev/userfaultfd");
        let has = |is_paged| jail_devices(is_paged).iter().any(|path| path == device);
        assert!(has(true) && !has(false));
        for required in ["/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/urandom"] {
            assert!(jail_devices(false).contains(&required.into()), "{required}");
        }
    }

    #[test]
    fn a_vmm_may_write_files_of_the_size_of_disk_and_memory() {
        let limits = |memory_mib, disk_mib| {
            let size = MachineSize {
                vcpus: 2,
                memory_mib,
                disk_mib,
            };
            process_limits(size)
        };
        assert_eq!(limits(512, 5120).file_bytes, (5120 + 64) << 20);
        // The memory file of a guest with more memory than disk.
        assert_eq!(limits(8192, 5120).file_bytes, (8192 + 64) << 20);
        assert_eq!(limits(512, 5120).threads, 18);
    }
}
