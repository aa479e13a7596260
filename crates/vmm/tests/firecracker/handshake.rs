//! Handshake of a restore, from Firecracker through the driver to the page server.

use std::{
    io::Read as _,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream as StdStream,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::json;
use tokio::sync::Notify;
use wrenn_pager::handshake;
use wrenn_sys::{scm, uffd::Uffd};
use wrenn_vmm::{
    ControlError,
    firecracker::{Control, Deadlines, Pages},
};

use crate::support::{
    FakeFirecracker, MAPPED_PATH, Reaction, SHORT, attach_for_load, pager, rejection,
    short_deadlines, state_file,
};

const LOAD: &str = "PUT /snapshot/load";

/// Layout of a guest with two regions, as Firecracker reports it above 3 GiB.
fn layout() -> String {
    let region = |address: u64, size: u64, offset: u64| {
        json!({
            "base_host_virt_addr": address,
            "size": size,
            "offset": offset,
            "page_size": 4096,
            "page_size_kib": 4096,
        })
    };
    let (low, high) = (3_u64 << 30, 1_u64 << 30);
    let regions = [
        region(0x7000_0000_0000, low, 0),
        region(0x7100_0000_0000, high, low),
    ];
    json!(regions).to_string()
}

/// Sends a message to the socket of the driver, like Firecracker. Returns the connection.
fn send(path: &Path, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> StdStream {
    let stream = StdStream::connect(path).expect("the driver listens");
    scm::send(stream.as_fd(), message, descriptors).expect("sent");
    stream
}

/// Sends a valid handshake.
pub(crate) fn send_handshake(path: &Path) {
    let uffd = Uffd::open().expect("opens");
    send(path, layout().as_bytes(), &[uffd.as_fd()]);
}

/// Attaches to a simulated process whose load is handled by `load`, which gets the path of the
/// driver's socket. Returns the page server's end of the socket as well.
async fn prepared(
    load: impl Fn(&Path) -> Reaction,
    deadlines: Deadlines,
) -> (FakeFirecracker, Control, StdStream) {
    let (pages, reader) = pager();
    let (fake, control) = attach_for_load(pages, deadlines).await;
    fake.react(LOAD, load(&fake.pages_path()));
    (fake, control, reader)
}

/// Checks that the page server would not wait any longer, and that nothing listens any more.
fn assert_closed(fake: &FakeFirecracker, mut reader: StdStream) {
    reader.set_nonblocking(true).expect("possible");
    assert_eq!(reader.read(&mut [0; 16]).expect("the end"), 0);
    assert!(!fake.pages_path().exists());
}

#[tokio::test]
async fn message_and_descriptor_reach_the_page_server_before_the_load_is_answered() {
    let (pages, reader) = pager();
    let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
    assert!(control.sends_handshake());
    // Like Firecracker, which needs pages before it answers.
    let served = Arc::new(Notify::new());
    let path = fake.pages_path();
    let load = Reaction::held(move |_| send_handshake(&path), Arc::clone(&served));
    fake.react(LOAD, load);
    let page_server = tokio::task::spawn_blocking(move || {
        let never = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
        let deadline = Instant::now() + Duration::from_secs(10);
        let received = handshake::receive(&reader, never.as_fd(), deadline);
        served.notify_one();
        received
    });
    control.load(state_file()).await.expect("loaded");
    let received = page_server.await.expect("no panic").expect("a handshake");
    let regions = received.regions.as_slice();
    assert_eq!(regions.len(), 2);
    assert_eq!((regions[0].len, regions[1].offset), (3 << 30, 3 << 30));
    assert!(!fake.pages_path().exists());
}

#[tokio::test]
async fn a_page_server_that_takes_its_time_does_not_block_the_relay() {
    let load = |path: &Path| {
        let path = path.to_owned();
        Reaction::run(move |_| send_handshake(&path))
    };
    let (_fake, mut control, mut reader) = prepared(load, Deadlines::default()).await;
    // Nothing reads yet.
    control.load(state_file()).await.expect("loaded");
    let mut message = vec![0; 64 * 1024];
    let len = reader.read(&mut message).expect("a message");
    assert_eq!(&message[..len], layout().as_bytes());
}

#[tokio::test]
async fn an_exit_of_the_vmm_ends_the_wait_at_once() {
    // No answer, and no connection for the handshake.
    let (fake, mut control, reader) =
        prepared(|_| Reaction::Raw(vec![]), Deadlines::default()).await;
    let began = Instant::now();
    let error = control.load(state_file()).await.expect_err("must fail");
    assert!(matches!(error, ControlError::Io { .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_closed(&fake, reader);
}

#[tokio::test]
async fn a_rejected_snapshot_ends_the_wait_at_once_with_the_reason() {
    let reason = "Load snapshot error: Failed to restore from snapshot: invalid CRC";
    let load = |_: &Path| Reaction::fault(400, reason);
    let (fake, mut control, reader) = prepared(load, Deadlines::default()).await;
    let began = Instant::now();
    let error = control.load(state_file()).await.expect_err("must fail");
    assert_eq!(rejection(&error, LOAD), reason);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_closed(&fake, reader);
}

#[tokio::test]
async fn a_vmm_that_never_connects_ends_at_the_deadline() {
    let (fake, mut control, reader) = prepared(|_| Reaction::Silent, short_deadlines()).await;
    let error = control.load(state_file()).await.expect_err("must fail");
    let ControlError::Deadline { step, deadline } = error else {
        panic!("{error:?}");
    };
    assert_eq!((step, deadline), (LOAD, SHORT));
    assert_closed(&fake, reader);
}

#[tokio::test]
async fn a_vmm_that_connects_and_sends_nothing_ends_at_the_deadline() {
    let (pages, reader) = pager();
    let (fake, mut control) = attach_for_load(pages, short_deadlines()).await;
    fake.react(LOAD, Reaction::Silent);
    let connecting = async {
        loop {
            if let Ok(stream) = StdStream::connect(fake.pages_path()) {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (loaded, _stream) = tokio::join!(control.load(state_file()), connecting);
    let error = loaded.expect_err("must fail");
    assert!(matches!(error, ControlError::Deadline { .. }), "{error:?}");
    assert_closed(&fake, reader);
}

#[tokio::test]
async fn an_invalid_message_ends_the_load_without_an_answer() {
    type Sender = fn(&Path);
    let cases: [(&str, Sender); 4] = [
        ("has 0 descriptors", |path| {
            send(path, layout().as_bytes(), &[]);
        }),
        ("has 2 descriptors", |path| {
            let uffd = Uffd::open().expect("opens");
            send(path, layout().as_bytes(), &[uffd.as_fd(), uffd.as_fd()]);
        }),
        ("longer than 16384 bytes", |path| {
            let uffd = Uffd::open().expect("opens");
            send(path, &[b' '; 20_000], &[uffd.as_fd()]);
        }),
        ("connection was closed", |path| {
            drop(StdStream::connect(path).expect("the driver listens"));
        }),
    ];
    for (expected, send) in cases {
        let (pages, reader) = pager();
        let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
        // The load is never answered.
        fake.react(LOAD, Reaction::Silent);
        let path = fake.pages_path();
        let sending = async {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            send(&path);
        };
        let began = Instant::now();
        let (loaded, ()) = tokio::join!(control.load(state_file()), sending);
        let error = loaded.expect_err(expected);
        let ControlError::Failed { reason, .. } = &error else {
            panic!("{error:?}");
        };
        assert!(reason.contains(expected), "{reason}");
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_closed(&fake, reader);
    }
}

#[tokio::test]
async fn a_load_without_a_handshake_is_an_invalid_answer() {
    let load = |_: &Path| Reaction::Answer(204, String::new());
    let (fake, mut control, reader) = prepared(load, Deadlines::default()).await;
    let error = control.load(state_file()).await.expect_err("must fail");
    let ControlError::Protocol { command, reason } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*command, LOAD);
    assert!(reason.contains("without a userfaultfd"), "{reason}");
    assert_closed(&fake, reader);
}

#[tokio::test]
async fn a_name_that_the_vmm_took_is_an_error() {
    let (pages, reader) = pager();
    let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
    std::fs::write(fake.pages_path(), "").expect("written");
    let error = control.load(state_file()).await.expect_err("must fail");
    assert!(matches!(error, ControlError::Io { .. }), "{error:?}");
    assert!(!fake.calls().contains(&LOAD.to_owned()));
    drop(reader);
}

#[tokio::test]
async fn a_second_load_is_rejected_before_it_is_sent() {
    let pages = Pages::Mapped(MAPPED_PATH.to_owned());
    let (fake, mut control) = attach_for_load(pages, Deadlines::default()).await;
    control.load(state_file()).await.expect("loaded");
    let sent = fake.calls().len();
    let error = control.load(state_file()).await.expect_err("must fail");
    assert!(
        matches!(error, ControlError::Unsupported { .. }),
        "{error:?}"
    );
    assert_eq!(fake.calls().len(), sent);
}
