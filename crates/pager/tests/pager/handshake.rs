//! Tests of Firecracker's handshake, and of invalid messages.

use std::{
    error::Error as _,
    io::Write as _,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use wrenn_pager::{
    HandshakeError, Region,
    handshake::{MAX_MESSAGE_BYTES, accept, receive, receive_layout},
};
use wrenn_sys::{scm, uffd::Uffd};

use crate::support::{DEADLINE, never};

const REGION: &str = r#"{"base_host_virt_addr":65536,"size":8192,"offset":0"#;

fn soon() -> Instant {
    Instant::now() + DEADLINE
}

/// Returns the result of receiving one message.
fn outcome(message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<Vec<Region>, HandshakeError> {
    let (near, far) = UnixStream::pair().expect("a pair");
    scm::send(near.as_fd(), message, descriptors).expect("sends");
    let handshake = receive(&far, never().as_fd(), soon())?;
    Ok(handshake.regions.as_slice().to_vec())
}

fn text(error: HandshakeError) -> String {
    let cause = error.source().map(ToString::to_string);
    format!("{error}: {}", cause.unwrap_or_default())
}

#[test]
fn both_names_of_the_page_size_and_several_regions_are_accepted() {
    let uffd = Uffd::open().expect("opens");
    let first = Region {
        address: 65536,
        len: 8192,
        offset: 0,
    };
    for size in [r#""page_size":4096"#, r#""page_size_kib":4096"#] {
        let message = format!("[{REGION},{size}}}]");
        let regions = outcome(message.as_bytes(), &[uffd.as_fd()]).expect("is one");
        assert_eq!(regions, [first]);
    }
    let second = r#"{"base_host_virt_addr":1048576,"size":4096,"offset":8192,"page_size":4096}"#;
    let message = format!(r#"[{second},{REGION},"page_size":4096}}]"#);
    let regions = outcome(message.as_bytes(), &[uffd.as_fd()]).expect("is one");
    assert_eq!(regions.len(), 2);
    assert_eq!(regions[0], first);
    assert_eq!(regions[1].offset, 8192);
}

#[test]
fn malformed_message_is_an_error_that_names_the_defect() {
    let uffd = Uffd::open().expect("opens");
    let null = std::fs::File::open("/dev/null").expect("opens");
    let good = format!(r#"[{REGION},"page_size":4096}}]"#);
    let with = |size: &str| format!("[{REGION}{size}}}]");
    let one = [uffd.as_fd()];
    let two = [uffd.as_fd(), uffd.as_fd()];
    let other = [null.as_fd()];
    let cases: [(String, &[BorrowedFd<'_>], &str); 11] = [
        ("no json at all".into(), &one, "failed to decode"),
        (good[..20].into(), &one, "failed to decode"),
        ("{}".into(), &one, "failed to decode"),
        ("[]".into(), &one, "0 regions"),
        (with(""), &one, "no page size"),
        (with(r#","page_size":2097152"#), &one, "2097152 bytes"),
        (with(r#","page_size":-1"#), &one, "failed to decode"),
        (
            good.clone(),
            &[],
            "received 0 descriptors with the message, expected 1",
        ),
        (good.clone(), &two, "received 2 descriptors"),
        (good.clone(), &other, "/dev/null, not a userfaultfd"),
        (" ".repeat(MAX_MESSAGE_BYTES + 1), &one, "longer than"),
    ];
    for (message, descriptors, expected) in cases {
        let error = text(outcome(message.as_bytes(), descriptors).expect_err("is none"));
        assert!(error.contains(expected), "{error} for {message}");
    }
}

#[test]
fn a_description_without_a_descriptor_is_for_memory_that_is_not_paged() {
    let message = format!(r#"[{REGION},"page_size":4096}}]"#);
    let (near, far) = UnixStream::pair().expect("a pair");
    scm::send(near.as_fd(), message.as_bytes(), &[]).expect("sends");
    let regions = receive_layout(&far, never().as_fd(), soon()).expect("is one");
    assert_eq!(regions.end_offset(), 8192);
    let uffd = Uffd::open().expect("opens");
    scm::send(near.as_fd(), message.as_bytes(), &[uffd.as_fd()]).expect("sends");
    let error = receive_layout(&far, never().as_fd(), soon()).expect_err("has one too many");
    assert!(text(error).contains("received 1 descriptors with the message, expected 0"));
}

#[test]
fn a_peer_that_closes_or_stays_silent_is_an_error() {
    let (near, far) = UnixStream::pair().expect("a pair");
    let deadline = Instant::now() + Duration::from_millis(20);
    assert!(matches!(
        receive(&far, never().as_fd(), deadline),
        Err(HandshakeError::Silent)
    ));
    drop(near);
    assert!(matches!(
        receive(&far, never().as_fd(), soon()),
        Err(HandshakeError::Closed)
    ));
}

#[test]
fn a_vmm_that_never_connects_ends_at_the_deadline_or_when_cancelled() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("uffd.sock");
    let listener = UnixListener::bind(&path).expect("binds");
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(50);
    assert!(matches!(
        accept(&listener, never().as_fd(), deadline),
        Err(HandshakeError::NotConnected)
    ));
    assert!(begun.elapsed() >= Duration::from_millis(50));

    let cancel = never();
    let error = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| accept(&listener, cancel.as_fd(), soon()));
        rustix::io::write(&cancel, &1_u64.to_ne_bytes()).expect("writes");
        waiting.join().expect("ends").expect_err("no VMM connected")
    });
    assert!(matches!(error, HandshakeError::Cancelled));
    // Cancelling also works when the VMM has connected and sends nothing.
    let stream = UnixStream::connect(&path).expect("connects");
    assert!(matches!(
        receive(&stream, cancel.as_fd(), soon()),
        Err(HandshakeError::Cancelled)
    ));
}

#[test]
fn a_plain_write_has_no_descriptor() {
    let (mut near, far) = UnixStream::pair().expect("a pair");
    write!(near, r#"[{REGION},"page_size":4096}}]"#).expect("writes");
    assert!(matches!(
        receive(&far, never().as_fd(), soon()),
        Err(HandshakeError::Descriptors { got: 0, want: 1 })
    ));
}
