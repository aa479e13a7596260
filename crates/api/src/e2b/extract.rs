//! Extractors of request parts. A missing or invalid part is rejected with the error body of the
//! E2B API.

use axum::extract::{FromRequest, FromRequestParts, Request};
use http::request::Parts;
use serde::de::DeserializeOwned;
use wrenn_model::SandboxId;

use super::error::E2bError;
use crate::extract::{ApiJsonOrEmpty, ApiQuery, path_part};

/// A JSON object. An absent body counts as `{}`.
pub(super) struct E2bJson<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for E2bJson<T> {
    type Rejection = E2bError;

    async fn from_request(request: Request, state: &S) -> Result<Self, E2bError> {
        let ApiJsonOrEmpty(value) = ApiJsonOrEmpty::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// Query of the URL.
pub(super) struct E2bQuery<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for E2bQuery<T> {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        let ApiQuery(value) = ApiQuery::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// `{id}` of the path. A malformed id is rejected as not found.
pub(super) struct E2bSandboxPath(pub(super) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for E2bSandboxPath {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        let text = path_part(parts, state, "id").await?;
        text.parse()
            .map(Self)
            .map_err(|_| E2bError::no_sandbox(text.chars().take(80).collect::<String>()))
    }
}

/// `{name}` of the path, decoded.
pub(super) struct E2bNamePath(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for E2bNamePath {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        Ok(Self(path_part(parts, state, "name").await?))
    }
}
