//! Failures of the raw view: files of another form, an exporter that dies or hangs, a full disk.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::FileExt as _,
    process::Stdio,
    time::Duration,
};

use nix::{
    libc,
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use wrenn_disk::{DiskError, Export};

use crate::{
    chain::{Chain, SIZE, UID, export_command},
    export::open,
    is_mounted, is_running, on_private_host, signal, wait_until,
};

#[test]
fn a_file_of_another_form_is_rejected_before_anything_starts() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let good = fs::read(&chain.layers[1]).unwrap();
        let names_host = {
            let mut bytes = good.clone();
            let name = bytes.windows(4).position(|bytes| bytes == b"/tmp").unwrap();
            bytes[name..name + 4].copy_from_slice(b"/etc");
            bytes
        };
        let has_data_file = {
            let mut bytes = good.clone();
            bytes[79] = 4;
            bytes
        };
        let of_other_size = {
            let mut bytes = good.clone();
            bytes[29] += 1;
            bytes
        };
        let forms = [
            names_host,
            has_data_file,
            of_other_size,
            vec![0; 4096],
            vec![],
        ];
        for (number, form) in forms.into_iter().enumerate() {
            let path = chain.dir().join("changed");
            let _ = fs::remove_file(&path);
            fs::write(&path, form).unwrap();
            let layer = std::mem::replace(&mut chain.layers[1], path.clone());
            let error = chain.export_for(0).await.unwrap_err();
            assert!(
                matches!(&error, DiskError::Layer { path: p, .. } if *p == path),
                "{error}"
            );
            chain.layers[1] = layer;
            let overlay = std::mem::replace(&mut chain.overlay, path.clone());
            let error = chain.export_for(0).await.unwrap_err();
            assert!(
                matches!(error, DiskError::Layer { .. }),
                "{number}: {error}"
            );
            chain.overlay = overlay;
            assert!(!chain.export_dir().exists());
        }
    });
}

#[test]
fn a_start_that_fails_reports_the_reason_and_leaves_nothing() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        // The header has the accepted form, but names no place for the table.
        let damaged = chain.dir().join("damaged");
        let mut bytes = fs::read(&chain.layers[1]).unwrap();
        bytes[47] = 1;
        fs::write(&damaged, bytes).unwrap();
        let layer = std::mem::replace(&mut chain.layers[1], damaged);
        let error = chain.export_for(0).await.unwrap_err();
        assert!(
            matches!(&error, DiskError::Failed(_, text) if text.contains("L1 table")),
            "{error}"
        );
        assert!(!is_mounted(chain.dir()) && !chain.export_dir().exists());
        chain.layers[1] = layer;
        // The exporter may not open the overlay.
        std::os::unix::fs::chown(&chain.overlay, Some(0), Some(0)).unwrap();
        let error = chain.export_for(0).await.unwrap_err();
        let is_it = matches!(&error, DiskError::Failed(_, text) if text.contains("Permission"));
        assert!(is_it, "{error}");
        std::os::unix::fs::chown(&chain.overlay, Some(UID), Some(UID)).unwrap();
        chain.export().await;
    });
}

#[test]
fn readers_get_an_error_and_no_data_when_the_exporter_dies() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let mut export = chain.export().await;
        let raw = open(&export.path());
        let mut block = [0; 4096];
        raw.read_exact_at(&mut block, 1 << 20).unwrap();
        // The kernel no longer trusts the attributes of a file that was written to.
        chain.write(&raw, 0, &[9; 4096]);
        signal(export.pid().unwrap(), Signal::SIGKILL);
        let ended = export.wait().await;
        assert!(ended.to_string().contains("signal: 9"), "{ended}");
        for offset in [0, 1 << 20, 5 << 20] {
            let error = raw.read_at(&mut block, offset).unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(libc::ENOTCONN),
                "{offset}: {error}"
            );
        }
        for error in [
            raw.write_at(&block, 0).unwrap_err(),
            raw.sync_all().unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{error}");
        }
        assert!(fs::File::open(export.path()).is_err());
        let error = export.flush().await.unwrap_err();
        assert!(error.to_string().contains("signal: 9"), "{error}");
        export.stop(Duration::from_secs(5)).await.unwrap_err();
        assert!(!is_mounted(chain.dir()));
        // The overlay can still be used. It may lack what was not flushed.
        chain.export().await;
    });
}

#[test]
fn cached_blocks_are_current_when_the_exporter_dies_and_gone_a_second_later() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let mut export = chain.export().await;
        let raw = open(&export.path());
        chain.write(&raw, 0, &[9; 4096]);
        let mut block = [0; 4096];
        raw.read_exact_at(&mut block, 0).unwrap();
        raw.read_exact_at(&mut block, 1 << 20).unwrap();
        signal(export.pid().unwrap(), Signal::SIGKILL);
        export.wait().await;
        for offset in [0, 1 << 20] {
            if raw.read_at(&mut block, offset as u64).is_ok() {
                assert!(block == chain.content[offset..offset + 4096]);
            }
        }
        raw.write_at(&block, 0).unwrap_err();
        std::thread::sleep(Duration::from_millis(1100));
        for offset in [0, 1 << 20] {
            raw.read_at(&mut block, offset).unwrap_err();
        }
    });
}

#[test]
fn an_exporter_that_hangs_is_killed_and_its_reader_gets_an_error() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let export = chain.export().await;
        let pid = export.pid().unwrap();
        let raw = open(&export.path());
        signal(pid, Signal::SIGSTOP);
        let reader = std::thread::spawn(move || raw.read_at(&mut [0; 4096], 3 << 20));
        let deadline = Duration::from_millis(500);
        let error = export.stop(deadline).await.unwrap_err();
        assert!(matches!(error, DiskError::Deadline { .. }), "{error}");
        let error = reader.join().unwrap().unwrap_err();
        let code = error.raw_os_error().unwrap();
        assert!(
            [libc::ECONNABORTED, libc::ENOTCONN, libc::EIO].contains(&code),
            "{error}"
        );
        assert!(!is_running(pid) && !is_mounted(chain.dir()));
    });
}

#[test]
fn the_exporter_dies_with_its_parent_and_its_mount_can_be_removed() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let mut parent = export_command(&chain)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(parent.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let exporter: u32 = line.trim().parse().unwrap();
        let dir = chain.export_dir();
        let raw = open(&dir.join("raw"));
        assert!(is_running(exporter));
        parent.kill().unwrap();
        parent.wait().unwrap();
        wait_until(|| !is_running(exporter));
        let error = raw.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{error}");
        assert!(is_mounted(&dir));
        wrenn_disk::export::remove(&dir).unwrap();
        assert!(!is_mounted(&dir) && !dir.exists());
        wrenn_disk::export::remove(&dir).unwrap();
        // The next export does the same.
        parent = export_command(&chain)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(parent.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        parent.kill().unwrap();
        parent.wait().unwrap();
        wait_until(|| is_overlay_free(&chain));
        let export = chain.export().await;
        assert_eq!(fs::metadata(export.path()).unwrap().len(), SIZE as u64);
    });
}

/// True if no exporter holds the lock of the overlay.
fn is_overlay_free(chain: &Chain) -> bool {
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&chain.overlay).unwrap());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    !locks.contains(&format!(":{inode} "))
}

#[test]
fn two_exports_cannot_write_to_one_overlay() {
    on_private_host(async || {
        let chain = Chain::new().await;
        let export = chain.export().await;
        let second = chain.dir().join("export-2");
        let started = Export::start(chain.config(&second)).await;
        let error = started.unwrap_err();
        assert!(error.to_string().contains("lock"), "{error}");
        assert!(fs::read(export.path()).unwrap() == chain.content);
    });
}

#[test]
fn a_full_disk_fails_the_write_and_not_the_export() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let small = chain.dir().join("small");
        fs::create_dir(&small).unwrap();
        let options = Some("size=1m,mode=0711");
        mount(
            Some("tmpfs"),
            &small,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        let overlay = small.join("overlay");
        wrenn_disk::create(&overlay, 16, UID).await.unwrap();
        chain.overlay = overlay;
        let mut export = chain.export().await;
        let raw = open(&export.path());
        let error = raw.write_all_at(&vec![1; 4 << 20], 0).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
        assert!(export.pid().is_some());
        mount(
            None::<&str>,
            &small,
            None::<&str>,
            MsFlags::MS_REMOUNT,
            Some("size=32m"),
        )
        .unwrap();
        raw.write_all_at(&vec![1; 4 << 20], 0).unwrap();
        export.flush().await.unwrap();
        drop(raw);
        export.stop(Duration::from_secs(30)).await.unwrap();
        nix::mount::umount(&small).unwrap();
    });
}
