//! A multipart upload, passed on piece by piece.
//!
//! Buffers a few pieces of 64 KiB beside the data that the HTTP library has read. A guest that
//! writes slowly slows down the client.
//!
//! An incomplete file is never stored as complete. The call to the guest ends normally in one case
//! only: the form was read to its end. In every other case (client disconnected, form invalid, file
//! too large) the call is dropped while its content has *not* ended, so that the guest sees an
//! aborted request and keeps the previous file.

use std::{pin::Pin, time::Duration};

use axum::extract::{
    FromRequest, Multipart, Request,
    multipart::{Field, MultipartError},
};
use bytes::Bytes;
use connectrpc::ConnectError;
use futures::Stream;
use http::{HeaderMap, StatusCode, header};
use tokio::sync::mpsc;
use wrenn_api_types::FilePath;
use wrenn_control::{agent_client::AgentError, guest::Guest};
use wrenn_model::{SandboxId, limits};

use super::checked;
use crate::{
    app::AppState,
    error::{ApiError, Code},
    extract::{announced_bytes, broken_off},
};

/// Maximum pause of the client within an upload. Equal to the idle limit of a connection.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(620);

/// Maximum overhead of a form over its file, in bytes.
const FORM_OVERHEAD_BYTES: u64 = 64 * 1024;

/// Maximum size of a text part, in bytes.
const MAX_TEXT_BYTES: usize = 16 * 1024;

/// Receives a form and writes its file.
pub(crate) async fn receive(
    app: &AppState,
    id: &SandboxId,
    request: Request,
    max_bytes: Option<usize>,
) -> Result<(), ApiError> {
    require_form(request.headers())?;
    if let Some(max) = max_bytes
        && announced_bytes(request.headers()).is_some_and(|n| n > max as u64 + FORM_OVERHEAD_BYTES)
    {
        return Err(ApiError::too_large("the file", max));
    }
    let mut form = Multipart::from_request(request, app)
        .await
        .map_err(|rejection| ApiError::new(Code::InvalidRequest, rejection.body_text()))?;
    receive_form(app, id, &mut form, max_bytes).await
}

fn require_form(headers: &HeaderMap) -> Result<(), ApiError> {
    let is_form = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|kind| kind.to_ascii_lowercase().starts_with("multipart/form-data"));
    if is_form {
        return Ok(());
    }
    let message = "the body must be `multipart/form-data` with the parts `path` and `file`";
    Err(ApiError::new(Code::InvalidRequest, message)
        .with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

async fn receive_form(
    app: &AppState,
    id: &SandboxId,
    form: &mut Multipart,
    max_bytes: Option<usize>,
) -> Result<(), ApiError> {
    let (mut path, mut user) = (None, None);
    loop {
        let Some(field) = in_time(form.next_field()).await? else {
            return Err(ApiError::field("file", "missing from the form"));
        };
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "path" => path = Some(text(field, "path").await?),
            "user" => user = Some(text(field, "user").await?),
            "file" => {
                let Some(path) = path else {
                    let why = "must precede the part `file`";
                    return Err(ApiError::field("path", why));
                };
                let (path, user) = checked(FilePath { path, user })?;
                let (guest, _used) = app.ready(id).await?;
                let mut transfer = Transfer::begin(guest, path, user);
                let pieces = transfer.pieces.clone();
                transfer.run(feed(field, &pieces, max_bytes)).await?;
                transfer.run(end(form, &pieces)).await?;
                return Ok(transfer.call.await?);
            }
            _ => return Err(unknown_part(&name)),
        }
    }
}

fn unknown_part(name: &str) -> ApiError {
    let shown: String = name.chars().take(80).collect();
    ApiError::field(
        &shown,
        "unexpected part; expected `path`, `user` and, as the last part, `file`",
    )
}

/// Step of an upload.
enum Piece {
    Data(Bytes),
    /// The form was read to its end.
    End,
}

type Call = Pin<Box<dyn Future<Output = Result<(), AgentError>> + Send>>;

/// File transfer to the guest.
struct Transfer {
    call: Call,
    pieces: mpsc::Sender<Piece>,
}

impl Transfer {
    fn begin(guest: Guest, path: String, user: String) -> Self {
        let (pieces, receiver) = mpsc::channel(2);
        let call = async move { guest.write_file(&path, &user, content(receiver)).await };
        Self {
            call: Box::pin(call),
            pieces,
        }
    }

    /// Runs the call while feeding it. If the call ends meanwhile, the guest has rejected the file.
    async fn run(
        &mut self,
        feeding: impl Future<Output = Result<(), ApiError>>,
    ) -> Result<(), ApiError> {
        tokio::select! {
            biased;
            done = &mut self.call => {
                done?;
                tracing::error!("guest accepted an incomplete upload");
                Err(ApiError::new(
                    Code::AgentError,
                    "unexpected failure of the host agent; see the log of the control plane",
                ))
            }
            fed = feeding => fed,
        }
    }
}

/// Returns the content of the file. It ends after [`Piece::End`], and otherwise with an error, which
/// aborts the request even if the guest has already responded.
fn content(
    pieces: mpsc::Receiver<Piece>,
) -> impl Stream<Item = Result<Bytes, ConnectError>> + Send + 'static {
    futures::stream::unfold(pieces, |mut pieces| async move {
        match pieces.recv().await {
            Some(Piece::Data(bytes)) => Some((Ok(bytes), pieces)),
            Some(Piece::End) => None,
            None => {
                let error = ConnectError::aborted("the client did not send the whole file");
                Some((Err(error), pieces))
            }
        }
    })
}

/// Passes on the part `file`.
async fn feed(
    mut field: Field<'_>,
    pieces: &mpsc::Sender<Piece>,
    max_bytes: Option<usize>,
) -> Result<(), ApiError> {
    let mut total = 0_usize;
    while let Some(mut bytes) = in_time(field.chunk()).await? {
        total = total.saturating_add(bytes.len());
        if let Some(max) = max_bytes
            && total > max
        {
            return Err(ApiError::too_large("the file", max));
        }
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(limits::FILE_CHUNK_BYTES));
            send(pieces, Piece::Data(piece)).await;
        }
    }
    Ok(())
}

/// Reads the end of the form, then ends the call's stream.
async fn end(form: &mut Multipart, pieces: &mpsc::Sender<Piece>) -> Result<(), ApiError> {
    if let Some(field) = in_time(form.next_field()).await? {
        return Err(unknown_part(field.name().unwrap_or_default()));
    }
    send(pieces, Piece::End).await;
    Ok(())
}

async fn send(pieces: &mpsc::Sender<Piece>, piece: Piece) {
    if pieces.send(piece).await.is_err() {
        // The call is about to end. Its result has the reason.
        std::future::pending::<()>().await;
    }
}

/// Reads a text part.
async fn text(mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = in_time(field.chunk()).await? {
        if bytes.len() + chunk.len() > MAX_TEXT_BYTES {
            let why = format!("exceeds the limit of {MAX_TEXT_BYTES} bytes");
            return Err(ApiError::field(name, why));
        }
        bytes.extend_from_slice(&chunk);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::field(name, "is not UTF-8"))
}

/// Reads from the client, with a deadline.
async fn in_time<T>(
    reading: impl Future<Output = Result<T, MultipartError>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(CLIENT_TIMEOUT, reading).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if error.status() == StatusCode::BAD_REQUEST => Err(ApiError::new(
            Code::InvalidRequest,
            format!("invalid form: {}", error.body_text()),
        )),
        Ok(Err(_)) => Err(broken_off()),
        Err(_) => Err(ApiError::new(
            Code::InvalidRequest,
            "timed out waiting for more data of the upload",
        )),
    }
}
