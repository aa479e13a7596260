//! Start parameters of QEMU: its arguments, its environment, and the files and devices of its jail.

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use wrenn_jail::{self as jail, JailFile, ProcessLimits};
use wrenn_model::MachineSize;
use wrenn_proto::{
    machine::{Device, MachineType},
    supervise::Accel,
};

use crate::{MachineConfig, Start};

/// Name of the disk's topmost block node at start.
pub(super) const ROOT_NODE: &str = "root";

/// Path of the guest's disk in QEMU's object tree. It is the first device of the command line.
pub(super) const DISK_DEVICE: &str = "/machine/peripheral-anon/device[0]";

/// Size of the translation cache under TCG, MiB. QEMU's default is 1 GiB, which is too much for
/// many sandboxes on one host.
const TCG_CACHE_MIB: u32 = 128;

/// Machine type `microvm`. It has no versions. The options are part of it: a changed option would
/// be another machine, which cannot load the states of this one.
const MICROVM: &str = "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on";

/// Size of a disk's file beyond the disk and its metadata, MiB.
const FILE_OVERHEAD_MIB: u64 = 64;

/// Maximum number of threads besides those of the virtual CPUs. QEMU uses up to 64 for disk
/// requests.
const OTHER_THREADS: u64 = 128;

/// Descriptors that QEMU inherits and refers to by number.
pub(super) struct Inherited<'a> {
    pub(super) memory: &'a OwnedFd,
    pub(super) pager: &'a OwnedFd,
    pub(super) userfaultfd: Option<&'a OwnedFd>,
    pub(super) tap: &'a OwnedFd,
    pub(super) qmp: &'a OwnedFd,
}

impl Inherited<'_> {
    /// Returns the numbers of all descriptors.
    pub(super) fn numbers(&self) -> Vec<RawFd> {
        let all = [self.memory, self.pager, self.tap, self.qmp];
        let all = all.into_iter().chain(self.userfaultfd);
        all.map(AsRawFd::as_raw_fd).collect()
    }
}

/// Returns QEMU's arguments. `docs/decisions` records the reasons for the less obvious ones.
pub(super) fn command_line(exe: &Path, config: &MachineConfig, fds: &Inherited<'_>) -> Vec<String> {
    let memory = config.size.memory_mib;
    let accel = match config.accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg => format!("tcg,tb-size={TCG_CACHE_MIB}"),
    };
    let machine = match config.machine.machine_type {
        // Snapshots with an unknown machine are rejected before a VMM is started, and the machine
        // type determines the driver.
        MachineType::Microvm | MachineType::Firecracker | MachineType::Unknown => {
            format!("{MICROVM},memory-backend=ram")
        }
    };
    // A page that the guest changed is recognized by being an anonymous page of this process alone.
    // The kernel must therefore not merge it with equal pages of other processes.
    let memory_backend = format!(
        "memory-backend-file,id=ram,size={memory}M,mem-path={},share=on,merge=off",
        jail::MEMORY
    );
    let qmp = format!("socket,id=qmp,fd={}", fds.qmp.as_raw_fd());
    let disk = block_device(config.disk_layers.len()).to_string();
    let tap = format!("tap,id=net,fd={}", fds.tap.as_raw_fd());
    let net = format!("virtio-net-device,netdev=net,mac={}", config.guest_mac);
    let vcpus = config.size.vcpus.to_string();
    let memory = format!("{memory}M");
    let exe = exe.to_string_lossy();
    let mut line: Vec<String> = [
        exe.as_ref(),
        "-name",
        &config.name,
        "-M",
        &machine,
        "-accel",
        &accel,
        "-cpu",
        config.cpu.as_str(),
        "-smp",
        &vcpus,
        "-m",
        &memory,
        "-object",
        &memory_backend,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-kernel",
        jail::KERNEL,
        "-initrd",
        jail::INITRD,
        "-append",
        &config.kernel_args,
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
        "-chardev",
        &qmp,
        "-mon",
        "chardev=qmp,mode=control",
        "-blockdev",
        &disk,
        "-device",
        &format!("virtio-blk-device,drive={ROOT_NODE}"),
        "-netdev",
        &tap,
        "-device",
        &net,
        "-device",
        "virtio-rng-device",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]
    .map(str::to_owned)
    .to_vec();
    for device in &config.machine.devices {
        line.extend(
            device_arguments(*device)
                .iter()
                .map(|&text| text.to_owned()),
        );
    }
    if config.start == Start::Restore {
        line.extend(["-S", "-incoming", "defer"].map(str::to_owned));
    }
    line
}

/// Returns the arguments of a device that not every VM has. Such devices follow those of every VM,
/// so that they take none of their places on the bus.
fn device_arguments(device: Device) -> &'static [&'static str] {
    match device {
        // The guest may expect that a page that it reported is zero, if it fills free pages with
        // zeros itself (`init_on_free`). QEMU tells it that the device respects this
        // (`page-poison`), and the library in QEMU makes it true. A guest that fills free pages
        // with another value keeps them.
        Device::Balloon => &[
            "-device",
            "virtio-balloon-device,free-page-reporting=on,page-poison=on",
        ],
        Device::Unknown => &[],
    }
}

/// Returns the disk as a tree of block nodes. The tree overrides the backing files named in the
/// qcow2 headers.
///
/// The read-only files are not locked. They never change, and a VMM that was broken out of could
/// otherwise lock a file that VMs share, and so prevent their start.
fn block_device(layers: usize) -> Value {
    let file = |path: &str| json!({ "driver": "file", "filename": path, "locking": "off" });
    let mut below = json!({ "driver": "raw", "read-only": true, "file": file(jail::BASE_DISK) });
    for number in 0..layers {
        below = json!({
            "driver": "qcow2",
            "read-only": true,
            "file": file(&format!("{}/{number}", jail::DISK_LAYERS)),
            "backing": below,
        });
    }
    json!({
        "driver": "qcow2",
        "node-name": ROOT_NODE,
        "discard": "unmap",
        "file": { "driver": "file", "filename": jail::DISK, "discard": "unmap" },
        "backing": below,
    })
}

/// Returns the environment that configures the library inside QEMU (`wrenn-preload`).
pub(super) fn environment(start: Start, fds: &Inherited<'_>) -> Vec<String> {
    let mode = match start {
        Start::Boot => "anonymous",
        Start::Restore => "paged",
    };
    let mut env = vec![
        format!("LD_PRELOAD={}", jail::PRELOAD),
        format!("WRENN_MEMORY_PATH={}", jail::MEMORY),
        format!("WRENN_MEMORY_FD={}", fds.memory.as_raw_fd()),
        format!("WRENN_MEMORY_MODE={mode}"),
        format!("WRENN_PAGER_SOCKET_FD={}", fds.pager.as_raw_fd()),
    ];
    if let Some(device) = fds.userfaultfd {
        env.push(format!("WRENN_UFFD_DEVICE_FD={}", device.as_raw_fd()));
    }
    env
}

pub(super) fn jail_files(config: &MachineConfig, preload: &Path) -> Vec<JailFile> {
    let file = |source: &Path, target: &str, writable| JailFile {
        source: source.to_owned(),
        target: target.into(),
        writable,
        executable: false,
    };
    let mut files = vec![
        file(&config.kernel, jail::KERNEL, false),
        file(&config.initrd, jail::INITRD, false),
        file(&config.base_disk, jail::BASE_DISK, false),
        file(&config.disk, jail::DISK, true),
        JailFile {
            executable: true,
            ..file(preload, jail::PRELOAD, false)
        },
    ];
    for (number, layer) in config.disk_layers.iter().enumerate() {
        let target = format!("{}/{number}", jail::DISK_LAYERS);
        files.push(file(layer, &target, false));
    }
    files
}

pub(super) fn jail_devices(accel: Accel) -> Vec<PathBuf> {
    let mut devices = vec!["/dev/null".into(), "/dev/urandom".into()];
    if accel == Accel::Kvm {
        devices.push("/dev/kvm".into());
    }
    devices
}

/// Returns the resource limits of QEMU for a VM of this size.
pub(super) fn process_limits(size: MachineSize) -> ProcessLimits {
    let mib = u64::from(size.disk_mib).max(u64::from(size.memory_mib));
    ProcessLimits {
        // The disk's file is larger than the disk: qcow2 stores where each cluster is.
        file_bytes: (mib + mib / 16 + FILE_OVERHEAD_MIB) * 1024 * 1024,
        threads: u64::from(size.vcpus) + OTHER_THREADS,
        ..ProcessLimits::default()
    }
}

#[cfg(test)]
mod tests {
    use wrenn_proto::machine::{MachineProfile, VmmKind};

    use super::*;

    fn arguments(machine: MachineProfile, start: Start) -> Vec<String> {
        let config = MachineConfig {
            name: "sb-1".into(),
            accel: Accel::Tcg,
            cpu: "Haswell-v4,+arat".parse().expect("valid"),
            machine,
            size: MachineSize {
                vcpus: 1,
                memory_mib: 512,
                disk_mib: 5120,
            },
            kernel: "/k".into(),
            initrd: "/i".into(),
            kernel_args: "quiet".into(),
            disk: "/d".into(),
            disk_layers: vec![],
            base_disk: "/b".into(),
            work_dir: "/w".into(),
            metadata: None,
            guest_mac: "02:FC:00:00:00:05".into(),
            netns: "/n".into(),
            cgroups: vec![],
            uid: 1,
            disk_rate: wrenn_proto::supervise::DiskRate::default(),
            start,
        };
        let null: OwnedFd = std::fs::File::open("/dev/null").expect("opens").into();
        let fds = Inherited {
            memory: &null,
            pager: &null,
            userfaultfd: None,
            tap: &null,
            qmp: &null,
        };
        command_line(Path::new("/usr/bin/qemu"), &config, &fds)
    }

    /// Returns the values of an option, in order.
    fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        let pairs = arguments.windows(2).filter(|pair| pair[0] == option);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn vm_has_the_hardware_of_its_profile() {
        for start in [Start::Boot, Start::Restore] {
            let first = arguments(MachineProfile::first(), start);
            let machine = "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,memory-backend=ram";
            assert_eq!(values(&first, "-M"), [machine]);
            assert_eq!(values(&first, "-cpu"), ["Haswell-v4,+arat"]);
            let devices = values(&first, "-device");
            // `DISK_DEVICE` names the first one.
            assert!(devices[0].starts_with("virtio-blk-device,"));
            assert_eq!(devices.len(), 3, "{devices:?}");
            let current = arguments(MachineProfile::current(VmmKind::Qemu), start);
            // The places of the other devices on the bus do not change.
            assert_eq!(values(&current, "-device")[..3], devices);
            assert!(values(&current, "-device")[3].starts_with("virtio-balloon-device,"));
            assert_eq!(values(&current, "-device").len(), 4);
        }
    }

    #[test]
    fn a_vmm_may_write_its_disk_and_little_more() {
        let size = MachineSize {
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 5120,
        };
        let limits = process_limits(size);
        assert_eq!(limits.file_bytes, (5120 + 320 + 64) << 20);
        assert_eq!(limits.threads, 130);
    }
}
