//! Lists of sandboxes, with filters and pages.
//!
//! The token of a page is the position of its last sandbox in the order (time of the first start,
//! then id). A sandbox that appears or ends between two pages therefore neither repeats nor hides
//! another one.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use http::{HeaderMap, HeaderValue};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use utoipa::IntoParams;
use wrenn_db::{MAX_LIST, Page, Sandbox as Row};
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use super::{
    error::{E2bError, E2bErrors},
    extract::{E2bCaller, E2bQuery},
    models::{E2bListedSandbox, E2bState},
    names, paging,
};
use crate::app::AppState;

/// Number of rows per query if metadata is filtered. The database cannot filter by metadata.
const SCAN: u32 = 500;

/// Query parameters of the list call.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListQuery {
    /// Pairs that a sandbox must have: `key=value`, joined by `&`. Keys and values are
    /// percent-encoded, and the whole text is percent-encoded once more.
    metadata: Option<String>,
    /// `running`, `paused` or both, comma-separated. Default: both; in version 1: `running`.
    state: Option<String>,
    /// `asc` or `desc`, by the time of the first start. Default: `desc`.
    order: Option<String>,
    /// Earliest time of the first start, inclusive.
    started_after: Option<String>,
    /// Template from which the sandboxes were created.
    template: Option<String>,
    /// Token from the header `x-next-token` of the previous page.
    next_token: Option<String>,
    /// Maximum number of entries. Default and maximum: 100.
    limit: Option<i64>,
}

/// Parsed query.
struct Wanted {
    metadata: BTreeMap<String, String>,
    statuses: Vec<SandboxStatus>,
    newest_first: bool,
    started_from: i64,
    template: String,
    after: Option<(i64, SandboxId)>,
    limit: usize,
}

impl Wanted {
    /// True if a sandbox with this metadata has all requested pairs.
    fn fits(&self, metadata: &BTreeMap<String, String>) -> bool {
        let mut pairs = self.metadata.iter();
        pairs.all(|(key, value)| metadata.get(key) == Some(value))
    }
}

/// Lists running and paused sandboxes, in pages.
#[utoipa::path(
    get, path = "/v2/sandboxes", tag = "e2b", operation_id = "e2b_list_sandboxes", params(ListQuery),
    responses(
        (status = 200, description = "The sandboxes.", body = [E2bListedSandbox],
         headers(
             ("x-next-token" = String, description = "Token of the next page; absent on the last page."),
             ("x-total-running" = i64, description = "Number of running sandboxes that fit the filters, on all \
              pages together; absent if `state` excludes them.")
         )),
        E2bErrors
    )
)]
pub(super) async fn list(
    State(app): State<AppState>,
    E2bCaller(principal): E2bCaller,
    E2bQuery(query): E2bQuery<ListQuery>,
) -> Result<(HeaderMap, Json<Vec<E2bListedSandbox>>), E2bError> {
    let wanted = query.checked(&[E2bState::Running, E2bState::Paused], paging::MAX_LIMIT)?;
    let total = total_running(&app, &principal.team, &wanted).await?;
    let (mut headers, list) = answer(&app, &principal.team, wanted).await?;
    if let Some(total) = total {
        headers.insert(paging::TOTAL_RUNNING, HeaderValue::from(total));
    }
    Ok((headers, list))
}

/// Lists running sandboxes, or those in the given states (version 1).
#[utoipa::path(
    get, path = "/sandboxes", tag = "e2b", operation_id = "e2b_list_sandboxes_v1", params(ListQuery),
    responses(
        (status = 200, description = "The sandboxes.", body = [E2bListedSandbox],
         headers(("x-next-token" = String, description = "Token of the next page; absent on the last page."))),
        E2bErrors
    )
)]
pub(super) async fn list_v1(
    State(app): State<AppState>,
    E2bCaller(principal): E2bCaller,
    E2bQuery(query): E2bQuery<ListQuery>,
) -> Result<(HeaderMap, Json<Vec<E2bListedSandbox>>), E2bError> {
    // Clients of version 1 do not support pages.
    let most = usize::try_from(MAX_LIST).unwrap_or(usize::MAX);
    let wanted = query.checked(&[E2bState::Running], most)?;
    answer(&app, &principal.team, wanted).await
}

async fn answer(
    app: &AppState,
    team: &TeamId,
    wanted: Wanted,
) -> Result<(HeaderMap, Json<Vec<E2bListedSandbox>>), E2bError> {
    let (rows, more) = find(app, team, &wanted).await?;
    let last = rows.last().filter(|_| more);
    let headers = last
        .map(|row| paging::next_page((row.started_at, row.id.as_str())))
        .unwrap_or_default();
    let listed = |row: &Row| Some(E2bListedSandbox::of(row, E2bState::of(row.status)?));
    Ok((headers, Json(rows.iter().filter_map(listed).collect())))
}

/// Returns the number of running sandboxes that fit the filters; `None` if running ones are not
/// listed.
async fn total_running(
    app: &AppState,
    team: &TeamId,
    wanted: &Wanted,
) -> Result<Option<u64>, E2bError> {
    if !wanted.statuses.contains(&SandboxStatus::Running) {
        return Ok(None);
    }
    let (template, started_from) = (&wanted.template, wanted.started_from);
    if wanted.metadata.is_empty() {
        let count = app.db.running_count(team, template, started_from).await?;
        return Ok(Some(count));
    }
    // The database cannot filter by metadata.
    let running = app
        .db
        .running_metadata(team, template, started_from)
        .await?;
    let count = running.iter().filter(|found| wanted.fits(found)).count();
    Ok(Some(u64::try_from(count).unwrap_or(u64::MAX)))
}

/// Returns a page of the team's rows, and true if another page follows.
async fn find(
    app: &AppState,
    team: &TeamId,
    wanted: &Wanted,
) -> Result<(Vec<Row>, bool), E2bError> {
    let mut found: Vec<Row> = Vec::new();
    let mut after = wanted.after.clone();
    let limit = if wanted.metadata.is_empty() {
        u32::try_from(wanted.limit + 1).unwrap_or(SCAN)
    } else {
        SCAN
    };
    loop {
        let page = Page {
            team,
            statuses: &wanted.statuses,
            template: &wanted.template,
            started_from: wanted.started_from,
            after: after.as_ref().map(|(time, id)| (*time, id)),
            newest_first: wanted.newest_first,
            limit,
        };
        let rows = app.db.page(page).await?;
        let whole = u32::try_from(rows.len()).is_ok_and(|got| got >= limit);
        after = rows.last().map(|row| (row.started_at, row.id.clone()));
        for row in rows {
            if !wanted.fits(&row.metadata) {
                continue;
            }
            if found.len() == wanted.limit {
                return Ok((found, true));
            }
            found.push(row);
        }
        if !whole {
            return Ok((found, false));
        }
    }
}

impl ListQuery {
    fn checked(self, default: &[E2bState], most: usize) -> Result<Wanted, E2bError> {
        let newest_first = match self.order.as_deref() {
            None | Some("desc") => true,
            Some("asc") => false,
            Some(_) => return Err(E2bError::field("order", "expected `asc` or `desc`")),
        };
        let started_from = match self
            .started_after
            .as_deref()
            .filter(|text| !text.is_empty())
        {
            None => i64::MIN,
            Some(text) => started_from(text)?,
        };
        let template = match self.template.as_deref().filter(|text| !text.is_empty()) {
            None => String::new(),
            // No sandbox was created from an invalid template name.
            Some(text) => names::parse(text).map_or_else(|_| "/".to_owned(), String::from),
        };
        Ok(Wanted {
            metadata: metadata(self.metadata.as_deref().unwrap_or_default())?,
            statuses: statuses(self.state.as_deref(), default)?,
            newest_first,
            started_from,
            template,
            after: after(self.next_token.as_deref())?,
            limit: paging::limit(self.limit, most)?,
        })
    }
}

fn after(token: Option<&str>) -> Result<Option<(i64, SandboxId)>, E2bError> {
    let Some((time, id)) = paging::place(token)? else {
        return Ok(None);
    };
    let id = id.parse().map_err(|_| paging::bad_token())?;
    Ok(Some((time, id)))
}

fn statuses(words: Option<&str>, default: &[E2bState]) -> Result<Vec<SandboxStatus>, E2bError> {
    let mut states = Vec::new();
    for word in words
        .unwrap_or_default()
        .split(',')
        .filter(|word| !word.is_empty())
    {
        let state = match word.trim() {
            "running" => E2bState::Running,
            "paused" => E2bState::Paused,
            _ => {
                return Err(E2bError::field(
                    "state",
                    "expected `running`, `paused` or both",
                ));
            }
        };
        if !states.contains(&state) {
            states.push(state);
        }
    }
    if states.is_empty() {
        states.extend(default);
    }
    Ok(states
        .iter()
        .flat_map(|state| state.statuses())
        .copied()
        .collect())
}

/// Returns the first millisecond that is not before the given time.
fn started_from(text: &str) -> Result<i64, E2bError> {
    let time: Timestamp = text
        .parse()
        .map_err(|_| E2bError::field("startedAfter", "expected an RFC 3339 timestamp"))?;
    let up = i64::from(time.as_nanosecond().rem_euclid(1_000_000) > 0);
    let down = time.as_nanosecond().div_euclid(1_000_000);
    Ok(i64::try_from(down).unwrap_or(i64::MIN) + up)
}

/// Parses the pairs of a filter. The encoding of the query itself is already removed; two more
/// layers remain.
fn metadata(text: &str) -> Result<BTreeMap<String, String>, E2bError> {
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded
            .map(|text| text.into_owned())
            .map_err(|_| E2bError::field("metadata", "is not UTF-8"))
    };
    let mut pairs = BTreeMap::new();
    for pair in decode(text)?.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        pairs.insert(decode(key)?, decode(value)?);
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn metadata_filter_is_unescaped_twice() {
        let pairs = metadata("a%2520b=c%2526d&x=y").unwrap();
        let wanted = [("a b", "c&d"), ("x", "y")];
        assert_eq!(
            pairs,
            wanted.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
        );
        assert!(metadata("").unwrap().is_empty());
        assert_eq!(metadata("a%25%33%44b=c").unwrap()["a=b"], "c");
        assert!(metadata("%FF=1").is_err());
    }

    #[test]
    fn time_is_rounded_up_to_milliseconds() {
        assert_eq!(started_from("1970-01-01T00:00:01Z").unwrap(), 1000);
        assert_eq!(
            started_from("1970-01-01T00:00:01.0005+00:00").unwrap(),
            1001
        );
        assert_eq!(started_from("1970-01-01T01:00:01.002+01:00").unwrap(), 1002);
        assert!(started_from("yesterday").is_err());
    }

    #[test]
    fn invalid_query_is_rejected() {
        let query = |text: &str| {
            let query: ListQuery = serde_json::from_str(text).unwrap();
            query.checked(&[E2bState::Running], 100).is_ok()
        };
        assert!(query("{}"));
        assert!(query(
            r#"{"state":"running,paused","order":"asc","limit":1,"nextToken":""}"#
        ));
        assert!(query(r#"{"limit":1000}"#));
        for bad in [
            r#"{"state":"stopped"}"#,
            r#"{"order":"up"}"#,
            r#"{"limit":0}"#,
            r#"{"limit":-1}"#,
            r#"{"nextToken":"x"}"#,
            r#"{"startedAfter":"x"}"#,
        ] {
            assert!(!query(bad), "{bad}");
        }
    }
}
