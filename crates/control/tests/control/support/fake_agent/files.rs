//! Files that are nowhere but in its memory.

use std::sync::{Arc, atomic::Ordering};

use connectrpc::{ConnectError, ErrorCode, InboundStream};
use futures::StreamExt;
use wrenn_proto::rpc::hostagent::v1::{self as rpc, write_file_stream_request::PartView};

use super::{State, lock};

impl State {
    /// Takes a file; its size.
    pub(super) async fn write(
        &self,
        requests: &mut InboundStream<rpc::WriteFileStreamRequest>,
    ) -> Result<u64, ConnectError> {
        let mut upload = Upload(self, true);
        let mut path = None;
        let mut content = Vec::new();
        loop {
            self.upload_gate.pass().await;
            let Some(message) = requests.next().await else {
                break;
            };
            match &message?.view().part {
                Some(PartView::Meta(meta)) => {
                    self.require(meta.id)?;
                    if meta.path == "/dir" {
                        upload.1 = false;
                        return Err(ConnectError::new(
                            ErrorCode::InvalidArgument,
                            "`/dir` is a directory",
                        ));
                    }
                    path = Some(meta.path.to_owned());
                }
                Some(PartView::Chunk(chunk)) => {
                    assert!(chunk.len() <= 64 * 1024, "{}", chunk.len());
                    self.upload_bytes.fetch_add(chunk.len(), Ordering::SeqCst);
                    // Keeping hundreds of megabytes would hide what the control plane keeps.
                    if content.len() < 1 << 20 {
                        content.extend_from_slice(chunk);
                    }
                }
                None => return Err(ConnectError::invalid_argument("an empty message")),
            }
        }
        upload.1 = false;
        let path = path.ok_or_else(|| ConnectError::invalid_argument("no meta"))?;
        let size_bytes = content.len() as u64;
        lock(&self.files).insert(path, content);
        Ok(size_bytes)
    }

    /// Gives a file, in pieces.
    pub(super) fn read(
        state: &Arc<Self>,
        path: &str,
    ) -> Result<
        impl futures::Stream<Item = Result<rpc::ReadFileStreamResponse, ConnectError>> + Send + use<>,
        ConnectError,
    > {
        // `/zeros/N`: N bytes that are nowhere.
        let content = match path.strip_prefix("/zeros/") {
            Some(length) => vec![0; length.parse().unwrap()],
            None => {
                let files = lock(&state.files);
                let found = files.get(path).cloned();
                found.ok_or_else(|| {
                    ConnectError::new(ErrorCode::NotFound, format!("there is no file `{}`", path))
                })?
            }
        };
        let state = Arc::clone(state);
        let pieces: Vec<_> = content.chunks(64 * 1024).map(<[u8]>::to_vec).collect();
        let stream =
            futures::stream::iter(pieces.into_iter().enumerate()).map(move |(n, chunk)| {
                if n > 0 && state.break_downloads.load(Ordering::SeqCst) {
                    return Err(ConnectError::new(
                        ErrorCode::Unavailable,
                        "the machine is gone",
                    ));
                }
                state
                    .download_bytes
                    .fetch_add(chunk.len(), Ordering::SeqCst);
                Ok(rpc::ReadFileStreamResponse {
                    chunk,
                    ..Default::default()
                })
            });
        Ok(stream)
    }
}

/// Counts an upload that is dropped before its end.
struct Upload<'a>(&'a State, bool);

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if self.1 {
            self.0.broken_uploads.fetch_add(1, Ordering::SeqCst);
        }
    }
}
