//! Connections that break in the middle of a response. The Connect library reports them as internal
//! errors without a cause, like an invalid response.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use connectrpc::ConnectError;
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// Returns the error of a call whose connection broke.
pub(crate) fn lost(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ConnectError {
    ConnectError::unavailable("the connection to the guest agent was lost").with_source(cause)
}

/// Failure of one call's connection, once the connection has failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Broken(Arc<OnceLock<Arc<hyper::Error>>>);

impl Broken {
    /// Replaces the error of a call whose connection broke. Returns other errors unchanged.
    pub(crate) fn explain(&self, error: ConnectError) -> ConnectError {
        match self.0.get() {
            Some(cause) => lost(Arc::clone(cause)),
            None => error,
        }
    }

    /// Runs a call, and replaces its error if the connection broke.
    pub(crate) async fn watch<T>(
        &self,
        call: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        call.await.map_err(|error| self.explain(error))
    }
}

/// Body of a response, which records the failure of its connection.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    pub(crate) body: Incoming,
    pub(crate) broken: Broken,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Arc<hyper::Error>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Arc<hyper::Error>>>> {
        Pin::new(&mut self.body)
            .poll_frame(context)
            .map_err(|error| {
                let error = Arc::new(error);
                let _ = self.broken.0.set(Arc::clone(&error));
                error
            })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
