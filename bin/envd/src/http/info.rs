//! Routes `/health`, `/init`, `/envs` and `/metrics`.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
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

use super::error::HttpError;
use crate::{
    auth,
    server::App,
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

/// Measurement time of the CPU usage if there is no recent sample.
const CPU_WINDOW: Duration = Duration::from_millis(100);
/// Minimum time between two samples. Requests within this time get the last value, because the
/// kernel's ticks are too coarse for a shorter time.
const SHORTEST_WINDOW: Duration = Duration::from_secs(1);
/// Maximum age of a sample that is used as the start of a measurement. An older sample does not
/// describe the present.
const LONGEST_WINDOW: Duration = Duration::from_secs(60);

/// CPU usage since the last request. Nothing is measured without requests, so an idle guest stays
/// idle.
#[derive(Debug, Default)]
pub struct CpuUse(tokio::sync::Mutex<Option<CpuSample>>);

#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at: Instant,
    times: (u64, u64),
    percent: f64,
}

impl CpuUse {
    async fn percent(
        &self,
        read: impl Fn() -> Result<String, HttpError>,
    ) -> Result<f64, HttpError> {
        let mut last = self.0.lock().await;
        let before = match *last {
            Some(last) if last.at.elapsed() < SHORTEST_WINDOW => return Ok(last.percent),
            Some(last) if last.at.elapsed() < LONGEST_WINDOW => last.times,
            _ => {
                let times = cpu_times(&read()?);
                tokio::time::sleep(CPU_WINDOW).await;
                times
            }
        };
        let times = cpu_times(&read()?);
        let percent = used_percent(before, times);
        let at = Instant::now();
        *last = Some(CpuSample { at, times, percent });
        Ok(percent)
    }
}

/// `GET /metrics`: returns the current resource usage of the guest.
///
/// # Errors
/// 500 if the kernel's tables cannot be read.
pub async fn metrics(State(app): State<App>) -> Result<Json<Metrics>, HttpError> {
    let read = |path: &str| {
        fs::read_to_string(path)
            .map_err(|e| HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{path}: {e}")))
    };
    let cpu_used_pct = app.cpu_use.percent(|| read("/proc/stat")).await?;
    let memory = read("/proc/meminfo")?;
    let kib = |name: &str| memory_field(&memory, name) * 1024;
    let mem_total = kib("MemTotal:");
    let mem_used = mem_total.saturating_sub(kib("MemAvailable:"));
    let disk = rustix::fs::statvfs("/")
        .map_err(|e| HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("/: {e}")))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Json(Metrics {
        ts: now.as_secs(),
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cpu_used_pct,
        mem_total,
        mem_used,
        mem_cache: kib("Cached:"),
        mem_total_mib: mem_total >> 20,
        mem_used_mib: mem_used >> 20,
        disk_used: disk.f_blocks.saturating_sub(disk.f_bavail) * disk.f_frsize,
        disk_total: disk.f_blocks * disk.f_frsize,
    }))
}

/// Returns busy and total ticks since boot, from the first line of `/proc/stat`. Fields 4 and 5 of
/// that line are idle time (`proc_stat(5)`).
fn cpu_times(stat: &str) -> (u64, u64) {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    let all: u64 = fields.iter().sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    (all - idle, all)
}

/// Returns the usage in percent of all CPUs, with two decimal places.
fn used_percent(before: (u64, u64), after: (u64, u64)) -> f64 {
    let busy = u32::try_from(after.0.saturating_sub(before.0)).unwrap_or(u32::MAX);
    let all = u32::try_from(after.1.saturating_sub(before.1)).unwrap_or(u32::MAX);
    if all == 0 {
        return 0.0;
    }
    (f64::from(busy) / f64::from(all) * 10_000.0).round() / 100.0
}

/// Returns a field of `/proc/meminfo` in KiB, or 0 if the field does not exist.
fn memory_field(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_understood() {
        let stat = "cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 1 1 1\n";
        assert_eq!(cpu_times(stat), (150, 1000));
        assert!((used_percent((150, 1000), (200, 1200)) - 25.0).abs() < 0.001);
        assert!(used_percent((1, 1), (1, 1)).abs() < 0.001);
        assert_eq!(
            memory_field("MemTotal:  512 kB\nCached:  7 kB\n", "Cached:"),
            7
        );
    }
}
