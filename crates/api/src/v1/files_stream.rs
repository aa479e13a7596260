//! Streamed uploads and downloads of files of any size.
//!
//! A download that fails after its first byte does not end like a complete HTTP response. The
//! connection is cut instead, so that the client sees a failure and not a truncated file.

use axum::{
    body::Body,
    extract::{Request, State},
    response::Response,
};
use bytes::Bytes;
use http::StatusCode;
use wrenn_api_types::FilePath;
use wrenn_control::{guest::GuestFile, lifecycle::ActivityGuard};

use super::files::{UploadForm, octets, open, upload};
use crate::{
    app::AppState,
    error::ApiError,
    extract::{ApiJson, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
};

/// Writes a file of any size.
///
/// The part `path` must precede the part `file`. A failed upload leaves the previous content of the
/// path unchanged.
#[utoipa::path(
    post, path = "/{id}/files/stream/write", tag = "files", operation_id = "write_file_stream",
    params(("id" = String, Path, description = "Sandbox id.")),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 204, description = "The file was written."), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn write(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    request: Request,
) -> Result<StatusCode, ApiError> {
    upload::receive(&app, &id, request, None).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a file of any size.
///
/// If reading fails midway, the connection is cut before the end of the response.
#[utoipa::path(
    post, path = "/{id}/files/stream/read", tag = "files", operation_id = "read_file_stream", request_body = FilePath,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses(
        (status = 200, description = "Content of the file.", body = Vec<u8>, content_type = "application/octet-stream"),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn read(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<Response, ApiError> {
    let (file, used) = open(&app, &id, request).await?;
    Ok(octets(body(file, used).await?))
}

/// Returns a file as a body. Failures before its first piece are reported as errors.
pub(super) async fn body(mut file: GuestFile, used: ActivityGuard) -> Result<Body, ApiError> {
    let Some(first) = file.next().await? else {
        return Ok(Body::empty());
    };
    Ok(Body::from_stream(pieces(first, file, used)))
}

/// Returns the pieces of a file as a stream. An error is the last item; the server then cuts the
/// connection.
fn pieces(
    first: Bytes,
    file: GuestFile,
    used: ActivityGuard,
) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    let begin = (Some(first), Some(file), used);
    futures::stream::unfold(begin, |(first, file, used)| async move {
        let mut file = file?;
        if let Some(first) = first {
            return Some((Ok(first), (None, Some(file), used)));
        }
        match file.next().await {
            Ok(piece) => piece.map(|bytes| (Ok(bytes), (None, Some(file), used))),
            Err(error) => {
                let error = ApiError::from(error);
                tracing::warn!(message = %error.message, "file download failed");
                let error = std::io::Error::other(error.message);
                Some((Err(error), (None, None, used)))
            }
        }
    })
}
