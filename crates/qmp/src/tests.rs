#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::{
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

use super::*;

const LONG: Duration = Duration::from_secs(20);

/// Names of the events of a connection, in order.
#[derive(Debug, Default)]
struct Names(Vec<String>);

impl Subscriber for Names {
    fn on_event(&mut self, name: &str, _data: &Value) {
        self.0.push(name.to_owned());
    }
}

/// Other end of a connection.
struct Peer(BufReader<UnixStream>);

impl Peer {
    fn new(end: OwnedFd) -> Self {
        let stream = std::os::unix::net::UnixStream::from(end);
        stream.set_nonblocking(true).unwrap();
        Self(BufReader::new(UnixStream::from_std(stream).unwrap()))
    }

    /// Reads a command. Returns its name and id.
    async fn command(&mut self) -> (String, u64) {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        let name = command["execute"].as_str().unwrap().to_owned();
        (name, command["id"].as_u64().unwrap())
    }

    async fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    async fn reply(&mut self, id: u64, value: &Value) {
        self.send(&format!("{}\n", json!({ "return": value, "id": id })))
            .await;
    }

    async fn greet(&mut self) {
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 22 } });
        self.send(&format!("{}\n", json!({ "QMP": { "version": version } })))
            .await;
        let (name, id) = self.command().await;
        assert_eq!(name, "qmp_capabilities");
        self.reply(id, &json!({})).await;
    }
}

async fn connect() -> (Qmp<Names>, Peer) {
    let (ours, theirs) = socket_pair().unwrap();
    let mut peer = Peer::new(theirs);
    let (qmp, ()) = tokio::join!(Qmp::negotiate(ours, Names::default(), LONG), peer.greet());
    (qmp.unwrap(), peer)
}

#[tokio::test]
async fn the_greeting_contains_the_version() {
    let (qmp, _peer) = connect().await;
    assert_eq!(qmp.version(), Some("7.2.22"));
}

#[tokio::test]
async fn a_peer_that_does_not_greet_times_out() {
    let (ours, _theirs) = socket_pair().unwrap();
    let failed = Qmp::negotiate(ours, Names::default(), Duration::from_millis(20)).await;
    assert!(matches!(failed.err(), Some(QmpError::Deadline { .. })));
}

#[tokio::test]
async fn a_rejected_command_returns_the_class_and_the_description() {
    let (mut qmp, mut peer) = connect().await;
    let serve = async {
        let (_, id) = peer.command().await;
        let error = json!({ "class": "DeviceNotFound", "desc": "no such disk" });
        peer.send(&format!("{}\n", json!({ "error": error, "id": id })))
            .await;
    };
    let (rejected, ()) = tokio::join!(qmp.command("block-stream", json!({})), serve);
    let Err(QmpError::Command {
        command,
        class,
        desc,
    }) = rejected
    else {
        panic!("{rejected:?}");
    };
    assert_eq!(
        (command, class.as_str(), desc.as_str()),
        ("block-stream", "DeviceNotFound", "no such disk")
    );
}

#[tokio::test]
async fn a_late_reply_does_not_answer_the_next_command() {
    let (mut qmp, mut peer) = connect().await;
    let short = Duration::from_millis(20);
    let late = qmp
        .within("stop the guest", short)
        .command("stop", Value::Null)
        .await;
    assert!(
        matches!(
            late,
            Err(QmpError::Deadline {
                step: "stop the guest",
                ..
            })
        ),
        "{late:?}"
    );
    let serve = async {
        let (name, first) = peer.command().await;
        assert_eq!(name, "stop");
        let (name, second) = peer.command().await;
        assert_eq!(name, "query-status");
        peer.reply(first, &json!("late")).await;
        let error = json!({ "class": "GenericError", "desc": "late" });
        peer.send(&format!("{}\n", json!({ "error": error, "id": first })))
            .await;
        peer.reply(second, &json!("in time")).await;
    };
    let (answer, ()) = tokio::join!(qmp.command("query-status", Value::Null), serve);
    assert_eq!(answer.unwrap(), "in time");
}

#[tokio::test]
async fn a_command_cancelled_in_the_middle_of_its_line_is_completed_before_the_next() {
    let (mut qmp, mut peer) = connect().await;
    // More than a socket takes, so that the first command cannot be sent completely.
    let long = json!({ "text": "x".repeat(4 << 20) });
    let short = Duration::from_millis(50);
    let late = qmp.within("be long", short).command("long", long).await;
    assert!(matches!(late, Err(QmpError::Deadline { .. })), "{late:?}");
    let serve = async {
        assert_eq!(peer.command().await.0, "long");
        let (name, id) = peer.command().await;
        assert_eq!(name, "short");
        peer.reply(id, &json!(1)).await;
    };
    let (answer, ()) = tokio::join!(qmp.command("short", Value::Null), serve);
    assert_eq!(answer.unwrap(), 1);
}

#[tokio::test]
async fn events_between_replies_reach_the_subscriber_in_order() {
    let (mut qmp, mut peer) = connect().await;
    let serve = async {
        let (_, id) = peer.command().await;
        peer.send("{\"event\": \"STOP\"}\n{\"event\": \"RES").await;
        tokio::task::yield_now().await;
        peer.send("UME\"}\n").await;
        peer.reply(id, &json!({})).await;
        peer.send("{\"event\": \"MIGRATION\"}\n").await;
    };
    let (done, ()) = tokio::join!(qmp.command("cont", Value::Null), serve);
    done.unwrap();
    assert_eq!(qmp.subscriber().0, ["STOP", "RESUME"]);
    let mut session = qmp.within("migrate", LONG);
    let third = session.wait_for(|names| names.0.get(2).cloned()).await;
    assert_eq!(third.unwrap(), "MIGRATION");
}

#[tokio::test]
async fn an_awaited_event_has_the_deadline_of_its_session() {
    let (mut qmp, mut peer) = connect().await;
    peer.send("{\"event\": \"STOP\"}\n").await;
    let mut session = qmp.within("migrate", Duration::from_millis(20));
    let missing = session.wait_for(|names| names.0.get(1).cloned()).await;
    assert!(
        matches!(
            missing,
            Err(QmpError::Deadline {
                step: "migrate",
                ..
            })
        ),
        "{missing:?}"
    );
}

#[tokio::test]
async fn a_closed_connection_fails_calls_and_ends_the_drain() {
    let (mut qmp, mut peer) = connect().await;
    let serve = async {
        peer.command().await;
        peer.send("{\"event\": \"SHUTDOWN\"}\n").await;
        drop(peer);
    };
    let (failed, ()) = tokio::join!(qmp.command("cont", Value::Null), serve);
    assert!(matches!(failed, Err(QmpError::Closed)), "{failed:?}");
    assert_eq!(qmp.subscriber().0, ["SHUTDOWN"]);
    qmp.drain().await;
    let failed = qmp.command("cont", Value::Null).await;
    assert!(matches!(failed, Err(QmpError::Io(_))), "{failed:?}");
}

#[tokio::test]
async fn an_invalid_message_ends_the_use_of_the_connection() {
    for garbage in [
        "no JSON\n",
        "[]\n",
        "{\"what\": 1}\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n",
    ] {
        let (mut qmp, mut peer) = connect().await;
        let serve = async {
            let (_, id) = peer.command().await;
            peer.send(garbage).await;
            peer.reply(id, &json!({})).await;
        };
        let (failed, ()) = tokio::join!(qmp.command("cont", Value::Null), serve);
        assert!(
            matches!(failed, Err(QmpError::Malformed(_))),
            "{garbage}: {failed:?}"
        );
        let again = qmp.command("cont", Value::Null).await;
        assert!(
            matches!(again, Err(QmpError::Malformed(_))),
            "{garbage}: {again:?}"
        );
    }
}

#[tokio::test]
async fn a_line_without_end_takes_no_more_than_the_limit() {
    let (mut qmp, mut peer) = connect().await;
    let endless = tokio::spawn(async move {
        let piece = "x".repeat(64 * 1024);
        while peer.0.write_all(piece.as_bytes()).await.is_ok() {}
    });
    let failed = qmp.command("cont", Value::Null).await;
    assert!(matches!(failed, Err(QmpError::Malformed(_))), "{failed:?}");
    drop(qmp);
    endless.await.unwrap();
}

#[tokio::test]
async fn a_descriptor_arrives_with_its_command() {
    let (ours, theirs) = socket_pair().unwrap();
    let mut peer = Peer::new(theirs.try_clone().unwrap());
    let (qmp, ()) = tokio::join!(Qmp::negotiate(ours, Names::default(), LONG), peer.greet());
    let mut qmp = qmp.unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut session = qmp.within("pass a descriptor", Duration::from_millis(20));
    let sent = session
        .command_with_fd("getfd", json!({ "fdname": "state" }), reader.as_fd())
        .await;
    // The peer does not answer. The command is read below.
    assert!(matches!(sent, Err(QmpError::Deadline { .. })), "{sent:?}");
    let (mut received, command) = received_fd(&theirs);
    assert!(
        command.contains("getfd") && command.ends_with('\n'),
        "{command}"
    );
    writer.write_all(b"through").unwrap();
    drop(writer);
    let mut text = String::new();
    received.read_to_string(&mut text).unwrap();
    assert_eq!(text, "through");
}

/// Receives one message, which must have a descriptor.
fn received_fd(socket: &OwnedFd) -> (std::fs::File, String) {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut bytes = [0; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let length = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap()
        .bytes;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    (fd.unwrap().into(), text)
}
