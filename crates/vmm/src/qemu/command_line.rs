//! Start parameters of QEMU: its arguments, its environment, and the files and devices of its jail.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use wrenn_jail::{self as jail, JailFile};
use wrenn_proto::supervise::Accel;

use crate::{MachineConfig, Start};

/// Name of the disk's topmost block node at start.
pub(super) const ROOT_NODE: &str = "root";

/// Size of the translation cache under TCG, MiB. QEMU's default is 1 GiB, which is too much for
/// many sandboxes on one host.
const TCG_CACHE_MIB: u32 = 128;

/// Descriptors that QEMU inherits and refers to by number.
pub(super) struct Inherited<'a> {
    pub(super) memory: &'a OwnedFd,
    pub(super) pager: &'a OwnedFd,
    pub(super) userfaultfd: Option<&'a OwnedFd>,
    pub(super) tap: &'a OwnedFd,
    pub(super) qmp: &'a OwnedFd,
}

/// Returns QEMU's arguments. `docs/decisions` records the reasons for the less obvious ones.
pub(super) fn command_line(exe: &Path, config: &MachineConfig, fds: &Inherited<'_>) -> Vec<String> {
    let memory = config.size.memory_mib;
    let accel = match config.accel {
        Accel::Kvm => "kvm".to_owned(),
        Accel::Tcg => format!("tcg,tb-size={TCG_CACHE_MIB}"),
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
        "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on,memory-backend=ram",
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
    if config.start == Start::Restore {
        line.extend(["-S", "-incoming", "defer"].map(str::to_owned));
    }
    line
}

/// Returns the disk as a tree of block nodes. The tree overrides the backing files named in the
/// qcow2 headers.
fn block_device(layers: usize) -> Value {
    let file = |path: &str| json!({ "driver": "file", "filename": path });
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
