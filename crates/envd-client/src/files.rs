//! Whole-file transfers over HTTP: any size, constant memory, at the pace of the slower side.

use std::{sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use connectrpc::ConnectError;
use futures::{Stream, StreamExt as _};
use http::{Method, header};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use parking_lot::Mutex;
use tokio::time::Instant;
use wrenn_model::limits;
use wrenn_proto::headers;

use crate::{
    EnvdClient,
    client::{bad_request, basic_auth, full},
    deadline::{CALL_DEADLINE, STALL_DEADLINE},
    guest_error,
};

/// Interval at which uploads are checked for a stall.
const STALL_CHECK: Duration = Duration::from_secs(5);

/// File that is being read from the guest.
#[derive(Debug)]
pub struct Download {
    length: Option<u64>,
    body: Incoming,
    /// Data received and not yet returned.
    rest: Bytes,
}

impl Download {
    /// Returns the length of the file, in bytes. `None` if it is known only at its end, as of files
    /// of the kernel.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Returns the next chunk of at most 64 KiB, or `None` after the last one. Fetches data only as
    /// fast as the caller takes it.
    ///
    /// # Errors
    /// If the transfer is interrupted; the end of a truncated file is never reported as `None`.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        if self.rest.is_empty() {
            match self.receive().await? {
                Some(data) => self.rest = data,
                None => return Ok(None),
            }
        }
        let length = self.rest.len().min(limits::FILE_CHUNK_BYTES);
        Ok(Some(self.rest.split_to(length)))
    }

    async fn receive(&mut self) -> Result<Option<Bytes>, ConnectError> {
        loop {
            let frame = tokio::time::timeout(STALL_DEADLINE, self.body.frame()).await;
            let frame = frame.map_err(|_| {
                ConnectError::deadline_exceeded("timed out waiting for the guest to read the file")
            })?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => {
                    let error = ConnectError::unavailable("the download was interrupted")
                        .with_source(error);
                    return Err(error);
                }
                // Trailers are not part of the file.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// Side that an upload is waiting for: its sender or the guest.
#[derive(Debug, Clone, Default)]
struct Pace(Arc<Mutex<WaitingFor>>);

#[derive(Debug, Clone, Copy, Default)]
enum WaitingFor {
    #[default]
    Sender,
    Guest {
        since: Instant,
    },
}

impl Pace {
    /// Returns the same stream and records who is waited for. From one chunk until the next poll,
    /// the guest must take that chunk; after the last chunk, it must respond.
    fn watch<T>(self, content: impl Stream<Item = T>) -> impl Stream<Item = T> {
        let mut content = Box::pin(content);
        futures::stream::poll_fn(move |context| {
            let polled = content.poll_next_unpin(context);
            self.set(match polled {
                Poll::Pending => WaitingFor::Sender,
                Poll::Ready(_) => WaitingFor::Guest {
                    since: Instant::now(),
                },
            });
            polled
        })
    }

    fn set(&self, waiting_for: WaitingFor) {
        *self.0.lock() = waiting_for;
    }

    /// Waits until the guest has stalled the upload for longer than the deadline.
    async fn stalled(&self) {
        loop {
            tokio::time::sleep(STALL_CHECK).await;
            let waiting_for = *self.0.lock();
            if let WaitingFor::Guest { since } = waiting_for
                && since.elapsed() > STALL_DEADLINE
            {
                return;
            }
        }
    }
}

impl EnvdClient {
    /// Opens a file of the guest for reading.
    ///
    /// # Errors
    /// If there is no such file, or the call fails.
    pub async fn download(&self, path: &str, user: &str) -> Result<Download, ConnectError> {
        let request = self
            .files_request(Method::GET, path, user)?
            .body(full(Bytes::new()))
            .map_err(bad_request)?;
        let answer = self.send(request, CALL_DEADLINE).await?;
        let answer = guest_error::check(answer, user).await?;
        let length = answer.headers().get(header::CONTENT_LENGTH);
        Ok(Download {
            length: length.and_then(|length| length.to_str().ok()?.parse().ok()),
            body: answer.into_body(),
            rest: Bytes::new(),
        })
    }

    /// Writes a file of the guest. The file is complete at the end of `content`.
    ///
    /// Dropping this future before that, or an error in `content`, aborts the request. The guest
    /// agent then knows that the file is incomplete and keeps the previous file.
    ///
    /// # Errors
    /// If the guest rejects the file or stops accepting data.
    pub async fn upload(
        &self,
        path: &str,
        user: &str,
        content: impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
    ) -> Result<(), ConnectError> {
        let pace = Pace::default();
        let frames = pace
            .clone()
            .watch(content)
            .map(|bytes| bytes.map(Frame::data));
        let request = self
            .files_request(Method::POST, path, user)?
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(headers::WHOLE_UPLOAD, "1")
            .body(UnsyncBoxBody::new(StreamBody::new(frames)))
            .map_err(bad_request)?;
        // The sender may take any amount of time, but the guest must accept the data that is
        // available.
        let answer = tokio::select! {
            answer = self.send_slowly(request) => answer?,
            () = pace.stalled() => return Err(ConnectError::deadline_exceeded(
                "timed out waiting for the guest to write the file",
            )),
        };
        guest_error::check(answer, user).await.map(drop)
    }

    fn files_request(
        &self,
        method: Method,
        path: &str,
        user: &str,
    ) -> Result<http::request::Builder, ConnectError> {
        const PREFIX: &str = "/files?";
        let mut query = form_urlencoded::Serializer::for_suffix(PREFIX.to_owned(), PREFIX.len());
        query.append_pair("path", path);
        let mut request_user = None;
        if let Some(credentials) = basic_auth(user)? {
            query.append_pair("username", user);
            request_user = Some(credentials);
        }
        let mut request = self.request(method, &query.finish());
        if let Some(credentials) = request_user {
            request = request.header(header::AUTHORIZATION, credentials);
        }
        Ok(request)
    }
}
