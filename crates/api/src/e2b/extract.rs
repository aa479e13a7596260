//! Extractors of request parts. A missing or invalid part is rejected with the error body of the
//! E2B API.

use axum::extract::{FromRequest, FromRequestParts, Request};
use http::request::Parts;
use serde::de::DeserializeOwned;
use wrenn_control::principal::Principal;
use wrenn_model::SandboxId;

use super::error::E2bError;
use crate::{
    app::AppState,
    extract::{ApiJsonOrEmpty, ApiQuery, Caller, path_part},
};

/// A JSON object. An absent body counts as `{}`.
pub(super) struct E2bJson<T>(pub(super) T);

impl<T: DeserializeOwned + Default> FromRequest<AppState> for E2bJson<T> {
    type Rejection = E2bError;

    async fn from_request(request: Request, app: &AppState) -> Result<Self, E2bError> {
        let ApiJsonOrEmpty(value) = ApiJsonOrEmpty::from_request(request, app).await?;
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

/// Caller, as `crate::authorize` identified it.
pub(super) struct E2bCaller(pub(super) Principal);

impl<S: Send + Sync> FromRequestParts<S> for E2bCaller {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        let Caller(principal) = Caller::from_request_parts(parts, state).await?;
        Ok(Self(principal))
    }
}

/// `{id}` of the path: a sandbox of the caller's team. Any other id is rejected as not found.
pub(super) struct E2bSandboxPath(pub(super) SandboxId);

impl FromRequestParts<AppState> for E2bSandboxPath {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Result<Self, E2bError> {
        let text = path_part(parts, app, "id").await?;
        let id: SandboxId = text
            .parse()
            .map_err(|_| E2bError::no_sandbox(text.chars().take(80).collect::<String>()))?;
        let E2bCaller(principal) = E2bCaller::from_request_parts(parts, app).await?;
        app.ownership.require(&principal, &id).await?;
        Ok(Self(id))
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
