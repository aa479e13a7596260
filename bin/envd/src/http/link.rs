//! Query of `/files`, and its authorization.

use std::{io, path::PathBuf};

use axum::extract::{Query, rejection::QueryRejection};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use wrenn_proto::Grant;

use crate::{
    app::App,
    auth,
    http_error::HttpError,
    paths,
    users::{self, User},
};

/// Query of `/files`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct FileQuery {
    /// Path in the guest.
    #[serde(default)]
    pub path: String,
    /// User whose home directory and ownership apply.
    #[serde(default)]
    pub username: Option<String>,
    /// Signature of the link (see [`Grant::sign`]).
    #[serde(default)]
    pub signature: Option<String>,
    /// Expiry of the signature, in seconds since 1970.
    #[serde(default)]
    pub signature_expiration: Option<i64>,
}

impl FileQuery {
    /// Returns the parsed query.
    ///
    /// # Errors
    /// 400 if the query is malformed.
    pub fn checked(query: Result<Query<Self>, QueryRejection>) -> Result<Self, HttpError> {
        query
            .map(|Query(query)| query)
            .map_err(|rejected| HttpError::bad_request(rejected.body_text()))
    }

    /// Checks the caller's authorization and returns the user.
    ///
    /// # Errors
    /// 401 with the texts of the contract.
    pub fn admit(
        &self,
        app: &App,
        headers: &HeaderMap,
        operation: &str,
    ) -> Result<User, HttpError> {
        let grant = Grant {
            path: &self.path,
            operation,
            user: self.username.as_deref().unwrap_or_default(),
            expires: self.signature_expiration,
        };
        auth::check_link(
            &app.settings,
            auth::shown_token(headers),
            self.signature.as_deref(),
            grant,
        )
        .map_err(|refused| HttpError::unauthorized(refused.to_string()))?;
        user_of(app, self.username.as_deref())
    }

    /// Returns the absolute path.
    ///
    /// # Errors
    /// 400 if the path is invalid.
    pub fn resolve(&self, path: &str, app: &App, user: &User) -> Result<PathBuf, HttpError> {
        resolve(path, app, user)
    }
}

/// Returns the user of a name, or the default user if the name is absent or empty.
///
/// # Errors
/// 401 with the text of the contract.
pub fn user_of(app: &App, name: Option<&str>) -> Result<User, HttpError> {
    let named = name.filter(|name| !name.is_empty()).map(str::to_owned);
    let name = named.unwrap_or_else(|| app.settings.default_user());
    match users::find(&name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(HttpError::unauthorized(format!(
            "invalid username: '{name}'"
        ))),
        Err(error) => Err(lookup_failed(&error)),
    }
}

/// Makes a client's path absolute.
///
/// # Errors
/// 400 if the path is invalid.
pub fn resolve(path: &str, app: &App, user: &User) -> Result<PathBuf, HttpError> {
    paths::resolve(path, user, app.settings.default_workdir().as_deref())
        .map_err(|e| HttpError::bad_request(e.to_string()))
}

fn lookup_failed(error: &io::Error) -> HttpError {
    let message = format!("failed to look up users: {error}");
    HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}
