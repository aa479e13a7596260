//! Responses that end early: connections that break, and responses for which the buffers have no
//! room. The Connect library reports both as internal errors without a cause, like an invalid
//! response.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use connectrpc::ConnectError;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use wrenn_model::Reservation;

/// Returns the error of a call whose connection broke.
pub(crate) fn lost(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ConnectError {
    ConnectError::unavailable("the connection to the guest agent was lost").with_source(cause)
}

/// Reason why the response of one call ended early, once it has.
#[derive(Debug, Clone, Default)]
pub(crate) struct Broken(Arc<OnceLock<ConnectError>>);

impl Broken {
    /// Runs a call, and replaces its error if the response ended early.
    pub(crate) async fn watch<T>(
        &self,
        call: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        call.await
            .map_err(|error| self.0.get().cloned().unwrap_or(error))
    }

    /// Same as [`watch`](Self::watch), for a response that is one message. A part of a message may
    /// be a valid message, so a success is replaced as well.
    pub(crate) async fn watch_message<T>(
        &self,
        call: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        let result = call.await;
        match self.0.get() {
            Some(reason) => Err(reason.clone()),
            None => result,
        }
    }
}

/// Body of a response, which records why it ended early.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    pub(crate) body: Incoming,
    pub(crate) broken: Broken,
    /// Bytes of a response that is decoded as a whole; `None` if the response is a stream.
    pub(crate) reserved: Option<Reservation>,
}

impl ResponseBody {
    /// Reserves the bytes of a frame. Returns false if the budget has no room.
    fn reserve(&mut self, frame: &Frame<Bytes>) -> bool {
        let (Some(reserved), Some(data)) = (&mut self.reserved, frame.data_ref()) else {
            return true;
        };
        let Err(error) = reserved.grow(data.len()) else {
            return true;
        };
        let error = ConnectError::resource_exhausted(error.to_string());
        let _ = self.broken.0.set(error);
        false
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Arc<hyper::Error>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Arc<hyper::Error>>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match ready!(polled) {
            Some(Ok(frame)) if self.reserve(&frame) => Poll::Ready(Some(Ok(frame))),
            // The caller takes the truncated response for an invalid one.
            Some(Ok(_)) | None => Poll::Ready(None),
            Some(Err(error)) => {
                let error = Arc::new(error);
                let _ = self.broken.0.set(lost(Arc::clone(&error)));
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
