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
use wrenn_api_types::{ErrorBody, ErrorDetail, ErrorDetails};

use crate::error::{ApiError, Code};

/// Errors that any call can return.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum CommonErrors {
    /// Invalid field, path or query. The message names it.
    #[response(status = 400)]
    InvalidRequest(#[to_schema] ErrorBody),
    /// Missing or invalid API key.
    #[response(status = 401)]
    Unauthorized(#[to_schema] ErrorBody),
    /// The API key does not have the scope of this route.
    #[response(status = 403)]
    Forbidden(#[to_schema] ErrorBody),
    /// Database failure or internal error.
    #[response(status = 500)]
    Server(#[to_schema] ErrorBody),
}

/// Errors of a call that needs no API key.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum ServerErrors {
    /// Database failure or internal error.
    #[response(status = 500)]
    Server(#[to_schema] ErrorBody),
}

/// Errors of a call with a request body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum BodyErrors {
    /// The request body is too large.
    #[response(status = 413)]
    TooLarge(#[to_schema] ErrorBody),
    /// The request body has the wrong content type.
    #[response(status = 415)]
    WrongKind(#[to_schema] ErrorBody),
}

/// Errors of a call that names a sandbox.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum SandboxErrors {
    /// No such sandbox, process or file.
    #[response(status = 404)]
    NotFound(#[to_schema] ErrorBody),
    /// The status of the sandbox does not allow the call, or the resource to be created exists.
    #[response(status = 409)]
    Conflict(#[to_schema] ErrorBody),
}

/// Errors of a call that reaches the host.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "documents, is never made")]
pub(crate) enum HostErrors {
    /// The host failed to carry out the call. The message contains the reason.
    #[response(status = 502)]
    Failed(#[to_schema] ErrorBody),
    /// The host or the guest does not answer, or lacks free resources.
    #[response(status = 503)]
    Unavailable(#[to_schema] ErrorBody),
    /// The call timed out.
    #[response(status = 504)]
    Timeout(#[to_schema] ErrorBody),
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Wrenn",
        description = "Sandboxes: virtual machines that run code. Every call except `/health` requires the header `X-API-Key`."
    ),
    // Body of all error responses. Operations refer to it by name only.
    components(schemas(ErrorBody, ErrorDetail, ErrorDetails)),
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

/// Returns the document without any routes.
pub(super) fn base() -> OpenApi {
    Base::openapi()
}

/// Returns the OpenAPI document of the whole API.
#[must_use]
pub fn openapi() -> OpenApi {
    let (_, mut document) = crate::router::routes().split_for_parts();
    for (path, item) in &mut document.paths.paths {
        // The same handlers are mounted under two prefixes, but operation ids must be unique.
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

/// Returns this OpenAPI document.
#[utoipa::path(
    get, path = "/openapi.yaml", tag = "server", operation_id = "openapi",
    responses((status = 200, description = "The OpenAPI document, as YAML.", body = String, content_type = "application/yaml"), CommonErrors)
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
            "failed to write the OpenAPI document",
        )),
    }
}
