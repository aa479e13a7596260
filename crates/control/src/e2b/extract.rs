//! What handlers take from a request, with the E2B API's error body when it is not there or wrong.

use axum::extract::{FromRequest, FromRequestParts, Request};
use http::request::Parts;
use serde::de::DeserializeOwned;
use wrenn_proto::SandboxId;

use super::error::E2bError;
use crate::api::extract::{ApiJsonOrEmpty, ApiQuery, path_part};

/// A JSON object; no body at all is `{}`.
pub(super) struct E2bJson<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for E2bJson<T> {
    type Rejection = E2bError;

    async fn from_request(request: Request, state: &S) -> Result<Self, E2bError> {
        let ApiJsonOrEmpty(value) = ApiJsonOrEmpty::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// The query of the URL.
pub(super) struct E2bQuery<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for E2bQuery<T> {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        let ApiQuery(value) = ApiQuery::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// `{id}` of the path. What cannot be an id names no sandbox.
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
