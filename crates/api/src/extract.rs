//! Extractors of request parts. A missing or invalid part is rejected with the error body of `/v1`.

use std::{collections::HashMap, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::{HeaderMap, StatusCode, header, request::Parts};
use serde::de::DeserializeOwned;
use wrenn_control::principal::Principal;
use wrenn_model::{Reservation, SandboxId};

use crate::{
    app::AppState,
    error::{ApiError, Code},
};

/// Maximum size of a JSON body, in bytes.
pub(crate) const MAX_JSON_BYTES: usize = 1024 * 1024;

/// Part of a JSON body that is not accounted, in bytes. Calls with a small body work if the budget
/// is used up; the number of connections bounds these bytes.
const SMALL_JSON_BYTES: usize = 64 * 1024;

/// Maximum time to receive a JSON body.
const JSON_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON object.
pub(crate) struct ApiJson<T>(pub(crate) T);

/// A JSON object. An absent body counts as `{}`.
pub(crate) struct ApiJsonOrEmpty<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        require_json(&parts.headers)?;
        let mut reserved = app.buffers.empty();
        parse_object(&read_body(&parts.headers, body, &mut reserved).await?).map(Self)
    }
}

impl<T: DeserializeOwned + Default> FromRequest<AppState> for ApiJsonOrEmpty<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let mut reserved = app.buffers.empty();
        let bytes = read_body(&parts.headers, body, &mut reserved).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        require_json(&parts.headers)?;
        parse_object(&bytes).map(Self)
    }
}

/// Checks the content type. Accepts JSON, no content type, and the form type that `curl -d` sends
/// by default. Any other type is rejected. The body must be JSON in all cases. Requiring the API
/// key in a header keeps forms of foreign web pages out.
fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let kind = kind.to_str().unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    let json = matches!(
        essence.as_str(),
        "application/json" | "application/x-www-form-urlencoded"
    ) || (essence.starts_with("application/") && essence.ends_with("+json"));
    if json {
        return Ok(());
    }
    let message = "the body must be JSON, with the header `Content-Type: application/json`";
    Err(ApiError::new(Code::InvalidRequest, message)
        .with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

async fn read_body(
    headers: &HeaderMap,
    body: Body,
    reserved: &mut Reservation,
) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::too_large("the body", MAX_JSON_BYTES);
    if announced_bytes(headers).is_some_and(|n| n > MAX_JSON_BYTES as u64) {
        return Err(too_large());
    }
    let mut stream = body.into_data_stream();
    let mut read = BytesMut::new();
    let reading = async {
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|_| broken_off())?;
            if read.len() + piece.len() > MAX_JSON_BYTES {
                return Err(too_large());
            }
            let accounted = (read.len() + piece.len()).saturating_sub(SMALL_JSON_BYTES);
            reserved.grow(accounted.saturating_sub(reserved.bytes()))?;
            read.extend_from_slice(&piece);
        }
        Ok(())
    };
    tokio::time::timeout(JSON_TIMEOUT, reading)
        .await
        .unwrap_or_else(|_| {
            Err(ApiError::new(
                Code::InvalidRequest,
                "timed out reading the body",
            ))
        })?;
    Ok(read.freeze())
}

/// Returns the length of the body, if the client announced it.
pub(crate) fn announced_bytes(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(header::CONTENT_LENGTH)?;
    value.to_str().ok()?.parse().ok()
}

/// Error of a client that stopped sending before the end of the body.
pub(crate) fn broken_off() -> ApiError {
    ApiError::new(Code::InvalidRequest, "the body ended prematurely")
}

fn parse_object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // Without this check, an array would be deserialized as the fields in their order.
    let first = bytes.iter().find(|b| !b.is_ascii_whitespace());
    if first != Some(&b'{') {
        return Err(ApiError::new(
            Code::InvalidRequest,
            "the body must be a JSON object",
        ));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner();
        if path == "." {
            ApiError::new(
                Code::InvalidRequest,
                format!("invalid JSON in the body: {cause}"),
            )
        } else {
            ApiError::field(&path, cause)
        }
    })?;
    json.end().map_err(|error| {
        ApiError::new(
            Code::InvalidRequest,
            format!("unexpected data after the JSON object: {error}"),
        )
    })?;
    Ok(value)
}

/// Caller, as [`authorize`](crate::authorize) identified it.
pub(crate) struct Caller(pub(crate) Principal);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let principal = parts.extensions.get::<Principal>().cloned();
        principal
            .map(Self)
            .ok_or_else(|| ApiError::new(Code::Internal, "the route does not check the API key"))
    }
}

/// `{id}` of the path: a sandbox of the caller's team. Rejected with 404 if the team has no sandbox
/// with that id, and with 400 if its characters are invalid.
pub(crate) struct SandboxPath(pub(crate) SandboxId);

impl FromRequestParts<AppState> for SandboxPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, ApiError> {
        let UnknownSandboxPath(id) = UnknownSandboxPath::from_request_parts(parts, app).await?;
        let Caller(principal) = Caller::from_request_parts(parts, app).await?;
        app.ownership.require(&principal, &id).await?;
        Ok(Self(id))
    }
}

/// `{id}` of the path: a sandbox that need not be in the database. Rejected with 404 if its
/// characters are valid but no sandbox can have that id, and with 400 if the characters are
/// invalid.
pub(crate) struct UnknownSandboxPath(pub(crate) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for UnknownSandboxPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = path_part(parts, state, "id").await?;
        id.parse().map(Self).map_err(|error| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
            if id.bytes().all(plain) {
                return ApiError::new(Code::NotFound, format!("there is no sandbox `{id}`"));
            }
            ApiError::field("id", error)
        })
    }
}

/// Returns a path parameter by its name in the route.
pub(crate) async fn path_part<S: Send + Sync>(
    parts: &mut Parts,
    state: &S,
    name: &str,
) -> Result<String, ApiError> {
    let Path(mut found) = Path::<HashMap<String, String>>::from_request_parts(parts, state)
        .await
        .map_err(|rejection| ApiError::new(Code::InvalidRequest, rejection.body_text()))?;
    found.remove(name).ok_or_else(|| {
        ApiError::new(
            Code::Internal,
            format!("the route has no path parameter `{name}`"),
        )
    })
}

/// Query of the URL.
pub(crate) struct ApiQuery<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::new(Code::InvalidRequest, rejection.body_text())),
        }
    }
}
