//! QMP, the control protocol of QEMU: one JSON object per line.
//!
//! Source: QEMU's `docs/interop/qmp-spec.txt`. After the greeting, QEMU answers each command with
//! an object that has `return` or `error`. Objects with `event` may arrive at any time in between.
//! This client sends one command at a time. It uses no library, because some commands are sent
//! together with descriptors (`getfd`), and it needs only a dozen commands.

use std::{io, os::fd::BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Interest},
    net::{UnixStream, unix},
};

use crate::ControlError;

/// Maximum length of a line from QEMU, in bytes.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// Message on one line from QEMU.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// Carries QEMU's version, if the greeting contains one.
    Greeting(Option<String>),
    /// Successful response to a command.
    Return(Value),
    /// Failed command, with QEMU's description of the failure.
    Error(String),
    /// Event.
    Event {
        /// Name of the event.
        name: String,
        /// Data of the event; null if it has none.
        data: Value,
    },
}

/// Parses a line of QMP. Returns `None` if it is not a QMP message.
#[must_use]
pub fn parse_line(line: &str) -> Option<Line> {
    let mut object: Value = serde_json::from_str(line).ok()?;
    let map = object.as_object_mut()?;
    if let Some(greeting) = map.get("QMP") {
        return Some(Line::Greeting(version_of(greeting)));
    }
    if let Some(value) = map.remove("return") {
        return Some(Line::Return(value));
    }
    if let Some(error) = map.remove("error") {
        let text = error["desc"].as_str().unwrap_or("no reason reported");
        return Some(Line::Error(text.to_owned()));
    }
    let name = map.get("event")?.as_str()?.to_owned();
    let data = map.remove("data").unwrap_or(Value::Null);
    Some(Line::Event { name, data })
}

/// Returns the three numbers that `qemu --version` prints.
fn version_of(greeting: &Value) -> Option<String> {
    let qemu = &greeting["version"]["qemu"];
    let number = |name: &str| qemu[name].as_u64();
    let (major, minor, micro) = (number("major")?, number("minor")?, number("micro")?);
    Some(format!("{major}.{minor}.{micro}"))
}

/// Connection to QEMU.
pub(super) struct Qmp {
    reader: BufReader<unix::OwnedReadHalf>,
    writer: unix::OwnedWriteHalf,
    /// Line that is being read. Kept here so that a read may be cancelled in the middle of a line.
    partial: Vec<u8>,
    /// Reason for the guest's shutdown, if QEMU has reported one.
    shutdown_reason: Option<String>,
    /// Last migration status reported by QEMU.
    migration: Option<String>,
    /// True if QEMU has paused the guest after a failed write.
    stalled: bool,
    /// QEMU's version, if it has been reported.
    version: Option<String>,
}

impl Qmp {
    /// Reads QEMU's greeting and leaves negotiation mode.
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

    /// Sends a command and waits for its response.
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

    /// Sends a command together with a descriptor and waits for its response.
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

    /// Waits for the end of a migration that was started. Returns true if it succeeded.
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

    /// Clears the status of the previous migration.
    pub(super) fn expect_migration(&mut self) {
        self.migration = None;
    }

    /// Reads events until QEMU closes the connection. Cancel safe.
    pub(super) async fn drain(&mut self) {
        while self.read_line().await.is_ok() {}
    }

    /// QEMU's version, if it has been reported.
    pub(super) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Reason for the guest's shutdown, if QEMU has reported one.
    pub(super) fn shutdown_reason(&self) -> Option<&str> {
        self.shutdown_reason.as_deref()
    }

    /// True if the guest is paused because one of its writes failed.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Reads one line. Cancel safe: the part read so far is kept for the next call.
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
            // By default a full disk pauses the guest. Other errors are reported to the guest.
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
        step: "communicate with QEMU",
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
