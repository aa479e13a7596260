//! Streaming file transfers: only a few chunks are in memory, regardless of the file's size.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::{
    Body, Method,
    multipart::{Form, Part},
};
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;
use wrenn_api_types::FilePath;
use wrenn_model::{SandboxId, limits::FILE_CHUNK_BYTES};

use super::{Client, ClientError};

/// Time without progress after which a transfer is aborted.
const STALL: Duration = Duration::from_secs(120);

/// Interval at which the progress of an upload is checked.
const STALL_CHECK: Duration = Duration::from_secs(5);

/// Content to upload.
pub(crate) struct Upload<R> {
    /// Source of the bytes.
    pub(crate) reader: R,
    /// Length of the content in bytes, if known.
    pub(crate) len_bytes: Option<u64>,
    /// Called with the size of each chunk that was sent, in bytes.
    pub(crate) progress: Box<dyn Fn(u64) + Send + Sync>,
}

impl Client {
    /// `POST /v1/sandboxes/{id}/files/stream/write`.
    pub(crate) async fn upload<R>(
        &self,
        id: &SandboxId,
        to: &FilePath,
        upload: Upload<R>,
    ) -> Result<(), ClientError>
    where
        R: AsyncRead + Send + Unpin + 'static,
    {
        let moved = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&moved);
        let progress = upload.progress;
        let chunks =
            ReaderStream::with_capacity(upload.reader, FILE_CHUNK_BYTES).inspect_ok(move |chunk| {
                let len_bytes = chunk.len() as u64;
                counter.fetch_add(len_bytes, Ordering::Relaxed);
                progress(len_bytes);
            });
        let body = Body::wrap_stream(chunks);
        let file = match upload.len_bytes {
            Some(len) => Part::stream_with_length(body, len),
            None => Part::stream(body),
        }
        .file_name("file");
        // The path comes first: the server must know it before the first byte of the file.
        let mut form = Form::new().text("path", to.path.clone());
        if let Some(user) = &to.user {
            form = form.text("user", user.clone());
        }
        let path = ["sandboxes", id.as_str(), "files", "stream", "write"];
        let request = self
            .request(Method::POST, &path)
            .multipart(form.part("file", file));
        tokio::select! {
            answer = self.send(request) => answer.map(drop),
            stalled = watch(&moved) => Err(stalled),
        }
    }

    /// `POST /v1/sandboxes/{id}/files/stream/read`. Returns the file's length, if the server sends
    /// it, and its bytes. A premature end is an error of the stream.
    pub(crate) async fn download(
        &self,
        id: &SandboxId,
        from: &FilePath,
    ) -> Result<
        (
            Option<u64>,
            impl Stream<Item = Result<Bytes, ClientError>> + use<>,
        ),
        ClientError,
    > {
        let path = ["sandboxes", id.as_str(), "files", "stream", "read"];
        let request = self.request(Method::POST, &path).json(from);
        let answer = tokio::time::timeout(STALL, self.send(request))
            .await
            .map_err(|_| stalled())??;
        let len_bytes = answer.content_length();
        let base = self.base.clone();
        let chunks = answer.bytes_stream().boxed();
        let stream = futures::stream::try_unfold(chunks, move |mut chunks| {
            let base = base.clone();
            async move {
                match tokio::time::timeout(STALL, chunks.try_next()).await {
                    Err(_) => Err(stalled()),
                    Ok(Err(e)) => Err(ClientError::transport(&base, e)),
                    Ok(Ok(next)) => Ok(next.map(|chunk| (chunk, chunks))),
                }
            }
        });
        Ok((len_bytes, stream))
    }
}

fn stalled() -> ClientError {
    ClientError::Stalled {
        seconds: STALL.as_secs(),
    }
}

/// Returns once `moved` has not changed for [`STALL`].
async fn watch(moved: &AtomicU64) -> ClientError {
    let mut seen = 0;
    let mut since = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(STALL_CHECK).await;
        let now = moved.load(Ordering::Relaxed);
        if now != seen {
            seen = now;
            since = tokio::time::Instant::now();
        } else if since.elapsed() >= STALL {
            return stalled();
        }
    }
}
