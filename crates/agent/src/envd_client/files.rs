//! Whole files, by HTTP: any size, constant memory, at the pace of the slower side.

use std::{io, time::Duration};

use bytes::Bytes;
use connectrpc::ConnectError;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use http::{Method, header};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};

use super::{CALL_DEADLINE, EnvdClient, basic_auth, full, guest_error, transport_failed, within};

/// How long the guest may be silent in the middle of a file.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// A file on its way out of the guest.
#[derive(Debug)]
pub(crate) struct Download {
    body: Incoming,
}

impl Download {
    /// The next piece; `None` after the last. A file that breaks off is an error, never a short file.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ConnectError> {
        loop {
            let frame = async { Ok(self.body.frame().await) };
            match within(STALL_DEADLINE, frame).await? {
                None => return Ok(None),
                Some(Err(error)) => {
                    let error = ConnectError::unavailable("the file broke off on its way")
                        .with_source(error);
                    return Err(error);
                }
                // Trailers are none of the file.
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

    /// Writes a file of the guest. An error in `content` breaks the request off, and so does dropping this call: the guest
    /// then knows that the file is not whole.
    pub(crate) async fn upload(
        &self,
        path: &str,
        user: &str,
        content: impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
    ) -> Result<(), ConnectError> {
        // Hyper hides the error of a body that fails, so it is told on the side.
        let (tell, told) = tokio::sync::oneshot::channel();
        let mut tell = Some(tell);
        let frames = content.map_ok(Frame::data).map_err(move |error| {
            if let Some(tell) = tell.take() {
                let _ = tell.send(error);
            }
            io::Error::other("the upload broke off")
        });
        let request = self
            .files_request(Method::POST, path, user)?
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(UnsyncBoxBody::new(StreamBody::new(frames)))
            .map_err(super::bad_request)?;
        // No deadline: an upload takes as long as its sender does. The sandbox's end ends it.
        match self.http.request(request).await {
            Ok(answer) => guest_error::check(answer, user).await.map(drop),
            Err(error) => Err(told.await.unwrap_or_else(|_| transport_failed(error))),
        }
    }

    /// The same for a file that is in memory already.
    pub(crate) async fn write(
        &self,
        path: &str,
        user: &str,
        content: Bytes,
    ) -> Result<(), ConnectError> {
        let content = futures::stream::once(async { Ok(content) }).boxed();
        within(STALL_DEADLINE, self.upload(path, user, content)).await
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
