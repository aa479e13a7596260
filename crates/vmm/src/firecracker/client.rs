//! Client of Firecracker's API: HTTP over a Unix socket, one connection per call.
//!
//! Firecracker is not trusted. The socket is opened without following links, every call has a
//! deadline, and the size of an answer is limited. A call that fails leaves the client usable.
//! Firecracker serves one call at a time, so a call after one that timed out may wait for it.

use std::{error::Error, io, time::Duration};

use bytes::Bytes;
use http::{StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    net::UnixStream,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use wrenn_jail::SocketDir;

use super::api::{Fault, Request};
use crate::ControlError;

/// Name of the socket that Firecracker binds.
pub(super) const API_SOCKET: &str = "api.sock";

/// Maximum size of an answer's head, in bytes. The smallest value that the HTTP library permits.
const MAX_HEAD_BYTES: usize = 8192;

/// Maximum size of an answer's body, in bytes. Balloon statistics are the largest.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// Maximum length of a reason that Firecracker reports, in characters.
const MAX_REASON_CHARS: usize = 1024;

/// Interval between two attempts to connect to a Firecracker that starts.
const CONNECT_PAUSE: Duration = Duration::from_millis(1);

/// Deadlines of the calls.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Until the API of a new process accepts connections.
    pub start: Duration,
    /// For configuration and questions, which are answered at once.
    pub configure: Duration,
    /// For starting, pausing and resuming virtual CPUs. Firecracker itself waits up to 30 s for
    /// each of them.
    pub cpus: Duration,
    /// For loading a snapshot, with the page faults that this causes.
    pub load: Duration,
    /// For creating a snapshot of any size. See [`per_mib`](Self::per_mib).
    pub create: Duration,
    /// For creating a snapshot, per MiB of guest memory.
    pub per_mib: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(30),
            configure: Duration::from_secs(30),
            cpus: Duration::from_secs(60),
            load: Duration::from_secs(120),
            create: Duration::from_secs(300),
            // 16 MiB per second: a slow disk that others use, too.
            per_mib: Duration::from_micros(62_500),
        }
    }
}

impl Deadlines {
    /// Returns the deadline for creating a snapshot of a guest with this memory.
    #[must_use]
    pub fn create_with(&self, memory_mib: u32) -> Duration {
        self.create + self.per_mib * memory_mib
    }
}

/// Client of the API of one Firecracker process.
#[derive(Debug)]
pub struct Client {
    sockets: SocketDir,
}

impl Client {
    /// Creates a client. Does not connect yet.
    #[must_use]
    pub fn new(sockets: SocketDir) -> Self {
        Self { sockets }
    }

    /// Directory of the socket.
    pub(super) fn sockets(&self) -> &SocketDir {
        &self.sockets
    }

    /// Waits until a process that starts accepts connections.
    ///
    /// # Errors
    /// `Deadline` if it does not in time; `Io` if its socket is not usable.
    pub async fn wait_for_start(&self, deadline: Duration) -> Result<(), ControlError> {
        let step = "start its API";
        let end = Instant::now() + deadline;
        while Instant::now() < end {
            match self.connect().await {
                Ok(_) => return Ok(()),
                Err(error) if is_starting(&error) => sleep(CONNECT_PAUSE).await,
                Err(source) => return Err(ControlError::Io { step, source }),
            }
        }
        Err(ControlError::Deadline { step, deadline })
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// `Rejected` with the reason if Firecracker reports a failure; `Deadline`; `Protocol` if the
    /// answer is not one of the API; `Io` if the connection fails, for example because the process
    /// exited.
    pub async fn send<R: Request>(
        &self,
        request: &R,
        deadline: Duration,
    ) -> Result<R::Answer, ControlError> {
        let call = R::CALL;
        let (status, body) = timeout(deadline, self.exchange(request))
            .await
            .map_err(|_| ControlError::Deadline {
                step: call,
                deadline,
            })??;
        if !status.is_success() {
            return Err(rejected(call, status, &body));
        }
        // A call without an answer has an empty body.
        let text: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(text).map_err(|error| protocol(call, error))
    }

    async fn exchange<R: Request>(&self, request: &R) -> Result<(StatusCode, Bytes), ControlError> {
        let call = R::CALL;
        let io = |source| ControlError::Io { step: call, source };
        let request = http_request(request).map_err(|error| protocol(call, error))?;
        let stream = self.connect().await.map_err(io)?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(call, &error))?;
        let _connection = Aborting(tokio::spawn(async move {
            // Its error is that of the call.
            let _ = connection.await;
        }));
        let answer = sender.send_request(request).await;
        let (head, body) = answer.map_err(|error| broken(call, &error))?.into_parts();
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|error| broken(call, error.as_ref()))?;
        Ok((head.status, body.to_bytes()))
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let socket = self.sockets.find(API_SOCKET)?;
        UnixStream::connect(socket.address()).await
    }
}

/// Task that ends with its call.
struct Aborting(JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// True if the socket does not exist, or is not listened on yet.
fn is_starting(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn http_request<R: Request>(
    request: &R,
) -> Result<http::Request<Full<Bytes>>, Box<dyn Error + Send + Sync>> {
    let (method, path) = R::CALL.split_once(' ').unwrap_or(("GET", R::CALL));
    let body = match method {
        "GET" => Vec::new(),
        _ => serde_json::to_vec(request)?,
    };
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body.into()))?;
    Ok(request)
}

/// Returns the error for an answer that reports a failure.
fn rejected(command: &'static str, status: StatusCode, body: &[u8]) -> ControlError {
    match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => ControlError::Rejected {
            command,
            reason: printable(&fault.fault_message),
        },
        Err(_) => protocol(
            command,
            format!("status {} without a reason", status.as_u16()),
        ),
    }
}

/// Returns the error for a connection that failed, or for something that is not HTTP.
fn broken(command: &'static str, error: &(dyn Error + 'static)) -> ControlError {
    let io = |source| ControlError::Io {
        step: command,
        source,
    };
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            let reason = format!("the body is longer than {MAX_BODY_BYTES} bytes");
            return protocol(command, reason);
        }
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return io(error.kind().into());
        }
        if let Some(error) = error.downcast_ref::<hyper::Error>()
            && (error.is_incomplete_message() || error.is_canceled() || error.is_closed())
        {
            return io(io::ErrorKind::UnexpectedEof.into());
        }
        cause = error.source();
    }
    protocol(command, error.to_string())
}

fn protocol(command: &'static str, reason: impl ToString) -> ControlError {
    ControlError::Protocol {
        command,
        reason: printable(&reason.to_string()),
    }
}

/// Shortens a text of Firecracker, and makes one line of it.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MAX_REASON_CHARS).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_guests_have_more_time_for_a_snapshot() {
        let deadlines = Deadlines::default();
        assert!(deadlines.create_with(0) >= Duration::from_secs(300));
        // 20 GiB at 16 MiB per second.
        assert!(deadlines.create_with(20_480) >= Duration::from_secs(1580));
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(printable("a\nb\u{1b}[1m"), "a b [1m");
        assert_eq!(printable(&"x".repeat(9000)).len(), MAX_REASON_CHARS);
    }
}
