//! Request body that is always read to its end.
//!
//! A handler often knows its response before it has read the whole request: the token is wrong, or
//! the disk is full. If the connection were closed at that point, a client that is still sending
//! would see a reset instead of the response. A client that has just sent the rest would send its
//! next request into a connection that is closing. The unread part is therefore read and discarded
//! in the background while the response is sent.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::runtime::Handle;

use crate::connection::Answering;

/// Maximum time for which an unread body is discarded. The connection is closed afterwards.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// Body of a client's request.
///
/// When this is dropped, the unread part of the body is read and discarded for up to five seconds.
/// The exception is a client that sent `Expect: 100-continue` and has not been asked to continue:
/// nothing will arrive from it. Must be dropped within a tokio runtime.
#[derive(Debug)]
pub struct DrainingBody {
    /// `None` after the body ended or failed.
    body: Option<Incoming>,
    /// True while the client waits for `100 Continue`. The first poll of the body sends it.
    is_held_back: bool,
    /// Keeps the connection busy for as long as the body is read.
    busy: Option<Arc<Answering>>,
}

impl DrainingBody {
    /// Wraps the body of a hyper request.
    #[must_use]
    pub fn of(request: Request<Incoming>) -> Request<Self> {
        Self::during(request, None)
    }

    pub(crate) fn during(
        request: Request<Incoming>,
        busy: Option<Arc<Answering>>,
    ) -> Request<Self> {
        let is_held_back = request.headers().contains_key(header::EXPECT);
        request.map(|body| Self {
            body: Some(body),
            is_held_back,
            busy,
        })
    }
}

impl Body for DrainingBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.is_held_back = false;
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(body).poll_frame(context));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let ended = || SizeHint::with_exact(0);
        self.body.as_ref().map_or_else(ended, Body::size_hint)
    }
}

impl Drop for DrainingBody {
    fn drop(&mut self) {
        if self.is_held_back || self.is_end_stream() {
            return;
        }
        if let (Some(body), Ok(runtime)) = (self.body.take(), Handle::try_current()) {
            let busy = self.busy.take();
            runtime.spawn(async move {
                let _busy = busy;
                // Also ends when the connection does.
                let _ = tokio::time::timeout(DISCARD_TIMEOUT, discard(body)).await;
            });
        }
    }
}

async fn discard(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}
