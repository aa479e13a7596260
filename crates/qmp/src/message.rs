//! Messages of QMP.

use serde_json::{Value, json};

/// Maximum length of a line from the peer, in bytes.
pub const MAX_LINE_BYTES: usize = 1024 * 1024;

/// Message on one line from the peer.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// Greeting, with the version of QEMU if it contains one.
    Greeting(Option<String>),
    /// Successful reply to a command.
    Return {
        /// Id of the command.
        id: Option<u64>,
        /// Result of the command.
        value: Value,
    },
    /// Reply to a failed command.
    Error {
        /// Id of the command. `None` if the peer could not parse the command.
        id: Option<u64>,
        /// Class of the error.
        class: String,
        /// Description of the error, in English.
        desc: String,
    },
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
pub fn parse_message(line: &str) -> Option<Message> {
    let mut object: Value = serde_json::from_str(line).ok()?;
    let map = object.as_object_mut()?;
    if let Some(greeting) = map.get("QMP") {
        return Some(Message::Greeting(version_of(greeting)));
    }
    let id = map.get("id").and_then(Value::as_u64);
    if let Some(value) = map.remove("return") {
        return Some(Message::Return { id, value });
    }
    if let Some(error) = map.remove("error") {
        let text = |name: &str, missing: &str| error[name].as_str().unwrap_or(missing).to_owned();
        return Some(Message::Error {
            id,
            class: text("class", "GenericError"),
            desc: text("desc", "no reason reported"),
        });
    }
    let name = map.get("event")?.as_str()?.to_owned();
    let data = map.remove("data").unwrap_or(Value::Null);
    Some(Message::Event { name, data })
}

/// Returns the three numbers that `qemu --version` prints.
fn version_of(greeting: &Value) -> Option<String> {
    let qemu = &greeting["version"]["qemu"];
    let number = |name: &str| qemu[name].as_u64();
    let (major, minor, micro) = (number("major")?, number("minor")?, number("micro")?);
    Some(format!("{major}.{minor}.{micro}"))
}

/// Returns the line of a command.
pub(crate) fn command_line(id: u64, name: &str, arguments: Value) -> Vec<u8> {
    let mut command = json!({ "execute": name, "id": id });
    if !arguments.is_null() {
        command["arguments"] = arguments;
    }
    let mut line = command.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_the_specification_are_parsed() {
        assert_eq!(
            parse_message(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#),
            Some(Message::Greeting(None))
        );
        let version = r#"{"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}"#;
        assert_eq!(
            parse_message(&format!(r#"{{"QMP": {{"version": {version}}}}}"#)),
            Some(Message::Greeting(Some("7.2.22".to_owned())))
        );
        assert_eq!(
            parse_message(r#"{"return": {}, "id": 7}"#),
            Some(Message::Return {
                id: Some(7),
                value: json!({})
            })
        );
        assert_eq!(
            parse_message(r#"{"error": {"class": "DeviceNotFound", "desc": "no"}}"#),
            Some(Message::Error {
                id: None,
                class: "DeviceNotFound".into(),
                desc: "no".into()
            })
        );
        assert_eq!(
            parse_message(
                r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#
            ),
            Some(Message::Event {
                name: "SHUTDOWN".into(),
                data: json!({"guest": true, "reason": "guest-reset"})
            })
        );
        assert_eq!(parse_message("[]"), None);
    }

    #[test]
    fn a_command_is_one_line_with_its_id() {
        let line = command_line(3, "getfd", json!({ "fdname": "a\nb" }));
        let line = String::from_utf8(line).expect("JSON");
        assert_eq!(line.matches('\n').count(), 1);
        let command: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(
            command,
            json!({ "execute": "getfd", "id": 3, "arguments": { "fdname": "a\nb" } })
        );
        let line = command_line(4, "stop", Value::Null);
        let command: Value = serde_json::from_slice(&line).expect("JSON");
        assert_eq!(command, json!({ "execute": "stop", "id": 4 }));
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in ".*") {
            let _ = parse_message(&line);
        }
    }
}
