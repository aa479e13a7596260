//! The OpenAPI document, generated from the handlers.

use std::sync::OnceLock;

use axum::response::{IntoResponse, Response};
use http::header;
use utoipa::{
    IntoResponses, Modify, OpenApi as _,
    openapi::{
        OpenApi, PathItem,
        security::{ApiKey, ApiKeyValue, SecurityScheme},
    },
};
use wrenn_proto::rest::{ErrorBody, ErrorDetail};

use super::error::{ApiError, Code};

/// Failures that every call can have.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum CommonErrors {
    /// A field, path or query is wrong; the message names it.
    #[response(status = 400)]
    InvalidRequest(#[to_schema] ErrorBody),
    /// No key, or a wrong one.
    #[response(status = 401)]
    Unauthorized(#[to_schema] ErrorBody),
    /// The database failed, or there is a bug.
    #[response(status = 500)]
    Server(#[to_schema] ErrorBody),
}

/// Failures of a call that needs no key.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum ServerErrors {
    /// The database failed, or there is a bug.
    #[response(status = 500)]
    Server(#[to_schema] ErrorBody),
}

/// Failures of a call with a body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum BodyErrors {
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(#[to_schema] ErrorBody),
    /// The body is of a wrong kind.
    #[response(status = 415)]
    WrongKind(#[to_schema] ErrorBody),
}

/// Failures of a call that names a sandbox.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum SandboxErrors {
    /// There is no such sandbox, process or file.
    #[response(status = 404)]
    NotFound(#[to_schema] ErrorBody),
    /// The sandbox's status does not allow it, or what is to be made exists.
    #[response(status = 409)]
    Conflict(#[to_schema] ErrorBody),
}

/// Failures of a call that asks the host.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum HostErrors {
    /// The host failed.
    #[response(status = 502)]
    Failed(#[to_schema] ErrorBody),
    /// The host or the guest does not answer, or has no room.
    #[response(status = 503)]
    Unavailable(#[to_schema] ErrorBody),
    /// It took too long.
    #[response(status = 504)]
    Timeout(#[to_schema] ErrorBody),
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Wrenn",
        description = "Sandboxes: virtual machines to run code in. Every call but `/health` needs the header `X-API-Key`."
    ),
    // The failures' body, which every operation refers to by name only.
    components(schemas(ErrorBody, ErrorDetail)),
    modifiers(&KeyHeader),
    security(("api_key" = []))
)]
struct Base;

struct KeyHeader;

impl Modify for KeyHeader {
    fn modify(&self, document: &mut OpenApi) {
        let scheme = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key")));
        document
            .components
            .get_or_insert_default()
            .add_security_scheme("api_key", scheme);
    }
}

/// What the document holds before any route.
pub(super) fn base() -> OpenApi {
    Base::openapi()
}

/// The OpenAPI document of the whole API.
#[must_use]
pub fn openapi() -> OpenApi {
    let (_, mut document) = super::routes().split_for_parts();
    for (path, item) in &mut document.paths.paths {
        // The same handlers stand under two names, but an operation's id may occur only once.
        if path.starts_with("/v1/capsules") {
            for operation in operations(item) {
                if let Some(id) = operation.operation_id.as_mut() {
                    *id = format!("capsule_{id}");
                }
            }
        }
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut utoipa::openapi::path::Operation> {
    [
        item.get.as_mut(),
        item.post.as_mut(),
        item.put.as_mut(),
        item.delete.as_mut(),
    ]
    .into_iter()
    .flatten()
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.yaml", tag = "server", operation_id = "openapi",
    responses((status = 200, description = "OpenAPI as YAML.", body = String, content_type = "application/yaml"), CommonErrors)
)]
pub(super) async fn document() -> Result<Response, ApiError> {
    static TEXT: OnceLock<Option<String>> = OnceLock::new();
    let text = TEXT.get_or_init(|| openapi().to_yaml().ok());
    match text {
        Some(text) => {
            Ok(([(header::CONTENT_TYPE, "application/yaml")], text.as_str()).into_response())
        }
        None => Err(ApiError::new(
            Code::Internal,
            "the document cannot be written",
        )),
    }
}
