//! Authentication: the access token, signatures of file links, and the user of a call.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use connectrpc::{ConnectError, RequestContext};
use http::{HeaderMap, Method, StatusCode, header};
use wrenn_proto::{Grant, headers::ACCESS_TOKEN};

use crate::{
    http_error::error_response,
    settings::{Settings, same},
    users::{self, User},
};

/// Returns the token in a request's headers.
#[must_use]
pub fn shown_token(headers: &HeaderMap) -> Option<&str> {
    headers.get(ACCESS_TOKEN)?.to_str().ok()
}

/// Middleware that admits requests with the access token. Some routes check by themselves:
/// `/health` is open, `/init` has its own rule, and file links carry a signature instead.
pub async fn check_token(
    State(settings): State<Arc<Settings>>,
    request: Request,
    next: Next,
) -> Response {
    let own_rule = match request.uri().path() {
        "/health" | "/init" => true,
        "/files" => matches!(*request.method(), Method::GET | Method::HEAD | Method::POST),
        _ => request.method() == Method::OPTIONS,
    };
    if own_rule || settings.admits(shown_token(request.headers())) {
        return next.run(request).await;
    }
    error_response(
        StatusCode::UNAUTHORIZED,
        "unauthorized access, wrong or missing X-Access-Token",
    )
}

/// Reason for rejecting a file link. The texts are part of the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkRefused {
    /// The token in the header is wrong.
    #[error("access token present in header but does not match")]
    WrongToken,
    /// The request has neither a token nor a signature.
    #[error("missing signature query parameter")]
    Unsigned,
    /// The signature does not match the grant.
    #[error("invalid signature")]
    Forged,
    /// The signature was valid and has expired.
    #[error("signature is already expired")]
    Expired,
}

/// Checks a file link: the token in the header if there is one, else the signature and then its
/// age.
///
/// # Errors
/// See [`LinkRefused`].
pub fn check_link(
    settings: &Settings,
    shown: Option<&str>,
    signature: Option<&str>,
    grant: Grant<'_>,
) -> Result<(), LinkRefused> {
    let Some(token) = settings.token() else {
        return Ok(());
    };
    if let Some(shown) = shown {
        return if same(shown, &token) {
            Ok(())
        } else {
            Err(LinkRefused::WrongToken)
        };
    }
    let signature = signature.ok_or(LinkRefused::Unsigned)?;
    if !same(signature, &grant.sign(&token)) {
        return Err(LinkRefused::Forged);
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    if grant
        .expires
        .is_some_and(|at| u64::try_from(at).unwrap_or(0) < now)
    {
        return Err(LinkRefused::Expired);
    }
    Ok(())
}

/// Returns the user name of an `Authorization: Basic` header. The password is not used. Returns
/// `None` if there is no such header.
///
/// # Errors
/// Fails if the header is malformed.
pub fn basic_user(header: Option<&str>) -> Result<Option<String>, &'static str> {
    let Some(header) = header else {
        return Ok(None);
    };
    let Some((scheme, encoded)) = header.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let bytes = BASE64_STANDARD
        .decode(encoded.trim())
        .map_err(|_| "not base64")?;
    let text = String::from_utf8(bytes).map_err(|_| "not UTF-8")?;
    let (user, _password) = text.split_once(':').ok_or("no colon")?;
    Ok(Some(user.to_owned()).filter(|user| !user.is_empty()))
}

/// Returns the user of an RPC: the user in its header, or the default user.
///
/// # Errors
/// `unauthenticated` if the user does not exist. The text is part of the contract.
pub fn rpc_user(context: &RequestContext, settings: &Settings) -> Result<User, ConnectError> {
    let header = context
        .header(header::AUTHORIZATION.as_str())
        .and_then(|v| v.to_str().ok());
    let name = basic_user(header)
        .map_err(|problem| {
            ConnectError::unauthenticated(format!("invalid `Authorization` header: {problem}"))
        })?
        .unwrap_or_else(|| settings.default_user());
    match users::find(&name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(ConnectError::unauthenticated(format!(
            "invalid username: '{name}'"
        ))),
        Err(error) => Err(ConnectError::internal(format!(
            "failed to look up users: {error}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Init, Unnamed};
    use proptest::prelude::*;

    fn settings() -> Settings {
        let settings = Settings::default();
        let init: Init = serde_json::from_str(r#"{"accessToken":"secret"}"#).expect("a body");
        settings.apply(init, Unnamed::Keep);
        settings
    }

    const GRANT: Grant<'_> = Grant {
        path: "/a b",
        operation: "read",
        user: "",
        expires: None,
    };

    #[test]
    fn a_link_is_checked_for_forgery_before_age() {
        let settings = settings();
        let check = |signature: Option<&str>, grant| check_link(&settings, None, signature, grant);
        assert_eq!(check(None, GRANT), Err(LinkRefused::Unsigned));
        assert_eq!(check(Some("v1_x"), GRANT), Err(LinkRefused::Forged));
        assert_eq!(check(Some(&GRANT.sign("secret")), GRANT), Ok(()));
        let old = Grant {
            expires: Some(1000),
            ..GRANT
        };
        assert_eq!(check(Some("v1_x"), old), Err(LinkRefused::Forged));
        assert_eq!(
            check(Some(&old.sign("secret")), old),
            Err(LinkRefused::Expired)
        );
        let write = Grant {
            operation: "write",
            ..GRANT
        };
        assert_eq!(
            check(Some(&GRANT.sign("secret")), write),
            Err(LinkRefused::Forged)
        );
    }

    #[test]
    fn a_token_in_the_header_must_match_even_with_a_signature() {
        let settings = settings();
        let signature = GRANT.sign("secret");
        let check = |token| check_link(&settings, Some(token), Some(&signature), GRANT);
        assert_eq!(check("wrong"), Err(LinkRefused::WrongToken));
        assert_eq!(check("secret"), Ok(()));
    }

    #[test]
    fn the_user_of_a_basic_header_is_found() {
        let header = format!("Basic {}", BASE64_STANDARD.encode("user:"));
        assert_eq!(basic_user(Some(&header)), Ok(Some("user".into())));
        assert_eq!(basic_user(Some("Bearer x")), Ok(None));
        assert_eq!(basic_user(None), Ok(None));
        assert!(basic_user(Some("Basic !")).is_err());
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(header in ".*") {
            let _ = basic_user(Some(&header));
            let _ = basic_user(Some(&format!("Basic {header}")));
        }
    }
}
