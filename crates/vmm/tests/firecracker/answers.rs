//! Answers of Firecracker: documented ones, late ones, and invalid ones.

use std::{
    fs, io,
    os::unix::{fs::symlink, net::UnixListener as StdListener},
    time::{Duration, Instant},
};

use tokio::time::sleep;
use wrenn_vmm::{
    ControlError, LaunchError, Start,
    firecracker::{Control, Deadlines},
};

use crate::support::{
    FakeFirecracker, Reaction, SHORT, answer, config, full_config, rejection, short_deadlines,
};

/// Calls of a boot after the start of the process.
const BOOT_CALLS: [&str; 9] = [
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/rootfs",
    "PUT /network-interfaces/eth0",
    "PUT /entropy",
    "PUT /balloon",
    "PUT /mmds/config",
    "PUT /mmds",
    "PUT /actions",
];

/// Returns a simulated process to which the driver has attached.
async fn attached(deadlines: Deadlines) -> (FakeFirecracker, Control) {
    let (fake, channels) = FakeFirecracker::start("1.16.1", None);
    let control = Control::attach(channels, &full_config(Start::Boot), deadlines).await;
    (fake, control.expect("attached"))
}

/// Returns the error of attaching to a process that reacts to a call in the given way.
async fn attach_error(call: &str, reaction: Reaction) -> LaunchError {
    let (fake, channels) = FakeFirecracker::start("1.16.1", None);
    fake.react(call, reaction);
    let attached = Control::attach(channels, &config(Start::Boot), short_deadlines()).await;
    attached.expect_err(call)
}

/// Returns the error of a pause to which the process reacts in the given way, and checks that the
/// next call works.
async fn pause_error(reaction: Reaction) -> ControlError {
    let (fake, control) = attached(short_deadlines()).await;
    fake.react("PATCH /vm", reaction);
    let began = Instant::now();
    let error = control.pause().await.expect_err("must fail");
    let took = began.elapsed();
    assert!(took < SHORT + Duration::from_secs(5), "{took:?}");
    fake.react("PATCH /vm", Reaction::Answer(204, String::new()));
    control.resume().await.expect("the client is still usable");
    error
}

fn assert_protocol(error: &ControlError, call: &str, part: &str) {
    match error {
        ControlError::Protocol { command, reason } => {
            assert_eq!(*command, call);
            assert!(
                reason.contains(part),
                "{reason:?} does not contain {part:?}"
            );
        }
        other => panic!("{other:?} is not an invalid answer"),
    }
}

fn assert_lost(error: &ControlError) {
    match error {
        ControlError::Io { source, .. } => {
            let kind = source.kind();
            let is_lost = matches!(
                kind,
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            );
            assert!(is_lost, "{kind:?}");
        }
        other => panic!("{other:?} is not a lost connection"),
    }
}

#[tokio::test]
async fn a_rejected_call_of_a_boot_is_named_and_is_the_last_one() {
    for (index, call) in BOOT_CALLS.iter().enumerate() {
        let (fake, control) = attached(Deadlines::default()).await;
        fake.react(call, Reaction::fault(400, "Not for this VM."));
        let error = control
            .boot(&full_config(Start::Boot))
            .await
            .expect_err(call);
        assert_eq!(rejection(&error, call), "Not for this VM.");
        let calls = fake.calls();
        let of_boot = calls.get(4..).expect("those of the start come first");
        assert_eq!(of_boot, &BOOT_CALLS[..=index]);
    }
}

#[tokio::test]
async fn a_rejected_call_of_the_start_is_named() {
    for call in ["GET /", "GET /version", "PUT /logger", "PUT /metrics"] {
        let error = attach_error(call, Reaction::fault(400, "No.")).await;
        let LaunchError::Control(error) = error else {
            panic!("{error:?}");
        };
        assert_eq!(rejection(&error, call), "No.");
    }
}

#[tokio::test]
async fn every_status_of_a_failure_carries_its_reason() {
    for status in [400, 404, 413, 500] {
        let error = pause_error(Reaction::fault(status, "a\nreason")).await;
        assert_eq!(rejection(&error, "PATCH /vm"), "a reason");
    }
    // The HTTP server answers for itself if it cannot parse a request.
    let own =
        r#"{ "error": "Invalid header.\nAll previous unanswered requests will be dropped." }"#;
    let error = pause_error(Reaction::Answer(400, own.to_owned())).await;
    assert!(rejection(&error, "PATCH /vm").starts_with("Invalid header. "));
}

#[tokio::test]
async fn a_full_disk_is_recognized() {
    let reason = "Create snapshot error: Cannot write memory file: \
                  No space left on device (os error 28)";
    let error = pause_error(Reaction::fault(400, reason)).await;
    assert!(error.is_out_of_space());
    assert!(
        !pause_error(Reaction::fault(400, "No."))
            .await
            .is_out_of_space()
    );
}

#[tokio::test]
async fn a_failure_without_a_reason_is_an_invalid_answer() {
    for body in ["", "{}", "not JSON", r#"{"fault_message":7}"#] {
        let error = pause_error(Reaction::Answer(500, body.to_owned())).await;
        assert_protocol(&error, "PATCH /vm", "status 500 without a reason");
    }
}

#[tokio::test]
async fn a_success_with_an_unexpected_body_is_an_invalid_answer() {
    let error = pause_error(Reaction::Answer(200, r#"{"state":"Paused"}"#.to_owned())).await;
    assert_protocol(&error, "PATCH /vm", "invalid type");
}

#[tokio::test]
async fn garbage_is_an_invalid_answer() {
    for garbage in [
        &b"garbage\r\n\r\n"[..],
        b"\0\0\0\0\0\0",
        b"HTTP/1.1 9999 Odd\r\n\r\n",
    ] {
        let error = pause_error(Reaction::Raw(garbage.to_vec())).await;
        assert_protocol(&error, "PATCH /vm", "");
    }
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_invalid() {
    let error = pause_error(Reaction::Endless).await;
    assert_protocol(&error, "PATCH /vm", "longer than 65536 bytes");
    let mut head = b"HTTP/1.1 204 \r\nX: ".to_vec();
    head.extend(vec![b'x'; 100_000]);
    let error = pause_error(Reaction::Raw(head)).await;
    assert_protocol(&error, "PATCH /vm", "too large");
}

#[tokio::test]
async fn a_crash_before_or_in_the_middle_of_an_answer_is_a_lost_connection() {
    let whole = answer(200, r#"{"fault_message":"long enough to be cut"}"#);
    for end in [0, 5, whole.len() - 10] {
        let part = whole.as_bytes()[..end].to_vec();
        let error = pause_error(Reaction::Raw(part)).await;
        assert_lost(&error);
    }
}

#[tokio::test]
async fn a_call_without_an_answer_ends_at_its_deadline() {
    for reaction in [Reaction::Silent, Reaction::Drip] {
        let error = pause_error(reaction).await;
        let ControlError::Deadline { step, deadline } = error else {
            panic!("{error:?}");
        };
        assert_eq!((step, deadline), ("PATCH /vm", SHORT));
    }
}

#[tokio::test]
async fn a_slow_answer_within_the_deadline_is_a_success() {
    let (fake, control) = attached(Deadlines::default()).await;
    fake.react("PATCH /vm", Reaction::Slow(SHORT * 2));
    control.pause().await.expect("paused");
}

#[tokio::test]
async fn answers_of_the_start_must_have_their_form() {
    for (call, body) in [
        ("GET /", "{}"),
        ("GET /", r#"{"id":"x","state":"Sleeping"}"#),
        ("GET /version", r#"{"version":"1.16.1"}"#),
        ("GET /version", "1.16.1"),
    ] {
        let error = attach_error(call, Reaction::Answer(200, body.to_owned())).await;
        let LaunchError::Control(error) = error else {
            panic!("{error:?}");
        };
        assert_protocol(&error, call, "");
    }
    // A process that has a VM already is not the one that was started.
    let running = r#"{"id":"x","state":"Running","vmm_version":"1.16.1","app_name":"Firecracker"}"#;
    let error = attach_error("GET /", Reaction::Answer(200, running.to_owned())).await;
    let LaunchError::Control(error) = error else {
        panic!("{error:?}");
    };
    assert_protocol(&error, "GET /", "Running");
}

#[tokio::test]
async fn a_version_that_is_not_supported_is_named() {
    for found in ["1.9.1", "0.25.0", "unknown"] {
        let body = format!(r#"{{"firecracker_version":"{found}"}}"#);
        let error = attach_error("GET /version", Reaction::Answer(200, body)).await;
        let text = error.to_string();
        assert!(text.contains(found) && text.contains("1.10"), "{text}");
        assert!(matches!(error, LaunchError::Version { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn driver_waits_until_the_api_listens() {
    let (fake, channels) = FakeFirecracker::prepare("1.16.1", None);
    let path = fake.api_path();
    let late = async {
        sleep(Duration::from_millis(50)).await;
        // The socket exists before a program listens: the first state is refused connections.
        drop(StdListener::bind(&path).expect("bound"));
        sleep(Duration::from_millis(50)).await;
        fs::remove_file(&path).expect("removed");
        fake.serving(StdListener::bind(&path).expect("bound"))
    };
    let config = config(Start::Boot);
    let (control, _fake) = tokio::join!(
        Control::attach(channels, &config, Deadlines::default()),
        late
    );
    control.expect("attached");
}

#[tokio::test]
async fn a_process_that_never_listens_ends_the_launch_at_its_deadline() {
    let (_fake, channels) = FakeFirecracker::prepare("1.16.1", None);
    let attached = Control::attach(channels, &config(Start::Boot), short_deadlines()).await;
    let error = attached.expect_err("must fail");
    let is_deadline = matches!(error, LaunchError::Deadline(deadline) if deadline == SHORT);
    assert!(is_deadline, "{error:?}");
}

#[tokio::test]
async fn a_link_in_place_of_the_socket_is_not_followed() {
    let (fake, channels) = FakeFirecracker::prepare("1.16.1", None);
    let other = tempfile::tempdir().expect("a directory");
    let victim = other.path().join("victim.sock");
    let victim_listener = StdListener::bind(&victim).expect("bound");
    victim_listener.set_nonblocking(true).expect("possible");
    symlink(&victim, fake.api_path()).expect("linked");
    let began = Instant::now();
    let attached = Control::attach(channels, &config(Start::Boot), Deadlines::default()).await;
    let error = attached.expect_err("must fail");
    let LaunchError::Control(ControlError::Io { source, .. }) = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), io::ErrorKind::InvalidInput);
    assert!(began.elapsed() < Duration::from_secs(5));
    let connected = victim_listener.accept().expect_err("no connection");
    assert_eq!(connected.kind(), io::ErrorKind::WouldBlock);
}
