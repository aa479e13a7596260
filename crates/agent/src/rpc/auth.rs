//! Authentication of calls by the agent's token.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use connectrpc::ConnectError;
use http::{HeaderMap, StatusCode, header};
use subtle::ConstantTimeEq as _;

/// Token of this agent.
#[derive(Clone)]
pub(super) struct Token(Arc<[u8]>);

impl Token {
    pub(super) fn new(token: &str) -> Self {
        Self(token.as_bytes().into())
    }

    /// True if the headers carry the token. Compares in constant time. An empty token never
    /// matches.
    fn is_in(&self, headers: &HeaderMap) -> bool {
        let given = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        given.is_some_and(|given| !self.0.is_empty() && bool::from(self.0.ct_eq(given)))
    }
}

/// Rejects every request without the token, before its body is read.
pub(super) async fn require_token(
    State(token): State<Token>,
    request: Request,
    next: Next,
) -> Response {
    if token.is_in(request.headers()) {
        return next.run(request).await;
    }
    let error = ConnectError::unauthenticated("the host agent's token is missing or invalid");
    let json = [(header::CONTENT_TYPE, "application/json")];
    (StatusCode::UNAUTHORIZED, json, error.to_json()).into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn accepts(token: &str, value: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        if let Some(value) = value {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        Token::new(token).is_in(&headers)
    }

    #[test]
    fn only_the_exact_token_is_accepted() {
        assert!(accepts("secret", Some("Bearer secret")));
        for wrong in [
            "Bearer secre",
            "Bearer secrets",
            "Bearer ",
            "secret",
            "Basic secret",
        ] {
            assert!(!accepts("secret", Some(wrong)), "{wrong}");
        }
        assert!(!accepts("secret", None));
        assert!(!accepts("", Some("Bearer ")));
    }
}
