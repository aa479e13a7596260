//! Files of snapshots: what Firecracker writes reaches the caller, and the other way round.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
};

use serde_json::Value;
use wrenn_pager::{PageRun, sparse};
use wrenn_vmm::{
    ControlError, Start,
    firecracker::{Control, Deadlines, Pages},
};

use crate::support::{
    FakeFirecracker, MAPPED_PATH, Reaction, SHORT, attach_for_load, config, empty_file, rejection,
    short_deadlines, state_file,
};

const CREATE: &str = "PUT /snapshot/create";
const PAGE: u64 = 4096;
/// Memory of the VMs of these tests, in bytes.
const MEMORY: u64 = 512 << 20;

fn path<'a>(body: &'a Value, name: &str) -> &'a str {
    body[name].as_str().expect("a path")
}

/// Writes pages to the memory file, like a diff snapshot.
fn write_pages(body: &Value, pages: &[(u64, u8)]) {
    let file = File::options()
        .write(true)
        .open(path(body, "mem_file_path"))
        .expect("opens");
    file.set_len(MEMORY).expect("possible");
    for (page, content) in pages {
        file.write_all_at(&[*content; 4096], page * PAGE)
            .expect("written");
    }
}

async fn attached() -> (FakeFirecracker, Control) {
    let (fake, channels) = FakeFirecracker::start("1.16.1", None);
    let control = Control::attach(channels, &config(Start::Boot), Deadlines::default()).await;
    (fake, control.expect("attached"))
}

fn runs(memory: &File) -> Vec<PageRun> {
    sparse::scan(memory, MEMORY).expect("scanned")
}

fn run(page: u64, pages: u64) -> PageRun {
    PageRun {
        offset: page * PAGE,
        len: pages * PAGE,
    }
}

#[tokio::test]
async fn state_and_changed_pages_reach_the_caller() {
    let (fake, control) = attached().await;
    let create = Reaction::run(|body| {
        fs::write(path(body, "snapshot_path"), "state of the devices").expect("written");
        // Page 7 became zero. It is data, not a hole.
        write_pages(body, &[(3, 3), (4, 4), (7, 0)]);
    });
    fake.react(CREATE, create);
    let (to, state) = empty_file();
    let memory = File::from(control.save(to).await.expect("saved"));
    let state = fs::read_to_string(state.path()).expect("read");
    assert_eq!(state, "state of the devices");
    assert_eq!(runs(&memory), [run(3, 2), run(7, 1)]);
    let mut page = [1; 4096];
    memory.read_exact_at(&mut page, 7 * PAGE).expect("read");
    assert_eq!(page, [0; 4096]);
}

#[tokio::test]
async fn pages_of_earlier_snapshots_stay_changed() {
    let (fake, control) = attached().await;
    let round = AtomicU8::new(0);
    let create = Reaction::run(move |body| {
        fs::write(path(body, "snapshot_path"), "state").expect("written");
        // Each diff has only the pages since the one before.
        match round.fetch_add(1, Ordering::SeqCst) {
            0 => write_pages(body, &[(1, 1), (2, 1)]),
            _ => write_pages(body, &[(2, 2), (9, 2)]),
        }
    });
    fake.react(CREATE, create);
    control.save(empty_file().0).await.expect("saved");
    let memory = File::from(control.save(empty_file().0).await.expect("saved"));
    // A snapshot may be discarded, so the next one must have its pages, too.
    assert_eq!(runs(&memory), [run(1, 2), run(9, 1)]);
    let mut page = [0; 4096];
    memory.read_exact_at(&mut page, 2 * PAGE).expect("read");
    assert_eq!(page, [2; 4096]);
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_the_vm_controllable() {
    let (fake, control) = attached().await;
    let reason = "Create snapshot error: No space left on device (os error 28)";
    fake.react(CREATE, Reaction::fault(400, reason));
    let (to, state) = empty_file();
    let error = control.save(to).await.expect_err("must fail");
    assert!(error.is_out_of_space());
    assert_eq!(fs::read(state.path()).expect("read"), b"");
    control.resume().await.expect("resumed");
}

#[tokio::test]
async fn a_snapshot_of_a_large_guest_has_more_time() {
    let mut config = config(Start::Boot);
    config.size.memory_mib = 256;
    let mut deadlines = short_deadlines();
    deadlines.per_mib = SHORT / 100;
    let (fake, channels) = FakeFirecracker::start("1.16.1", None);
    let control = Control::attach(channels, &config, deadlines)
        .await
        .expect("attached");
    // Longer than the deadline of other calls, shorter than that of this guest.
    fake.react(CREATE, Reaction::Slow(SHORT * 2));
    control.save(empty_file().0).await.expect("saved");
    fake.react(CREATE, Reaction::Silent);
    let error = control.save(empty_file().0).await.expect_err("must fail");
    let ControlError::Deadline { deadline, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(deadline, SHORT + SHORT / 100 * 256);
}

#[tokio::test]
async fn saved_state_is_in_its_place_when_the_load_arrives() {
    let pages = Pages::Mapped(MAPPED_PATH.to_owned());
    let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
    let seen = Arc::new(Mutex::new(String::new()));
    let load = {
        let seen = Arc::clone(&seen);
        Reaction::run(move |body| {
            let text = fs::read_to_string(path(body, "snapshot_path")).expect("read");
            *seen.lock().expect("not poisoned") = text;
        })
    };
    fake.react("PUT /snapshot/load", load);
    control.load(state_file()).await.expect("loaded");
    assert_eq!(*seen.lock().expect("not poisoned"), "device state");
}

#[tokio::test]
async fn limits_that_cannot_be_set_fail_the_load() {
    let pages = Pages::Mapped(MAPPED_PATH.to_owned());
    let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
    fake.react(
        "PATCH /drives/rootfs",
        Reaction::fault(400, "No such drive."),
    );
    let error = control.load(state_file()).await.expect_err("must fail");
    let reason = rejection(&error, "PATCH /drives/rootfs");
    assert_eq!(reason, "No such drive.");
}
