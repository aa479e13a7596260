//! The body of a request, of which nothing stays unread.
//!
//! A handler often knows its answer before it has read what the client sends: a token is wrong, a disk is full. If the
//! connection were closed then, a client that still sends would see a reset instead of the answer, and one that had just sent
//! the rest would send its next request into a connection that ends. So what a handler leaves is read and thrown away behind
//! its back, while the answer is under way.

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

/// How long a body is read that nobody wants; then its connection is closed.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// What a client sends with its request. What is left of it when this is dropped is read on for five seconds and forgotten,
/// unless the client asked whether to send it (`Expect: 100-continue`) and was not told to. To be dropped within a tokio
/// runtime.
#[derive(Debug)]
pub struct Received {
    /// `None` after its end, or after it broke off.
    body: Option<Incoming>,
    /// The client waits to be told to send it, which the first look at the body does.
    is_held_back: bool,
    /// The connection is busy as long as it is read.
    busy: Option<Arc<Answering>>,
}

impl Received {
    /// A request of hyper's with its body in care.
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

impl Body for Received {
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

impl Drop for Received {
    fn drop(&mut self) {
        if self.is_held_back || self.is_end_stream() {
            return;
        }
        if let (Some(body), Ok(runtime)) = (self.body.take(), Handle::try_current()) {
            let busy = self.busy.take();
            runtime.spawn(async move {
                let _busy = busy;
                // Ends also when the connection does.
                let _ = tokio::time::timeout(DISCARD_TIMEOUT, discard(body)).await;
            });
        }
    }
}

async fn discard(mut body: Incoming) {
    while let Some(Ok(_)) = body.frame().await {}
}
