//! HTTP as raw bytes on a socket.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use crate::world::address;

/// Read timeout for a silent agent.
const SILENCE: Duration = Duration::from_secs(30);

/// HTTP response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: String,
    pub(crate) body: Vec<u8>,
    /// True if the body is complete: it has the promised length or ended with the last chunk.
    pub(crate) complete: bool,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.headers.lines();
        let mut fields = lines.filter_map(|line| line.split_once(':'));
        let field = fields.find(|(field, _)| field.eq_ignore_ascii_case(name))?;
        Some(field.1.trim())
    }

    /// Returns the frames of a Connect stream as flags and payload.
    pub(crate) fn frames(&self) -> Vec<(u8, serde_json::Value)> {
        let (mut frames, mut rest) = (Vec::new(), &self.body[..]);
        while let [flags, a, b, c, d, tail @ ..] = rest {
            let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
            frames.push((
                *flags,
                serde_json::from_slice(&tail[..length]).expect("JSON"),
            ));
            rest = &tail[length..];
        }
        frames
    }
}

pub(crate) fn connect() -> TcpStream {
    let stream = TcpStream::connect(address()).expect("it listens");
    stream.set_read_timeout(Some(SILENCE)).expect("set");
    stream.set_write_timeout(Some(SILENCE)).expect("set");
    stream
}

/// Sends a request line with headers and a body, and reads the response.
pub(crate) fn call(head: &str, body: &[u8]) -> Answer {
    let mut stream = connect();
    send(&mut stream, head, body);
    read(&mut stream)
}

/// Sends a whole request that closes its connection. Adds the headers that every request has.
pub(crate) fn send(stream: &mut TcpStream, head: &str, body: &[u8]) {
    let mut request = format!("{head}\r\nhost: x\r\nconnection: close\r\n");
    if !head.to_ascii_lowercase().contains("transfer-encoding")
        && !head.to_ascii_lowercase().contains("content-length")
    {
        request.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    // The agent may respond and close the connection before it has read everything.
    let _ = stream.write_all(body);
}

/// Reads until the connection ends and parses the result as a response.
pub(crate) fn read(stream: &mut TcpStream) -> Answer {
    let mut all = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => all.extend_from_slice(&piece[..length]),
            Err(error)
                if error.kind() == std::io::ErrorKind::ConnectionReset && !all.is_empty() =>
            {
                break;
            }
            Err(error) => panic!("{error}, after {:?}", String::from_utf8_lossy(&all)),
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
    parse(&all)
}

fn parse(all: &[u8]) -> Answer {
    let end = all.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no response: {:?}", String::from_utf8_lossy(all)));
    let headers = String::from_utf8_lossy(&all[..end]).into_owned();
    let status = headers.split(' ').nth(1).and_then(|word| word.parse().ok());
    let mut answer = Answer {
        status: status.expect("a status"),
        headers,
        body: all[end + 4..].to_vec(),
        complete: true,
    };
    if answer.header("transfer-encoding").is_some() {
        (answer.body, answer.complete) = unchunk(&answer.body);
    } else if let Some(length) = answer.header("content-length") {
        answer.complete = answer.body.len() == length.parse::<usize>().expect("a number");
    }
    answer
}

fn unchunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|two| two == b"\r\n") else {
            return (body, false);
        };
        let text = std::str::from_utf8(&rest[..end]).expect("a length");
        let length = usize::from_str_radix(text, 16).expect("a length");
        rest = &rest[end + 2..];
        if length == 0 {
            return (body, true);
        }
        if rest.len() < length + 2 {
            body.extend_from_slice(rest);
            return (body, false);
        }
        body.extend_from_slice(&rest[..length]);
        rest = &rest[length + 2..];
    }
}

/// Encodes one frame of a Connect stream.
pub(crate) fn frame(flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short");
    let mut frame = vec![flags];
    frame.extend(length.to_be_bytes());
    frame.extend(payload);
    frame
}
