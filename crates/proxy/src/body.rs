//! Streaming bodies: no body is collected, each is forwarded frame by frame, including trailers.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use parking_lot::{Mutex, MutexGuard};
use wrenn_http_server::DrainingBody;

/// Request body that survives a failed attempt to send it. It can be sent again as long as no frame
/// has been taken from it.
#[derive(Debug, Clone)]
pub(crate) struct RequestBody(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    body: Mutex<DrainingBody>,
    begun: AtomicBool,
}

impl RequestBody {
    pub(crate) fn new(body: DrainingBody) -> Self {
        Self(Arc::new(Shared {
            body: Mutex::new(body),
            begun: AtomicBool::new(false),
        }))
    }

    /// True if part of the body may have been sent.
    pub(crate) fn is_begun(&self) -> bool {
        self.0.begun.load(Ordering::Acquire)
    }

    fn body(&self) -> MutexGuard<'_, DrainingBody> {
        self.0.body.lock()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.0.begun.store(true, Ordering::Release);
        Pin::new(&mut *self.body()).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body().size_hint()
    }
}

/// Response body, either the sandbox's or the proxy's own.
pub(crate) struct AnswerBody {
    from: From,
    /// Value that is kept alive until the response has been sent.
    _held: Option<Box<dyn Send>>,
}

enum From {
    Sandbox(Incoming),
    Proxy(Full<Bytes>),
}

impl AnswerBody {
    /// Forwards the sandbox's body and keeps `held` alive until its end.
    pub(crate) fn streamed(body: Incoming, held: impl Send + 'static) -> Self {
        Self {
            from: From::Sandbox(body),
            _held: Some(Box::new(held)),
        }
    }

    /// Wraps a body that the proxy generated.
    pub(crate) fn own(body: Bytes) -> Self {
        Self {
            from: From::Proxy(Full::new(body)),
            _held: None,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.from {
            From::Sandbox(body) => Pin::new(body).poll_frame(context),
            From::Proxy(body) => Pin::new(body)
                .poll_frame(context)
                .map_err(|never: Infallible| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.from {
            From::Sandbox(body) => body.is_end_stream(),
            From::Proxy(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.from {
            From::Sandbox(body) => body.size_hint(),
            From::Proxy(body) => body.size_hint(),
        }
    }
}
