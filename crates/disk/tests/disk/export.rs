//! Raw view of a disk: content, writes, access, end.

use std::{
    fs,
    os::unix::{
        fs::{FileExt as _, MetadataExt as _},
        process::CommandExt as _,
    },
    path::Path,
    process::Command,
    time::Duration,
};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::{
    chain::{Chain, SIZE, UID},
    is_mounted, is_running, on_private_host,
};

const STOP: Duration = Duration::from_secs(30);

pub(crate) fn open(path: &Path) -> fs::File {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
fn raw_file_has_the_content_of_the_chain() {
    on_private_host(async || {
        let chain = Chain::new().await;
        assert!(
            chain.read(&[&chain.overlay]) == chain.content,
            "the fixture"
        );
        let export = chain.export().await;
        let meta = fs::metadata(export.path()).unwrap();
        assert!(meta.is_file());
        assert_eq!(meta.len(), SIZE as u64);
        assert!(fs::read(export.path()).unwrap() == chain.content);
        export.stop(STOP).await.unwrap();
    });
}

#[test]
fn writes_reach_the_overlay_only_and_outlive_the_export() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let lower = |chain: &Chain| -> Vec<Vec<u8>> {
            let paths = chain.layers.iter().chain([&chain.base]);
            paths.map(|path| fs::read(path).unwrap()).collect()
        };
        let before = lower(&chain);
        let mut export = chain.export().await;
        let raw = open(&export.path());
        // Within a block, over borders of clusters, and at the end of the disk.
        for (offset, len) in [
            (5, 1),
            (65_000, 2000),
            (SIZE - 4096, 4096),
            (1 << 20, 3 << 20),
        ] {
            chain.write(&raw, offset, &vec![0xe5; len]);
        }
        raw.sync_all().unwrap();
        assert!(fs::read(export.path()).unwrap() == chain.content);
        // What was flushed is in the overlay, whatever becomes of the exporter.
        export.flush().await.unwrap();
        assert!(chain.read(&[&chain.overlay]) == chain.content);
        chain.write(&raw, 7 << 20, &[0x5e; 100]);
        drop(raw);
        export.stop(STOP).await.unwrap();
        assert!(chain.read(&[&chain.overlay]) == chain.content);
        assert!(lower(&chain) == before);
        // The next export accepts the overlay.
        let export = chain.export().await;
        assert!(fs::read(export.path()).unwrap() == chain.content);
        export.stop(STOP).await.unwrap();
    });
}

#[test]
fn a_hole_returns_space_and_reads_as_zeros() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let export = chain.export().await;
        let raw = open(&export.path());
        let allocated = |chain: &Chain| fs::metadata(&chain.overlay).unwrap().blocks() * 512;
        chain.write(&raw, 8 << 20, &vec![0xaa; 4 << 20]);
        raw.sync_all().unwrap();
        let full = allocated(&chain);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // The second hole covers data of the layers and of the base.
        for (offset, len) in [(8 << 20, 4 << 20), (2 << 20, 1 << 20)] {
            fallocate(&raw, flags, offset, len).unwrap();
            let (start, len) = (
                usize::try_from(offset).unwrap(),
                usize::try_from(len).unwrap(),
            );
            chain.content[start..start + len].fill(0);
        }
        raw.sync_all().unwrap();
        let left = allocated(&chain);
        assert!(left + (3 << 20) < full, "{left} of {full}");
        assert!(fs::read(export.path()).unwrap() == chain.content);
        drop(raw);
        export.stop(STOP).await.unwrap();
        assert!(chain.read(&[&chain.overlay]) == chain.content);
    });
}

#[test]
fn only_the_reader_can_use_the_raw_file() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let reader = 1_899_990_077;
        let export = chain.export_for(reader).await.unwrap();
        let error = fs::metadata(export.path()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        let read = |uid| {
            let mut command = Command::new("head");
            command.args(["-c", "4096"]).arg(export.path());
            command.uid(uid).gid(uid).output().unwrap()
        };
        assert!(read(reader).stdout == chain.content[..4096]);
        for other in [0, UID] {
            assert!(!read(other).status.success());
        }
        export.stop(STOP).await.unwrap();
    });
}

#[test]
fn the_exporter_is_confined_and_locks_no_shared_file() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let export = chain.export().await;
        let pid = export.pid().unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> String {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace()
                .skip(1)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let id = UID.to_string();
        assert_eq!(field("Uid:"), [id.as_str(); 4].join(" "));
        assert_eq!(field("CapEff:"), "0000000000000000");
        assert_eq!(field("CapBnd:").len(), 16);
        assert_eq!(
            (field("NoNewPrivs:"), field("Seccomp:")),
            ("1".into(), "2".into())
        );
        assert_eq!(field("NSpid:").split(' ').nth(1), Some("1"));
        for ns in ["net", "mnt", "ipc", "uts", "cgroup"] {
            let link = |process: &str| fs::read_link(format!("/proc/{process}/ns/{ns}")).unwrap();
            assert_ne!(link(&pid.to_string()), link("thread-self"), "{ns}");
        }
        let overlay = fs::canonicalize(&chain.overlay).unwrap();
        let mut locked = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            let name = entry.unwrap().file_name();
            let info = format!("/proc/{pid}/fdinfo/{}", name.to_str().unwrap());
            let info = fs::read_to_string(info).unwrap();
            if info.contains("lock:") {
                locked.push(inode_of(&info));
            }
        }
        locked.dedup();
        assert_eq!(locked, [fs::metadata(overlay).unwrap().ino()]);
        export.stop(STOP).await.unwrap();
    });
}

/// Returns the inode that `fdinfo` reports.
fn inode_of(info: &str) -> u64 {
    let line = info.lines().find(|line| line.starts_with("ino:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn stop_leaves_no_process_no_mount_and_no_directory() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let dir = chain.export_dir();
        let export = chain.export().await;
        let pid = export.pid().unwrap();
        assert!(is_mounted(&dir) && is_running(pid));
        // A reader that is left behind does not keep the export alive.
        let raw = open(&export.path());
        export.stop(STOP).await.unwrap();
        assert!(!is_mounted(&dir) && !is_running(pid) && !dir.exists());
        let error = raw.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::ENOTCONN), "{error}");
        // The same without a request.
        let export = chain.export().await;
        let pid = export.pid().unwrap();
        drop(export);
        assert!(!is_mounted(&dir) && !dir.exists());
        crate::wait_until(|| !is_running(pid));
    });
}
