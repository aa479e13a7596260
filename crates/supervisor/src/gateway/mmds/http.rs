//! Part of HTTP/1.1 that the metadata service needs: request heads and complete responses. No I/O.

use serde_json::Value;

/// Maximum length of a request head, in bytes.
pub const MAX_HEAD_BYTES: usize = 4096;

/// Maximum number of header lines of a request.
const MAX_HEADERS: usize = 32;

/// Request without its body, which is ignored.
#[derive(Debug)]
pub struct Request<'a> {
    /// Method as received.
    pub method: &'a str,
    /// Path and query as received.
    pub path: &'a str,
    headers: Vec<(&'a str, &'a [u8])>,
}

/// The bytes are not a request, or the head is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an HTTP/1 request, or the head is longer than {MAX_HEAD_BYTES} bytes")]
pub struct BadRequest;

impl<'a> Request<'a> {
    /// Parses a request head. `None` if the head is still incomplete.
    ///
    /// # Errors
    /// [`BadRequest`], also if the head does not end within [`MAX_HEAD_BYTES`].
    pub fn parse(bytes: &'a [u8]) -> Result<Option<Self>, BadRequest> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        let status = head.parse(bytes).map_err(|_| BadRequest)?;
        let httparse::Status::Complete(length) = status else {
            if bytes.len() >= MAX_HEAD_BYTES {
                return Err(BadRequest);
            }
            return Ok(None);
        };
        let (Some(method), Some(path)) = (head.method, head.path) else {
            return Err(BadRequest);
        };
        if length > MAX_HEAD_BYTES || !path.starts_with('/') {
            return Err(BadRequest);
        }
        let headers = head.headers.iter().map(|h| (h.name, h.value)).collect();
        Ok(Some(Self {
            method,
            path,
            headers,
        }))
    }

    /// Returns the value of the first header with one of these names.
    pub(super) fn header(&self, names: &[&str]) -> Option<&'a [u8]> {
        let is_it = |name: &str| names.iter().any(|wanted| name.eq_ignore_ascii_case(wanted));
        let found = self.headers.iter().find(|(name, _)| is_it(name));
        found.map(|(_, value)| *value)
    }

    /// True if the client accepts JSON.
    pub(super) fn accepts_json(&self) -> bool {
        let accept = self.header(&["accept"]).unwrap_or_default();
        let accept = String::from_utf8_lossy(accept).to_ascii_lowercase();
        accept.contains("application/json")
    }
}

/// Response. The connection is closed after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    content_type: &'static str,
    header: Option<String>,
    /// Body.
    pub body: String,
}

impl Response {
    /// Creates a plain text response.
    pub(super) fn text(status: u16, body: &str) -> Self {
        Self {
            status,
            content_type: "text/plain",
            header: None,
            body: body.to_owned(),
        }
    }

    /// Creates a JSON response.
    pub(super) fn json(value: &Value) -> Self {
        Self {
            status: 200,
            content_type: "application/json",
            header: None,
            body: value.to_string(),
        }
    }

    /// Creates the response to an invalid request.
    #[must_use]
    pub fn bad_request() -> Self {
        Self::text(400, "Invalid request.")
    }

    /// Adds a header line.
    pub(super) fn with_header(self, line: impl Into<String>) -> Self {
        Self {
            header: Some(line.into()),
            ..self
        }
    }

    /// Returns the bytes to send.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            _ => "Not Implemented",
        };
        let header = self.header.as_ref();
        let header = header.map_or_else(String::new, |line| format!("{line}\r\n"));
        format!(
            "HTTP/1.1 {} {reason}\r\nServer: Wrenn\r\nConnection: close\r\n{header}Content-Type: {}\r\nContent-Length: {}\r\n\r\n{}",
            self.status,
            self.content_type,
            self.body.len(),
            self.body,
        )
        .into_bytes()
    }
}
