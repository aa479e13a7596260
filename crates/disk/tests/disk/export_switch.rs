//! Change of the overlay of a running export.

use std::{fs, time::Duration};

use crate::{
    chain::{Chain, SIZE},
    export::open,
    on_private_host,
};

#[test]
fn a_switch_keeps_the_content_and_freezes_the_file_below() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let mut export = chain.export().await;
        let raw = open(&export.path());
        let mut tops = vec![chain.overlay.clone()];
        for round in 1..=3_u8 {
            // Not flushed by the writer: the switch does it.
            chain.write(&raw, usize::from(round) << 20, &vec![0xd0 + round; 300_000]);
            let next = chain.empty_overlay(&format!("overlay-{round}")).await;
            export.switch(&next).await.unwrap();
            let below = tops.last().unwrap().clone();
            let frozen = fs::read(&below).unwrap();
            let at_switch = chain.content.clone();
            assert!(fs::read(export.path()).unwrap() == chain.content);
            // Hides a part of what was written before, and something of the base.
            chain.write(&raw, (usize::from(round) << 20) + 5000, &[round; 9000]);
            chain.write(&raw, SIZE - (usize::from(round) << 16), &[round; 10]);
            raw.sync_all().unwrap();
            assert!(fs::read(&below).unwrap() == frozen, "round {round}");
            let files: Vec<_> = tops.iter().map(|path| path.as_path()).collect();
            assert!(chain.read(&files) == at_switch, "round {round}");
            tops.push(next);
        }
        assert!(fs::read(export.path()).unwrap() == chain.content);
        export.flush().await.unwrap();
        let files: Vec<_> = tops.iter().map(|path| path.as_path()).collect();
        assert!(chain.read(&files) == chain.content);
        // The exporter has opened the frozen files read-only again.
        let pid = export.pid().unwrap();
        assert_eq!(writable_files(pid), 1);
        drop(raw);
        export.stop(Duration::from_secs(30)).await.unwrap();
        assert!(chain.read(&files) == chain.content);
    });
}

#[test]
fn a_switch_that_fails_leaves_the_overlay_in_place() {
    on_private_host(async || {
        let mut chain = Chain::new().await;
        let mut export = chain.export().await;
        let raw = open(&export.path());
        let foreign = chain.dir().join("foreign");
        fs::write(&foreign, vec![0; 1 << 20]).unwrap();
        export.switch(&foreign).await.unwrap_err();
        // The exporter may not open it.
        let closed = chain.dir().join("closed");
        wrenn_disk::create(&closed, 16, 0).await.unwrap();
        export.switch(&closed).await.unwrap_err();
        chain.write(&raw, 1 << 20, &[7; 5000]);
        export.flush().await.unwrap();
        assert!(chain.read(&[&chain.overlay]) == chain.content);
        let next = chain.empty_overlay("next").await;
        export.switch(&next).await.unwrap();
        chain.write(&raw, 2 << 20, &[8; 5000]);
        drop(raw);
        export.stop(Duration::from_secs(30)).await.unwrap();
        assert!(chain.read(&[&chain.overlay, &next]) == chain.content);
    });
}

/// Returns the number of disk files that a process has open for writing.
fn writable_files(pid: u32) -> usize {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let is_writable = |name: &str| {
        let path = fs::read_link(format!("/proc/{pid}/fd/{name}")).unwrap();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap();
        let flags = info
            .lines()
            .find(|line| line.starts_with("flags:"))
            .unwrap();
        path.to_str().unwrap().contains("overlay") && flags.ends_with('2')
    };
    fds.filter(|fd| is_writable(fd.as_ref().unwrap().file_name().to_str().unwrap()))
        .count()
}
