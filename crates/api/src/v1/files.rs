//! Files of a sandbox, up to 100 MiB each, and directories. Larger files: `files_stream`.

pub(super) mod upload;

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use connectrpc::ErrorCode as RpcCode;
use http::{HeaderValue, StatusCode, header};
use wrenn_api_types::{FileEntry, FileEntryReply, FileList, FilePath, ListFiles};
use wrenn_control::{agent_client::AgentError, guest::GuestFile, lifecycle::ActivityGuard};
use wrenn_model::{SandboxId, limits};
use wrenn_proto::rpc::filesystem;

use super::files_stream;
use crate::{
    app::AppState,
    buffers,
    error::{ApiError, Code},
    extract::{ApiJson, SandboxPath},
    openapi::{BodyErrors, CommonErrors, HostErrors, SandboxErrors},
    validate,
};

/// Fields of a multipart upload, for the OpenAPI document.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "documents, is never made")]
pub(super) struct UploadForm {
    /// Path in the guest. Must precede `file`.
    path: String,
    /// User who will own the file. Must precede `file`.
    user: Option<String>,
    /// Content of the file.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// Writes a file of up to 100 MiB.
///
/// The part `path` must precede the part `file`. Missing parent directories are created.
#[utoipa::path(
    post, path = "/{id}/files/write", tag = "files", operation_id = "write_file",
    params(("id" = String, Path, description = "Sandbox id.")),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 204, description = "The file was written."), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn write(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    request: Request,
) -> Result<StatusCode, ApiError> {
    upload::receive(&app, &id, request, Some(limits::MAX_FILE_MESSAGE_BYTES)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a file of up to 100 MiB.
///
/// The response begins after the whole file was read, unless the server's buffers are used up. Use
/// `files/stream/read` for larger files.
#[utoipa::path(
    post, path = "/{id}/files/read", tag = "files", operation_id = "read_file", request_body = FilePath,
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
    let (mut file, used) = open(&app, &id, request).await?;
    let mut reserved = app.buffers.empty();
    if let Some(length) = file.length() {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        check_length(length)?;
        if reserved.grow(length).is_err() {
            let body = files_stream::body(file, used).await?;
            return Ok(buffers::whole(body, length, OCTETS));
        }
    }
    let (mut parts, mut total) = (Vec::new(), 0_usize);
    while let Some(piece) = file.next().await? {
        total += piece.len();
        check_length(total)?;
        reserved.grow(total.saturating_sub(reserved.bytes()))?;
        parts.push(piece);
    }
    Ok(buffers::whole(
        buffers::pieces(parts, reserved),
        total,
        OCTETS,
    ))
}

fn check_length(bytes: usize) -> Result<(), ApiError> {
    let limit = limits::MAX_FILE_MESSAGE_BYTES;
    if bytes <= limit {
        return Ok(());
    }
    let mut error = ApiError::too_large("the file", limit);
    error.message.push_str("; use `files/stream/read`");
    Err(error)
}

/// Opens a file for reading. The sandbox counts as used as long as the guard exists.
pub(super) async fn open(
    app: &AppState,
    id: &SandboxId,
    file: FilePath,
) -> Result<(GuestFile, ActivityGuard), ApiError> {
    let (path, user) = checked(file)?;
    let (guest, used) = app.ready(id).await?;
    Ok((guest.read_file(&path, &user).await?, used))
}

/// Returns a response with raw bytes.
pub(super) fn octets(body: Body) -> Response {
    ([(header::CONTENT_TYPE, OCTETS)], body).into_response()
}

/// Content type of raw bytes.
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Lists a directory.
#[utoipa::path(
    post, path = "/{id}/files/list", tag = "files", operation_id = "list_files", request_body = ListFiles,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The directory entries.", body = FileList), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn list(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<ListFiles>,
) -> Result<Response, ApiError> {
    let depth = validate::check_depth(request.depth)?;
    let (path, user) = checked(FilePath {
        path: request.path,
        user: request.user,
    })?;
    let (guest, _used) = app.ready(&id).await?;
    let found = guest.list_dir(&path, depth, &user).await?;
    let bytes = found.iter().map(json_bytes).sum();
    let reserved = app.buffers.reserve(bytes)?;
    let entries = found.into_iter().map(entry).collect();
    buffers::json(StatusCode::OK, &FileList { entries }, reserved)
}

/// Returns about the size of an entry in JSON, in bytes.
fn json_bytes(entry: &filesystem::EntryInfo) -> usize {
    const NAMES_AND_NUMBERS: usize = 200;
    let target = entry.symlink_target.as_ref().map_or(0, String::len);
    NAMES_AND_NUMBERS + entry.name.len() + entry.path.len() + target
}

/// Creates a directory and its missing parents.
///
/// Fails with 409 `conflict` if the path exists.
#[utoipa::path(
    post, path = "/{id}/files/mkdir", tag = "files", operation_id = "make_directory", request_body = FilePath,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 200, description = "The directory.", body = FileEntryReply), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn mkdir(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<Json<FileEntryReply>, ApiError> {
    let (path, user) = checked(request)?;
    let (guest, _used) = app.ready(&id).await?;
    let made = guest.make_dir(&path, &user).await.map_err(taken)?;
    Ok(Json(FileEntryReply { entry: entry(made) }))
}

/// Converts an agent error. An existing path is a `conflict`; `already_exists` is reserved for
/// resources with a name of their own, such as templates.
fn taken(error: AgentError) -> ApiError {
    match error.code {
        RpcCode::AlreadyExists => ApiError::new(Code::Conflict, error.message),
        _ => error.into(),
    }
}

/// Removes a file, or a directory with its contents.
///
/// Succeeds if the path does not exist.
#[utoipa::path(
    post, path = "/{id}/files/remove", tag = "files", operation_id = "remove_file", request_body = FilePath,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The file or directory was removed."), CommonErrors, BodyErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn remove(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiJson(request): ApiJson<FilePath>,
) -> Result<StatusCode, ApiError> {
    let (path, user) = checked(request)?;
    let (guest, _used) = app.ready(&id).await?;
    guest.remove(&path, &user).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Checks and returns path and user. An empty user is the guest's default.
pub(super) fn checked(path: FilePath) -> Result<(String, String), ApiError> {
    validate::check_path("path", &path.path)?;
    validate::check_user(path.user.as_deref())?;
    Ok((path.path, path.user.unwrap_or_default()))
}

fn entry(entry: filesystem::EntryInfo) -> FileEntry {
    use filesystem::FileType;
    // Clients of the contract reject any other type, and the whole list with it.
    let kind = match entry.r#type.as_known() {
        Some(FileType::FILE_TYPE_DIRECTORY) => "directory",
        Some(FileType::FILE_TYPE_SYMLINK) => "symlink",
        Some(FileType::FILE_TYPE_FILE) => "file",
        // A link without a target, or a link to a device.
        _ if entry.symlink_target.is_some() => "symlink",
        _ => "file",
    };
    let modified_at = entry
        .modified_time
        .as_option()
        .map_or(0, |time| time.seconds);
    FileEntry {
        name: entry.name,
        path: entry.path,
        kind: kind.to_owned(),
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at,
        symlink_target: entry.symlink_target,
    }
}
