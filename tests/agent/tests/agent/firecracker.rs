//! Start of the Firecracker driver, as far as it needs no Firecracker.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use wrenn_model::MachineSize;
use wrenn_proto::{
    machine::{MachineProfile, VmmKind},
    supervise::{Accel, DiskRate},
};
use wrenn_vmm::{
    LaunchError, MachineConfig, MachineFds, Start, VmmDriver as _,
    firecracker::{Firecracker, FirecrackerMachine},
};

use crate::private_host;

/// Program that enters the jail.
const EXE: &str = env!("CARGO_BIN_EXE_wrenn-fake-supervisor");

fn config(dir: &Path, accel: Accel) -> MachineConfig {
    MachineConfig {
        name: "sb-0123abcd".into(),
        accel,
        cpu: "host".parse().expect("valid"),
        machine: MachineProfile::current(VmmKind::Firecracker),
        size: MachineSize {
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 1024,
        },
        kernel: dir.join("kernel"),
        initrd: dir.join("initrd"),
        kernel_args: "quiet".into(),
        disk: dir.join("disk"),
        disk_layers: vec![],
        base_disk: dir.join("base"),
        work_dir: dir.to_owned(),
        metadata: None,
        guest_mac: "02:FC:00:00:00:05".into(),
        netns: "/proc/self/ns/net".into(),
        cgroups: vec![],
        uid: 1_000_000_000 + std::process::id(),
        disk_rate: DiskRate::default(),
        start: Start::Restore,
    }
}

fn null() -> OwnedFd {
    fs::File::open("/dev/null").expect("opens").into()
}

/// Starts a Firecracker that does not exist. Returns the result, and the page server's end of the
/// socket.
async fn launch(accel: Accel) -> (Result<FirecrackerMachine, LaunchError>, UnixStream) {
    private_host::enter();
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["kernel", "initrd", "disk"] {
        fs::write(dir.path().join(name), "").expect("written");
    }
    let driver = Firecracker::new(EXE.into(), dir.path().join("firecracker"));
    let (pager, reader) = UnixStream::pair().expect("a pair");
    let fds = MachineFds {
        memory: null(),
        pager: pager.into(),
        userfaultfd: None,
        tap: null(),
    };
    let launched = driver.launch(config(dir.path(), accel), fds).await;
    let left = fs::read_dir(dir.path()).expect("read").count();
    assert_eq!(left, 3, "the driver leaves no files");
    (launched, reader)
}

#[tokio::test]
async fn a_vmm_that_cannot_be_executed_ends_the_launch_at_once_with_its_output() {
    let began = Instant::now();
    let (launched, mut reader) = launch(Accel::Kvm).await;
    let Err(LaunchError::Ended { stderr, .. }) = &launched else {
        panic!("{:?}", launched.err());
    };
    let names_it = stderr.contains("/firecracker\"") && stderr.contains("No such file");
    assert!(names_it, "{stderr}");
    assert!(began.elapsed() < Duration::from_secs(20));
    // The page server does not wait for a handshake.
    let read = std::io::Read::read(&mut reader, &mut [0; 8]);
    assert_eq!(read.expect("the end"), 0);
}

#[tokio::test]
async fn firecracker_does_not_run_without_kvm() {
    let (launched, _reader) = launch(Accel::Tcg).await;
    let Err(LaunchError::Unsupported(what)) = &launched else {
        panic!("{:?}", launched.err());
    };
    assert_eq!(*what, "software emulation");
}
