//! Files of a sandbox: whole ones up to 100 MiB, and what is in directories. Larger files: `files_stream`.

pub(super) mod upload;

use std::time::Duration;

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use connectrpc::ErrorCode as RpcCode;
use http::{HeaderValue, StatusCode, header};
use wrenn_proto::{
    SandboxId, limits,
    rest::{FileEntry, FileEntryReply, FileList, FilePath, ListFiles},
    rpc::{filesystem, hostagent::v1 as rpc},
};

use super::{
    AppState,
    error::{ApiError, Code},
    extract::{ApiJson, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    validate,
};
use crate::{
    agent_client::{AgentError, FileStream},
    clock,
};

/// What the guest may take for the next piece of a file.
pub(super) const PIECE_TIMEOUT: Duration = Duration::from_secs(120);

/// A multipart form, for the documentation.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "documents, is never made")]
pub(super) struct UploadForm {
    /// Where in the guest. Comes before `file`.
    path: String,
    /// User whose file it becomes. Comes before `file`.
    user: Option<String>,
    /// The content.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// Writes a file of up to 100 MiB. The part `path` comes before the part `file`. Directories above it are made.
#[utoipa::path(
    post, path = "/{id}/files/write", tag = "files", operation_id = "write_file",
    params(("id" = String, Path, description = "The sandbox.")),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 204, description = "It is written."), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn write(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    request: Request,
) -> Result<StatusCode, ApiError> {
    upload::receive(&app, &id, request, Some(limits::MAX_FILE_MESSAGE_BYTES)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a file of up to 100 MiB. The answer begins when the whole file was read; for larger ones use `files/stream/read`.
#[utoipa::path(
    post, path = "/{id}/files/read", tag = "files", operation_id = "read_file", request_body = FilePath,
    params(("id" = String, Path, description = "The sandbox.")),
    responses(
        (status = 200, description = "The content.", body = Vec<u8>, content_type = "application/octet-stream"),
        CommonErrors, BodyErrors, SandboxErrors, HostErrors
    )
)]
pub(super) async fn read(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<Response, ApiError> {
    let meta = meta(&id, request)?;
    let (_row, _used) = app.ready(&id).await?;
    let mut stream = app.agent.read_file(meta).await?;
    let (mut pieces, mut total) = (Vec::new(), 0_usize);
    while let Some(piece) = next_piece(&mut stream).await? {
        total += piece.len();
        if total > limits::MAX_FILE_MESSAGE_BYTES {
            let limit = limits::MAX_FILE_MESSAGE_BYTES;
            let mut error = ApiError::too_large("the file", limit);
            error.message.push_str("; use files/stream/read");
            return Err(error);
        }
        pieces.push(Ok::<_, std::convert::Infallible>(piece));
    }
    let mut response = Body::from_stream(futures::stream::iter(pieces)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, OCTETS);
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, HeaderValue::from(total));
    Ok(response)
}

/// What raw bytes are called.
pub(super) const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// The next piece of a file; `None` at its end.
pub(super) async fn next_piece(stream: &mut FileStream) -> Result<Option<Bytes>, ApiError> {
    match tokio::time::timeout(PIECE_TIMEOUT, stream.message()).await {
        Ok(Ok(Some(message))) => Ok(Some(Bytes::from(message.to_owned_message().chunk))),
        Ok(Ok(None)) => Ok(None),
        Ok(Err(error)) => Err(AgentError::from(error).into()),
        Err(_) => Err(ApiError::new(
            Code::Timeout,
            "the guest does not go on reading the file",
        )),
    }
}

/// What a directory holds.
#[utoipa::path(
    post, path = "/{id}/files/list", tag = "files", operation_id = "list_files", request_body = ListFiles,
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 200, description = "The entries.", body = FileList), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<ListFiles>,
) -> Result<Json<FileList>, ApiError> {
    let depth = validate::check_depth(request.depth)?;
    let meta = meta(
        &id,
        FilePath {
            path: request.path,
            user: request.user,
        },
    )?;
    let (_row, _used) = app.ready(&id).await?;
    let found = app.agent.list_dir(meta, depth).await?;
    let entries = found.entries.into_iter().map(entry).collect();
    Ok(Json(FileList { entries }))
}

/// Makes a directory, and those above it. 409 `conflict` if it is there.
#[utoipa::path(
    post, path = "/{id}/files/mkdir", tag = "files", operation_id = "make_directory", request_body = FilePath,
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 200, description = "The directory.", body = FileEntryReply), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn mkdir(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<Json<FileEntryReply>, ApiError> {
    let meta = meta(&id, request)?;
    let (_row, _used) = app.ready(&id).await?;
    let made = app.agent.make_dir(meta).await.map_err(taken)?;
    let entry = entry(made.entry.into_option().unwrap_or_default());
    Ok(Json(FileEntryReply { entry }))
}

/// A path that is taken is a `conflict`; `already_exists` is for what has a name of its own, such as a template.
fn taken(error: AgentError) -> ApiError {
    match error.code {
        RpcCode::AlreadyExists => ApiError::new(Code::Conflict, error.message),
        _ => error.into(),
    }
}

/// Removes a file, or a directory with all that is in it. What is not there is removed.
#[utoipa::path(
    post, path = "/{id}/files/remove", tag = "files", operation_id = "remove_file", request_body = FilePath,
    params(("id" = String, Path, description = "The sandbox.")),
    responses((status = 204, description = "It is gone."), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn remove(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<StatusCode, ApiError> {
    let meta = meta(&id, request)?;
    let (_row, _used) = app.ready(&id).await?;
    app.agent.remove(meta).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A checked path in a sandbox.
pub(super) fn meta(id: &SandboxId, path: FilePath) -> Result<rpc::FileMeta, ApiError> {
    validate::check_path("path", &path.path)?;
    validate::check_user(path.user.as_deref())?;
    Ok(rpc::FileMeta {
        id: id.to_string(),
        path: path.path,
        user: path.user.unwrap_or_default(),
        ..Default::default()
    })
}

fn entry(entry: filesystem::EntryInfo) -> FileEntry {
    use filesystem::FileType;
    let kind = match entry.r#type.as_known() {
        Some(FileType::FILE_TYPE_FILE) => "file",
        Some(FileType::FILE_TYPE_DIRECTORY) => "directory",
        Some(FileType::FILE_TYPE_SYMLINK) => "symlink",
        _ => "unknown",
    };
    let modified_ms = entry.modified_time.as_option().map_or(0, |time| {
        time.seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(time.nanos / 1_000_000))
    });
    FileEntry {
        name: entry.name,
        path: entry.path,
        kind: kind.to_owned(),
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at: clock::timestamp(modified_ms),
        symlink_target: entry.symlink_target,
    }
}
