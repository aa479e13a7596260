//! Whole-file transfers over HTTP: any size, constant memory, at the pace of the slower side.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use connectrpc::ConnectError;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use http::{Method, header};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use tokio::time::Instant;
use wrenn_model::limits;
use wrenn_proto::headers;

use super::{CALL_DEADLINE, EnvdClient, basic_auth, full, guest_error, transport_failed, within};

/// Maximum silence of the guest in the middle of a file.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// Interval at which uploads are checked for a stall.
const STALL_CHECK: Duration = Duration::from_secs(5);

/// File that is being read from the guest.
#[derive(Debug)]
pub(crate) struct Download {
    body: Incoming,
}

impl Download {
    /// Returns the next chunk, or `None` after the last one. An interrupted transfer is an error,
    /// never a truncated file.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        loop {
            let frame = async { Ok(self.body.frame().await) };
            match within(STALL_DEADLINE, frame).await? {
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
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = waiting_for;
    }

    /// Waits until the guest has stalled the upload for longer than the deadline.
    async fn stalled(&self) {
        loop {
            tokio::time::sleep(STALL_CHECK).await;
            let waiting_for = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
    pub(crate) async fn download(&self, path: &str, user: &str) -> Result<Download, ConnectError> {
        let request = self
            .files_request(Method::GET, path, user)?
            .body(full(Bytes::new()))
            .map_err(super::bad_request)?;
        let answer = self.send(request, CALL_DEADLINE).await?;
        let answer = guest_error::check(answer, user).await?;
        Ok(Download {
            body: answer.into_body(),
        })
    }

    /// Writes a file of the guest.
    ///
    /// An error in `content` aborts the request, and so does dropping this future. The guest agent
    /// then knows that the file is incomplete and keeps the previous file.
    pub(crate) async fn upload(
        &self,
        path: &str,
        user: &str,
        content: impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
    ) -> Result<(), ConnectError> {
        // Hyper hides the error of a failed body, so the error is passed through a channel.
        let (tell, told) = tokio::sync::oneshot::channel();
        let mut tell = Some(tell);
        let pace = Pace::default();
        let frames = pace
            .clone()
            .watch(content)
            .map_ok(Frame::data)
            .map_err(move |error| {
                if let Some(tell) = tell.take() {
                    let _ = tell.send(error);
                }
                io::Error::other("the upload was interrupted")
            });
        let request = self
            .files_request(Method::POST, path, user)?
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(headers::WHOLE_UPLOAD, "1")
            .body(UnsyncBoxBody::new(StreamBody::new(frames)))
            .map_err(super::bad_request)?;
        // The sender may take any amount of time, but the guest must accept the data that is
        // available.
        let answer = tokio::select! {
            answer = self.http.request(request) => answer,
            () = pace.stalled() => return Err(ConnectError::deadline_exceeded(format!(
                "the guest agent accepted no data of the file for {STALL_DEADLINE:?}"
            ))),
        };
        match answer {
            Ok(answer) => guest_error::check(answer, user).await.map(drop),
            Err(error) => Err(told.await.unwrap_or_else(|_| transport_failed(error))),
        }
    }

    /// Writes a file of the guest from memory.
    pub(crate) async fn write(
        &self,
        path: &str,
        user: &str,
        content: Bytes,
    ) -> Result<(), ConnectError> {
        let pieces = (0..content.len()).step_by(limits::FILE_CHUNK_BYTES);
        let pieces = pieces.map(move |start| {
            let end = content.len().min(start + limits::FILE_CHUNK_BYTES);
            Ok(content.slice(start..end))
        });
        let pieces: Vec<_> = pieces.collect();
        self.upload(path, user, futures::stream::iter(pieces)).await
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
