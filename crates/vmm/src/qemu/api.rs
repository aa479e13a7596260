//! QMP, QEMU's control protocol: one JSON object a line.
//!
//! Source: QEMU's `docs/interop/qmp-spec.txt`. After the greeting, each command is answered by an object with `return` or
//! `error`; objects with `event` may come at any time in between. This client sends one command at a time. It does not
//! use a library because descriptors must travel beside commands (`getfd`), and five commands are all it needs.

use std::io;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixStream, unix},
};

use crate::LaunchError;

/// The longest line that is accepted from QEMU, bytes.
const MAX_LINE_BYTES: u64 = 1024 * 1024;

/// What one line from QEMU says.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    Greeting,
    Return(Value),
    Error(String),
    Event { name: String, data: Value },
}

/// Reads a line of QMP; `None` if it is not one.
pub(super) fn parse_line(line: &str) -> Option<Line> {
    let mut object: Value = serde_json::from_str(line).ok()?;
    let map = object.as_object_mut()?;
    if map.contains_key("QMP") {
        return Some(Line::Greeting);
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

/// A connection to QEMU.
pub(super) struct Qmp {
    reader: BufReader<unix::OwnedReadHalf>,
    writer: unix::OwnedWriteHalf,
    /// Why the guest stopped, if QEMU has said so.
    shutdown_reason: Option<String>,
}

impl Qmp {
    /// Greets QEMU and leaves negotiation mode.
    pub(super) async fn negotiate(stream: UnixStream) -> Result<Self, LaunchError> {
        let (reader, writer) = stream.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            shutdown_reason: None,
        };
        loop {
            if qmp.read_line().await.map_err(lost)? == Line::Greeting {
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
    ) -> Result<Value, LaunchError> {
        let mut command = json!({ "execute": name });
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        let mut text = command.to_string();
        text.push('\n');
        self.writer.write_all(text.as_bytes()).await.map_err(lost)?;
        loop {
            match self.read_line().await.map_err(lost)? {
                Line::Return(value) => return Ok(value),
                Line::Error(reason) => {
                    return Err(LaunchError::Refused {
                        command: name,
                        reason,
                    });
                }
                Line::Greeting | Line::Event { .. } => {}
            }
        }
    }

    /// Reads events until QEMU closes the connection. Cancel safe but for the line that is being read.
    pub(super) async fn drain(&mut self) {
        while self.read_line().await.is_ok() {}
    }

    /// Why the guest stopped, if QEMU has said so.
    pub(super) fn shutdown_reason(&self) -> Option<&str> {
        self.shutdown_reason.as_deref()
    }

    async fn read_line(&mut self) -> io::Result<Line> {
        let mut text = String::new();
        let read = (&mut self.reader)
            .take(MAX_LINE_BYTES)
            .read_line(&mut text)
            .await?;
        if read == 0 || !text.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = parse_line(&text).ok_or(io::ErrorKind::InvalidData)?;
        if let Line::Event { name, data } = &line {
            tracing::debug!(event = %name, "QMP event");
            if name == "SHUTDOWN" {
                let reason = data["reason"].as_str().unwrap_or("unknown");
                self.shutdown_reason = Some(reason.to_owned());
            }
        }
        Ok(line)
    }
}

fn lost(source: io::Error) -> LaunchError {
    LaunchError::Io {
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
            Some(Line::Greeting)
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
            matches!(&refused, Err(LaunchError::Refused { command: "cont", reason }) if reason == "not now"),
            "{refused:?}"
        );
        qemu.await.expect("no panic");
    }
}
