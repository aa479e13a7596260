//! QMP, QEMU's control protocol: one JSON object a line.
//!
//! Source: QEMU's `docs/interop/qmp-spec.txt`. After the greeting, each command is answered by an object with `return` or
//! `error`; objects with `event` may come at any time in between. This client sends one command at a time. It does not
//! use a library because descriptors must travel beside commands (`getfd`), and a dozen commands are all it needs.

use std::{io, os::fd::BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Interest},
    net::{UnixStream, unix},
};

use crate::ControlError;

/// The longest line that is accepted from QEMU, bytes.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// What one line from QEMU says.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    /// With QEMU's version, where it tells one.
    Greeting(Option<String>),
    Return(Value),
    Error(String),
    Event {
        name: String,
        data: Value,
    },
}

/// Reads a line of QMP; `None` if it is not one.
pub(super) fn parse_line(line: &str) -> Option<Line> {
    let mut object: Value = serde_json::from_str(line).ok()?;
    let map = object.as_object_mut()?;
    if let Some(greeting) = map.get("QMP") {
        return Some(Line::Greeting(version_of(greeting)));
    }
    if let Some(value) = map.remove("return") {
        return Some(Line::Return(value));
    }
    if let Some(error) = map.remove("error") {
        let text = error["desc"].as_str().unwrap_or("no reason given");
        return Some(Line::Error(text.to_owned()));
    }
    let name = map.get("event")?.as_str()?.to_owned();
    let data = map.remove("data").unwrap_or(Value::Null);
    Some(Line::Event { name, data })
}

/// Three numbers, as `qemu --version` has them.
fn version_of(greeting: &Value) -> Option<String> {
    let qemu = &greeting["version"]["qemu"];
    let number = |name: &str| qemu[name].as_u64();
    let (major, minor, micro) = (number("major")?, number("minor")?, number("micro")?);
    Some(format!("{major}.{minor}.{micro}"))
}

/// A connection to QEMU.
pub(super) struct Qmp {
    reader: BufReader<unix::OwnedReadHalf>,
    writer: unix::OwnedWriteHalf,
    /// The line that is being read: kept here so that a reader may be dropped in its middle.
    partial: Vec<u8>,
    /// Why the guest stopped, if QEMU has said so.
    shutdown_reason: Option<String>,
    /// The last status of a migration that QEMU has told.
    migration: Option<String>,
    /// It has stopped the guest because of a write that failed.
    stalled: bool,
    /// QEMU's version, if it has told.
    version: Option<String>,
}

impl Qmp {
    /// Greets QEMU and leaves negotiation mode.
    pub(super) async fn negotiate(stream: UnixStream) -> Result<Self, ControlError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            partial: Vec::new(),
            shutdown_reason: None,
            migration: None,
            stalled: false,
            version: None,
        };
        loop {
            if let Line::Greeting(version) = qmp.read_line().await.map_err(lost)? {
                qmp.version = version;
                break;
            }
        }
        qmp.command("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Sends a command and waits for its answer.
    pub(super) async fn command(
        &mut self,
        name: &'static str,
        arguments: Value,
    ) -> Result<Value, ControlError> {
        self.writer
            .write_all(text_of(name, arguments).as_bytes())
            .await
            .map_err(lost)?;
        self.answer(name).await
    }

    /// Sends a command with a descriptor beside it, and waits for its answer.
    pub(super) async fn command_with_fd(
        &mut self,
        name: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, ControlError> {
        let text = text_of(name, arguments);
        let socket: &UnixStream = self.writer.as_ref();
        let sent = socket
            .async_io(Interest::WRITABLE, || {
                send_with_fd(socket, text.as_bytes(), fd)
            })
            .await
            .map_err(lost)?;
        self.writer
            .write_all(&text.as_bytes()[sent..])
            .await
            .map_err(lost)?;
        self.answer(name).await
    }

    async fn answer(&mut self, name: &'static str) -> Result<Value, ControlError> {
        loop {
            match self.read_line().await.map_err(lost)? {
                Line::Return(value) => return Ok(value),
                Line::Error(reason) => {
                    return Err(ControlError::Refused {
                        command: name,
                        reason,
                    });
                }
                Line::Greeting(_) | Line::Event { .. } => {}
            }
        }
    }

    /// Waits until a migration that was begun has ended; true if it succeeded.
    pub(super) async fn migration_ended(&mut self) -> Result<bool, ControlError> {
        loop {
            match self.migration.as_deref() {
                Some("completed") => return Ok(true),
                Some("failed" | "cancelled") => return Ok(false),
                _ => {}
            }
            self.read_line().await.map_err(lost)?;
        }
    }

    /// Forgets the status of the migration before.
    pub(super) fn expect_migration(&mut self) {
        self.migration = None;
    }

    /// Reads events until QEMU closes the connection. Cancel safe.
    pub(super) async fn drain(&mut self) {
        while self.read_line().await.is_ok() {}
    }

    /// QEMU's version, if it has told.
    pub(super) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Why the guest stopped, if QEMU has said so.
    pub(super) fn shutdown_reason(&self) -> Option<&str> {
        self.shutdown_reason.as_deref()
    }

    /// Whether the guest stands still because a write of it failed.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Cancel safe: what was read of a line is kept for the next call.
    async fn read_line(&mut self) -> io::Result<Line> {
        loop {
            let available = self.reader.fill_buf().await?;
            if available.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let take = end.map_or(available.len(), |at| at + 1);
            self.partial.extend_from_slice(&available[..take]);
            self.reader.consume(take);
            if self.partial.len() > MAX_LINE_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if end.is_some() {
                break;
            }
        }
        let line = std::mem::take(&mut self.partial);
        let line = std::str::from_utf8(&line).ok().and_then(parse_line);
        let line = line.ok_or(io::ErrorKind::InvalidData)?;
        if let Line::Event { name, data } = &line {
            self.note_event(name, data);
        }
        Ok(line)
    }

    fn note_event(&mut self, name: &str, data: &Value) {
        tracing::debug!(event = %name, "QMP event");
        match name {
            "SHUTDOWN" => {
                let reason = data["reason"].as_str().unwrap_or("unknown");
                self.shutdown_reason = Some(reason.to_owned());
            }
            // By default a full disk stops the guest; any other error is the guest's to see.
            "BLOCK_IO_ERROR" if data["action"] == "stop" => self.stalled = true,
            "RESUME" => self.stalled = false,
            "MIGRATION" => self.migration = data["status"].as_str().map(str::to_owned),
            _ => {}
        }
    }
}

fn text_of(name: &str, arguments: Value) -> String {
    let mut command = json!({ "execute": name });
    if !arguments.is_null() {
        command["arguments"] = arguments;
    }
    let mut text = command.to_string();
    text.push('\n');
    text
}

fn send_with_fd(socket: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let fds = [fd];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(
        socket,
        &[io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(sent)
}

fn lost(source: io::Error) -> ControlError {
    ControlError::Io {
        step: "talk to QEMU",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_the_specification_are_understood() {
        assert_eq!(
            parse_line(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#),
            Some(Line::Greeting(None))
        );
        let version = r#"{"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}"#;
        assert_eq!(
            parse_line(&format!(r#"{{"QMP": {{"version": {version}}}}}"#)),
            Some(Line::Greeting(Some("7.2.22".to_owned())))
        );
        assert_eq!(
            parse_line(r#"{"return": {}}"#),
            Some(Line::Return(json!({})))
        );
        assert_eq!(
            parse_line(r#"{"error": {"class": "GenericError", "desc": "no"}}"#),
            Some(Line::Error("no".into()))
        );
        assert_eq!(
            parse_line(
                r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#
            ),
            Some(Line::Event {
                name: "SHUTDOWN".into(),
                data: json!({"guest": true, "reason": "guest-reset"})
            })
        );
        assert_eq!(parse_line("[]"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in ".*") {
            let _ = parse_line(&line);
        }
    }

    #[tokio::test]
    async fn a_refused_command_gives_qemus_words() {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let qemu = tokio::spawn(async move {
            let (reader, mut writer) = theirs.into_split();
            let mut lines = BufReader::new(reader).lines();
            writer.write_all(b"{\"QMP\": {}}\n").await.expect("open");
            lines.next_line().await.expect("open");
            writer
                .write_all(b"{\"event\": \"RESUME\"}\n{\"return\": {}}\n")
                .await
                .expect("open");
            lines.next_line().await.expect("open");
            writer
                .write_all(b"{\"error\": {\"desc\": \"not now\"}}\n")
                .await
                .expect("open");
        });
        let mut qmp = Qmp::negotiate(ours).await.expect("greeted");
        let refused = qmp.command("cont", Value::Null).await;
        assert!(
            matches!(&refused, Err(ControlError::Refused { command: "cont", reason }) if reason == "not now"),
            "{refused:?}"
        );
        qemu.await.expect("no panic");
    }
}
