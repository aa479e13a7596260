//! Resource usage of a sandbox, current and past.

use axum::{Json, extract::State};
use serde::Deserialize;
use utoipa::IntoParams;
use wrenn_api_types::{Metrics, MetricsPoint};
use wrenn_control::{clock, lifecycle::LifecycleError, samples::Sample};
use wrenn_model::{SandboxId, SandboxStatus};

use crate::{
    app::{AppState, BOOT_WAIT},
    error::{ApiError, Code},
    extract::{ApiQuery, SandboxPath},
    openapi::{CommonErrors, HostErrors, SandboxErrors},
};

/// Values of `range`, with their length in minutes.
const RANGES: [(&str, i64); 7] = [
    ("5m", 5),
    ("10m", 10),
    ("1h", 60),
    ("2h", 120),
    ("6h", 360),
    ("12h", 720),
    ("24h", 1440),
];

/// Query parameters of the metrics call.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct MetricsQuery {
    /// Time span of the returned points: `5m`, `10m`, `1h`, `2h`, `6h`, `12h` or `24h`. Default:
    /// `10m`.
    range: Option<String>,
}

impl MetricsQuery {
    fn minutes(&self) -> Result<i64, ApiError> {
        let word = self.range.as_deref().unwrap_or("10m");
        let known = RANGES.iter().find(|(name, _)| *name == word);
        known.map(|(_, minutes)| *minutes).ok_or_else(|| {
            let names = RANGES.map(|(name, _)| format!("`{name}`"));
            ApiError::field("range", format!("expected one of {}", names.join(", ")))
        })
    }
}

/// Returns the resource usage of a sandbox, as its own kernel reports it.
///
/// For a paused sandbox, returns its usage before the pause; 404 if this server has taken no sample
/// of it. The call does not count as activity and resumes nothing.
#[utoipa::path(
    get, path = "/{id}/metrics", tag = "sandboxes", operation_id = "get_metrics",
    params(("id" = String, Path, description = "Sandbox id."), MetricsQuery),
    responses((status = 200, description = "The resource usage.", body = Metrics), CommonErrors, SandboxErrors, HostErrors)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    SandboxPath(id): SandboxPath,
    ApiQuery(query): ApiQuery<MetricsQuery>,
) -> Result<Json<Metrics>, ApiError> {
    let minutes = query.minutes()?;
    let newest = newest(&app, &id).await?;
    let begin_ms = clock::now_ms() - minutes * 60_000;
    let points = app.samples.between(&id, begin_ms, i64::MAX);
    let used = newest.used;
    Ok(Json(Metrics {
        sandbox_id: id.into(),
        timestamp_unix: newest.at_ms.div_euclid(1000),
        cpu_count: used.cpu_count,
        cpu_pct: used.cpu_used_pct,
        mem_bytes: used.mem_used_bytes,
        mem_total_bytes: used.mem_total_bytes,
        disk_bytes: used.disk_used_bytes,
        disk_total_bytes: used.disk_total_bytes,
        points: points.into_iter().map(point).collect(),
    }))
}

/// Takes a sample of a running sandbox. Returns the last stored sample of a paused one.
async fn newest(app: &AppState, id: &SandboxId) -> Result<Sample, ApiError> {
    let row = app.lifecycle.get(id).await?;
    match row.status {
        SandboxStatus::Pausing | SandboxStatus::Paused => {}
        SandboxStatus::Stopping | SandboxStatus::Stopped | SandboxStatus::Error => {
            let message = format!(
                "sandbox `{id}` is `{}` and has no metrics",
                row.status.as_str()
            );
            return Err(ApiError::new(Code::NotFound, message));
        }
        _ => {
            let row = app.lifecycle.await_running(id, BOOT_WAIT).await?;
            let sample = app.samples.take(&row).await;
            return sample.map_err(|error| LifecycleError::of_fleet(id, error).into());
        }
    }
    app.samples.last(id).ok_or_else(|| {
        let message =
            format!("sandbox `{id}` is paused and has no samples since the control plane started");
        ApiError::new(Code::NotFound, message)
    })
}

fn point(sample: Sample) -> MetricsPoint {
    MetricsPoint {
        timestamp_unix: sample.at_ms.div_euclid(1000),
        cpu_pct: sample.used.cpu_used_pct,
        mem_bytes: sample.used.mem_used_bytes,
        disk_bytes: sample.used.disk_used_bytes,
    }
}
