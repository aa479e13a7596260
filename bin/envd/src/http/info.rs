//! Routes `/health`, `/init`, `/envs` and `/metrics`.

use std::{
    collections::BTreeMap,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, StatusCode, header};
use serde::Serialize;
use wrenn_proto::guest::ENVD_CONTRACT_VERSION;
use wrenn_sys::meminfo::MemInfo;

use crate::{
    app::App,
    auth,
    http_error::HttpError,
    settings::{Init, Standing, Unnamed},
};

/// `GET /health`: 204, without authentication.
pub async fn health() -> Response {
    (
        StatusCode::NO_CONTENT,
        [(header::CACHE_CONTROL, "no-store")],
    )
        .into_response()
}

/// `POST /init`: applies settings of the host. An empty body counts as a body without fields.
///
/// Authorized callers: any caller while there is neither a token nor a known hash of one, a caller
/// that knows the token, and a caller that brings the token whose hash the metadata service
/// returns. envd asks the metadata service only if the result depends on it.
///
/// # Errors
/// 400 if the body is not valid JSON of this form, 401 if the caller is not authorized, 501 for
/// features that envd does not support. On an error, nothing is changed.
pub async fn init(
    State(app): State<App>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, HttpError> {
    let init: Init = if body.is_empty() {
        Init::default()
    } else {
        serde_json::from_slice(&body)
            .map_err(|e| HttpError::bad_request(format!("invalid body: {e}")))?
    };
    let unnamed = authorize(&app, &init, auth::shown_token(&headers)).await?;
    if let Some(field) = init.unsupported() {
        return Err(HttpError::new(
            StatusCode::NOT_IMPLEMENTED,
            format!("`{field}` is not supported by this agent"),
        ));
    }
    app.settings.apply(init, unnamed);
    app.mmds.ask();
    let headers = [
        ("cache-control", "no-store"),
        ("x-envd-version", ENVD_CONTRACT_VERSION),
    ];
    Ok((StatusCode::NO_CONTENT, headers).into_response())
}

/// Checks that the caller is authorized. Returns the effect on the token if the body contains none.
async fn authorize(app: &App, init: &Init, shown: Option<&str>) -> Result<Unnamed, HttpError> {
    let told = init.token();
    let hash = match app.settings.standing(shown, told) {
        Standing::Known => return Ok(Unnamed::Keep),
        Standing::Free => match app.mmds.known_token_hash() {
            None => return Ok(Unnamed::Keep),
            hash => hash,
        },
        Standing::Stranger => app.mmds.token_hash().await,
    };
    if hash.is_some_and(|hash| hash.allows(told)) {
        return Ok(Unnamed::Clear);
    }
    Err(HttpError::unauthorized(if told.is_none() {
        "access token reset not authorized"
    } else {
        "access token validation failed"
    }))
}

/// `GET /envs`: returns the environment of every process.
pub async fn envs(State(app): State<App>) -> Json<BTreeMap<String, String>> {
    Json(app.settings.envs())
}

/// Response of `/metrics`. Sizes are in bytes unless the name has another unit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    disk_used: u64,
    disk_total: u64,
}

/// `GET /metrics`: returns the current resource usage of the guest.
///
/// # Errors
/// 500 if the kernel's tables cannot be read.
pub async fn metrics(State(app): State<App>) -> Result<Json<Metrics>, HttpError> {
    let unreadable = |path: &str, error: io::Error| {
        HttpError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{path}: {error}"),
        )
    };
    let cpu_used_pct = app.cpu_use.percent().await;
    let cpu_used_pct = cpu_used_pct.map_err(|e| unreadable("/proc/stat", e))?;
    let memory = MemInfo::read().map_err(|e| unreadable("/proc/meminfo", e))?;
    let bytes = |field| memory.bytes(field).unwrap_or(0);
    let mem_total = bytes("MemTotal");
    let mem_used = mem_total.saturating_sub(bytes("MemAvailable"));
    let disk = rustix::fs::statvfs("/").map_err(|e| unreadable("/", e.into()))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Json(Metrics {
        ts: now.as_secs(),
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cpu_used_pct,
        mem_total,
        mem_used,
        mem_cache: bytes("Cached"),
        mem_total_mib: mem_total >> 20,
        mem_used_mib: mem_used >> 20,
        disk_used: disk.f_blocks.saturating_sub(disk.f_bavail) * disk.f_frsize,
        disk_total: disk.f_blocks * disk.f_frsize,
    }))
}
