//! Resource usage of sandboxes: stored samples, and a current one.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use wrenn_control::{clock, samples::Sample};
use wrenn_model::SandboxId;

use super::{
    error::{E2bError, E2bErrors, E2bNotFound},
    extract::{E2bCaller, E2bQuery, E2bSandboxPath},
    models::{E2bMetric, E2bState},
    sandboxes::visible,
};
use crate::app::AppState;

/// Maximum number of sandboxes per call.
const MAX_IDS: usize = 100;

/// Query parameters of the metrics call.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct MetricsQuery {
    /// Start of the time range, in seconds since 1970, inclusive.
    start: Option<i64>,
    /// End of the time range, in seconds since 1970. Samples taken later are excluded, even within
    /// the same second.
    end: Option<i64>,
}

impl MetricsQuery {
    /// Returns the first and the last millisecond. Clients send whole seconds, rounded down, and
    /// treat a sample after `end` as an error.
    fn span_ms(&self) -> (i64, i64) {
        let ms = |sec: i64| sec.saturating_mul(1000);
        (
            self.start.map_or(i64::MIN, ms),
            self.end.map_or(i64::MAX, ms),
        )
    }
}

impl From<Sample> for E2bMetric {
    fn from(sample: Sample) -> Self {
        let used = sample.used;
        Self {
            timestamp: clock::timestamp(sample.at_ms),
            timestamp_unix: sample.at_ms.div_euclid(1000),
            cpu_count: used.cpu_count,
            cpu_used_pct: used.cpu_used_pct,
            mem_used: used.mem_used_bytes,
            mem_total: used.mem_total_bytes,
            mem_cache: used.mem_cache_bytes,
            disk_used: used.disk_used_bytes,
            disk_total: used.disk_total_bytes,
        }
    }
}

/// Returns the resource usage of a sandbox in the last 24 hours, oldest sample first.
///
/// There is one sample per 15 s for the last hour, and one per 5 min before that. For a running
/// sandbox, a current sample is added unless `end` is in the past. For a paused sandbox, returns
/// its usage before the pause.
#[utoipa::path(
    get, path = "/sandboxes/{id}/metrics", tag = "e2b", operation_id = "e2b_get_metrics",
    params(("id" = String, Path, description = "Sandbox id."), MetricsQuery),
    responses((status = 200, description = "The samples.", body = [E2bMetric]), E2bErrors, E2bNotFound)
)]
pub(super) async fn get(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bQuery(query): E2bQuery<MetricsQuery>,
) -> Result<Json<Vec<E2bMetric>>, E2bError> {
    let (start, end) = query.span_ms();
    if start > end {
        return Err(E2bError::field("start", "is after `end`"));
    }
    let (row, state) = visible(&app, &id).await?;
    // A current sample is of no use to a client that asks for the past.
    if state == E2bState::Running && (start..=end).contains(&clock::now_ms()) {
        app.samples.take_now(&row).await;
    }
    let samples = app.samples.between(&id, start, end);
    Ok(Json(samples.into_iter().map(E2bMetric::from).collect()))
}

/// Query parameters of the call for many sandboxes.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ManyQuery {
    /// Comma-separated sandbox ids, at most 100.
    sandbox_ids: String,
}

/// Newest sample of each sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct E2bManyMetrics {
    sandboxes: BTreeMap<String, E2bMetric>,
}

/// Returns the newest sample of each of many sandboxes.
///
/// Unknown sandboxes and sandboxes without a sample are left out.
#[utoipa::path(
    get, path = "/sandboxes/metrics", tag = "e2b", operation_id = "e2b_get_many_metrics", params(ManyQuery),
    responses((status = 200, description = "The samples.", body = E2bManyMetrics), E2bErrors)
)]
pub(super) async fn get_many(
    State(app): State<AppState>,
    E2bCaller(principal): E2bCaller,
    E2bQuery(query): E2bQuery<ManyQuery>,
) -> Result<Json<E2bManyMetrics>, E2bError> {
    let ids: Vec<&str> = query.sandbox_ids.split(',').collect();
    if ids.len() > MAX_IDS {
        return Err(E2bError::field("sandbox_ids", "more than 100 ids"));
    }
    let mut sandboxes = BTreeMap::new();
    for id in ids.iter().filter_map(|id| id.parse::<SandboxId>().ok()) {
        if let Some(sample) = app.samples.last(&id)
            && app.ownership.require(&principal, &id).await.is_ok()
            && visible(&app, &id).await.is_ok()
        {
            sandboxes.insert(id.into(), sample.into());
        }
    }
    Ok(Json(E2bManyMetrics { sandboxes }))
}
