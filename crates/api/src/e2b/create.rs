//! Creating sandboxes. The response is sent when the guest agent answers, and not before.
//!
//! If the client disconnects before the response, the sandbox is destroyed. A repeated request with
//! the same `Idempotency-Key` is answered as the first one was, even while the first request is still
//! in progress, and after the sandbox has ended.

use std::{collections::BTreeMap, time::Duration};

use axum::{Json, extract::State};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;
use wrenn_api_types::CreateSandbox;
use wrenn_control::lifecycle::{NewSandbox, PendingCreate, PriorRequest};
use wrenn_db::{Options, Sandbox as Row};
use wrenn_model::{OnTimeout, SandboxStatus, TeamId};

use super::{
    error::{CREATE_FAILED, E2bConflict, E2bError, E2bErrors, E2bNotFound, PLACEMENT_TIMEOUT},
    extract::{E2bCaller, E2bJson},
    models::{E2bSandbox, Version},
    names,
    network::{NetworkConfig, egress},
};
use crate::{app::AppState, error::Code, validate};

/// Name of the header with the idempotency key.
pub(super) const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Maximum length of an idempotency key, in bytes.
const MAX_KEY_BYTES: usize = 255;

/// Maximum time of a create. Slightly longer than its call to the host.
const ANSWER_WITHIN: Duration = Duration::from_secs(125);

/// Default lifetime in seconds.
const DEFAULT_TIMEOUT_SEC: u32 = 300;

/// Default lifetime in seconds, in version 1.
const DEFAULT_TIMEOUT_V1_SEC: u32 = 15;

/// Body of a create request.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct E2bNewSandbox {
    /// Template or snapshot: `[wrenn/]name[:tag]`.
    #[serde(rename = "templateID")]
    template_id: Option<String>,
    /// Seconds until the deadline. Default: 300, in version 1: 15.
    timeout: Option<i64>,
    metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process in the sandbox.
    env_vars: Option<BTreeMap<String, String>>,
    /// Pause the sandbox at its deadline instead of destroying it. Default: false.
    auto_pause: Option<bool>,
    /// `false`: the pause at the deadline keeps the disk only.
    auto_pause_memory: Option<bool>,
    auto_resume: Option<AutoResume>,
    /// Access to the internet. Default: the server's setting.
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    network: Option<NetworkConfig>,
    /// Accepted and ignored. Every new sandbox requires a token for access to the guest agent.
    #[expect(dead_code, reason = "documents the field, is never read")]
    secure: Option<bool>,
    /// Accepted and ignored. The client itself starts the gateway, in a sandbox whose template
    /// includes it.
    #[schema(value_type = Option<Object>)]
    #[expect(dead_code, reason = "documents the field, is never read")]
    mcp: Option<Value>,
    /// Not implemented.
    #[schema(value_type = Option<Object>)]
    iam: Option<Map<String, Value>>,
    /// Not implemented.
    #[schema(value_type = Option<Vec<Object>>)]
    volume_mounts: Option<Vec<Value>>,
}

/// Automatic resume of a paused sandbox by a call to it.
#[derive(Debug, Default, Deserialize, ToSchema)]
struct AutoResume {
    #[serde(default)]
    enabled: bool,
}

/// Creates a sandbox and waits until it is usable.
#[utoipa::path(
    post, path = "/v2/sandboxes", tag = "e2b", operation_id = "e2b_create_sandbox", request_body = E2bNewSandbox,
    responses((status = 201, description = "The new sandbox.", body = E2bSandbox), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn create(
    State(app): State<AppState>,
    E2bCaller(principal): E2bCaller,
    headers: HeaderMap,
    E2bJson(body): E2bJson<Value>,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    create_as(&app, principal.team, &headers, body, Version::V2).await
}

/// Creates a sandbox and waits until it is usable (version 1).
#[utoipa::path(
    post, path = "/sandboxes", tag = "e2b", operation_id = "e2b_create_sandbox_v1", request_body = E2bNewSandbox,
    responses((status = 201, description = "The new sandbox.", body = E2bSandbox), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn create_v1(
    State(app): State<AppState>,
    E2bCaller(principal): E2bCaller,
    headers: HeaderMap,
    E2bJson(body): E2bJson<Value>,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    create_as(&app, principal.team, &headers, body, Version::V1).await
}

async fn create_as(
    app: &AppState,
    team: TeamId,
    headers: &HeaderMap,
    body: Value,
    version: Version,
) -> Result<(StatusCode, Json<E2bSandbox>), E2bError> {
    let deadline = Instant::now() + ANSWER_WITHIN;
    let key = request_key(headers)?;
    let hash = key
        .map(|_| request_hash(&body, version))
        .unwrap_or_default();
    let asked: E2bNewSandbox = serde_path_to_error::deserialize(&body)
        .map_err(|error| E2bError::field(&error.path().to_string(), error.inner()))?;
    let (base, options) = asked.checked(version, app.limits.max_lifetime_sec)?;
    let ticket = match key {
        None => None,
        Some(key) => {
            let wait = app.limits.idempotency_wait;
            match app.lifecycle.earlier(&team, key, &hash, wait).await? {
                // Nothing in the first response changes while the row exists.
                PriorRequest::Made(row) => {
                    return Ok((StatusCode::CREATED, Json(E2bSandbox::of(&row, version))));
                }
                PriorRequest::Nothing(ticket) => Some(ticket),
            }
        }
    };
    let facts = app.host.facts().await.map_err(E2bError::of_create)?;
    let template = validate::create_shape(&base)?;
    let new = validate::create_fits(team, base, template, &facts, app.default_egress)
        .map_err(template_error)?;
    let new = NewSandbox {
        e2b_id: true,
        options: Options {
            request_hash: hash,
            ..options
        },
        idempotency_key: key.unwrap_or_default().to_owned(),
        ..new
    };
    // From here on, dropping this future destroys the sandbox.
    let creation = app.lifecycle.create(new, ticket);
    let row = made(app, creation, deadline).await?;
    Ok((StatusCode::CREATED, Json(E2bSandbox::of(&row, version))))
}

/// Waits for the end of the create. Returns the row of the running sandbox.
async fn made(
    app: &AppState,
    mut creation: PendingCreate,
    deadline: Instant,
) -> Result<Row, E2bError> {
    let late = || {
        let message = "timed out starting the sandbox; it will be destroyed";
        E2bError::new(StatusCode::GATEWAY_TIMEOUT, message).with_code(PLACEMENT_TIMEOUT)
    };
    let id = timeout_at(deadline, creation.id())
        .await
        .map_err(|_| late())??;
    let done = timeout_at(deadline, creation.done())
        .await
        .map_err(|_| late())?;
    if let Err(error) = done {
        // The record keeps the reason of the failure.
        creation.failed().await;
        return Err(E2bError::of_create(error));
    }
    let row = app.lifecycle.get(&id).await?;
    if row.status == SandboxStatus::Error {
        creation.failed().await;
        let message = format!("failed to create the sandbox: {}", row.error);
        let error = E2bError::new(StatusCode::INTERNAL_SERVER_ERROR, message);
        return Err(error.with_code(CREATE_FAILED));
    }
    creation.keep();
    if super::error::has_ended(row.status) {
        return Err(E2bError::no_sandbox(&id));
    }
    Ok(row)
}

impl E2bNewSandbox {
    /// Checks the request. Returns it in the form of `/v1`, with the options that only this API
    /// has.
    fn checked(
        self,
        version: Version,
        max_lifetime_sec: u32,
    ) -> Result<(CreateSandbox, Options), E2bError> {
        self.reject_unimplemented()?;
        let text = self.template_id.as_deref().filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| E2bError::field("templateID", "is required"))?;
        let template = names::parse(text).map_err(|error| match error {
            names::NameError::Namespace => E2bError::no_template(text),
            error => E2bError::field("templateID", error),
        })?;
        let auto_pause = self.auto_pause.unwrap_or(false);
        let auto_resume = self.auto_resume.is_some_and(|resume| resume.enabled);
        let disk_only = self.auto_pause_memory == Some(false);
        if disk_only && (!auto_pause || auto_resume) {
            let why = "`false` requires `autoPause` and excludes `autoResume`";
            return Err(E2bError::field("autoPauseMemory", why));
        }
        let default = match version {
            Version::V1 => DEFAULT_TIMEOUT_V1_SEC,
            Version::V2 => DEFAULT_TIMEOUT_SEC,
        };
        let mut options = Options {
            lifetime_sec: lifetime("timeout", self.timeout, default, max_lifetime_sec)?,
            disk_only,
            internet: self.allow_internet_access,
            ..Options::default()
        };
        if let Some(network) = &self.network {
            network.apply(&mut options)?;
        }
        let base = CreateSandbox {
            template: Some(template.into()),
            // A sandbox of this API has a deadline instead of an idle time.
            timeout_sec: Some(0),
            on_timeout: Some(if auto_pause {
                OnTimeout::Pause
            } else {
                OnTimeout::Kill
            }),
            auto_resume: Some(auto_resume),
            egress: self
                .allow_internet_access
                .map(|asked| egress(Some(asked), wrenn_model::Egress::Deny)),
            envs: self.env_vars,
            metadata: self.metadata,
            ..CreateSandbox::default()
        };
        Ok((base, options))
    }

    fn reject_unimplemented(&self) -> Result<(), E2bError> {
        let empty = |value: &Value| match value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if let Some(iam) = &self.iam
            && !iam.values().all(empty)
        {
            return Err(E2bError::unimplemented("`iam`"));
        }
        if self
            .volume_mounts
            .as_ref()
            .is_some_and(|list| !list.is_empty())
        {
            return Err(E2bError::unimplemented("`volumeMounts`"));
        }
        Ok(())
    }
}

/// Checks a lifetime in seconds: at least one second, at most the maximum of the settings.
pub(super) fn lifetime(
    name: &str,
    asked: Option<i64>,
    default: u32,
    max: u32,
) -> Result<u32, E2bError> {
    let Some(asked) = asked else {
        return Ok(default.min(max));
    };
    u32::try_from(asked)
        .ok()
        .filter(|sec| (1..=max).contains(sec))
        .ok_or_else(|| {
            let why = format!("{asked} is out of range, expected 1 to {max} seconds");
            E2bError::field(name, why)
        })
}

fn template_error(error: crate::error::ApiError) -> E2bError {
    // The message was written for the field name of `/v1`.
    let mut told = E2bError::from(error.clone());
    if error.code == Code::NotFound {
        told.message = told.message.replace("`template`: ", "");
    }
    told
}

/// Returns the idempotency key of a request.
fn request_key(headers: &HeaderMap) -> Result<Option<&str>, E2bError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    value
        .to_str()
        .ok()
        .filter(|key| (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(plain))
        .map(Some)
        .ok_or_else(|| {
            let why = format!("expected 1 to {MAX_KEY_BYTES} characters of a-z, 0-9 and `-`");
            E2bError::field("Idempotency-Key", why)
        })
}

/// Hashes a request. Equal requests have equal hashes, regardless of whitespace and field order in
/// their JSON.
fn request_hash(body: &Value, version: Version) -> String {
    let mut hash = Sha256::new();
    hash.update(match version {
        Version::V1 => "1",
        Version::V2 => "2",
    });
    digest(body, &mut hash);
    hex::encode(hash.finalize())
}

fn digest(value: &Value, hash: &mut Sha256) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            hash.update("{");
            for (key, value) in sorted {
                hash.update(Value::from(key.as_str()).to_string());
                hash.update(":");
                digest(value, hash);
                hash.update(",");
            }
            hash.update("}");
        }
        Value::Array(list) => {
            hash.update("[");
            for value in list {
                digest(value, hash);
                hash.update(",");
            }
            hash.update("]");
        }
        plain => hash.update(plain.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use serde_json::json;

    use super::*;

    fn status(body: Value, version: Version) -> u16 {
        let asked: E2bNewSandbox = serde_json::from_value(body).unwrap();
        match asked.checked(version, 86_400) {
            Ok(_) => 201,
            Err(error) => error.status.as_u16(),
        }
    }

    #[test]
    fn invalid_or_unimplemented_create_is_rejected_before_any_work() {
        for (extra, wanted) in [
            (json!({}), 201),
            (json!({ "timeout": 0 }), 400),
            (json!({ "timeout": -1 }), 400),
            (json!({ "timeout": 86_400 }), 201),
            (json!({ "timeout": 86_401 }), 400),
            (json!({ "timeout": i64::MAX }), 400),
            (json!({ "autoPauseMemory": false }), 400),
            (json!({ "autoPauseMemory": false, "autoPause": true }), 201),
            (
                json!({ "autoPauseMemory": false, "autoPause": true, "autoResume": { "enabled": true } }),
                400,
            ),
            (json!({ "autoPauseMemory": true }), 201),
            (
                json!({ "mcp": {}, "iam": { "tokens": {} }, "volumeMounts": [], "network": {} }),
                201,
            ),
            (json!({ "mcp": { "x": 1 } }), 201),
            (json!({ "iam": { "tokens": { "x": {} } } }), 501),
            (
                json!({ "volumeMounts": [{ "name": "v", "path": "/v" }] }),
                501,
            ),
            (json!({ "templateID": "" }), 400),
            (json!({ "templateID": "a b" }), 400),
            (json!({ "templateID": "other/x" }), 404),
        ] {
            let mut body = json!({ "templateID": "base" });
            body.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            assert_eq!(status(body.clone(), Version::V2), wanted, "{body}");
        }
    }

    #[test]
    fn versions_differ_in_default_lifetime_only() {
        for (body, version, max, lifetime_sec) in [
            (json!({}), Version::V1, 1000, 15),
            (json!({ "secure": true }), Version::V1, 1000, 15),
            (json!({ "secure": false }), Version::V1, 1000, 15),
            (json!({ "secure": false }), Version::V2, 1000, 300),
            (json!({}), Version::V2, 100, 100),
        ] {
            let asked = E2bNewSandbox {
                template_id: Some("base".to_owned()),
                ..serde_json::from_value(body).unwrap()
            };
            let (_, options) = asked.checked(version, max).unwrap();
            assert_eq!((options.lifetime_sec, options.open), (lifetime_sec, false));
        }
    }

    #[test]
    fn request_fingerprint_ignores_only_the_order_of_fields() {
        let text = |text: &str| request_hash(&serde_json::from_str(text).unwrap(), Version::V2);
        assert_eq!(
            text(r#"{"a":1,"b":{"c":2,"d":3}}"#),
            text(r#"{ "b": {"d":3,"c":2}, "a":1 }"#)
        );
        assert_ne!(text(r#"{"a":1}"#), text(r#"{"a":"1"}"#));
        assert_ne!(text(r#"{"a":[1,2]}"#), text(r#"{"a":[2,1]}"#));
        assert_ne!(
            request_hash(&json!({}), Version::V1),
            request_hash(&json!({}), Version::V2)
        );
    }
}
