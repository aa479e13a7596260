//! Pagination. A page ends with a token, which is opaque to clients. No I/O.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::error::E2bError;

/// Header with the token of the next page; absent on the last page.
pub(super) const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");

/// Header with the number of running sandboxes that fit the filters, on all pages together.
pub(super) const TOTAL_RUNNING: HeaderName = HeaderName::from_static("x-total-running");

/// Maximum and default number of entries per page.
pub(super) const MAX_LIMIT: usize = 100;

/// Maximum length of a token, in bytes.
const MAX_TOKEN_BYTES: usize = 256;

/// Builds the token of a position: a time in milliseconds since 1970, and a name that orders
/// entries of the same time.
fn token(time_ms: i64, name: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{time_ms} {name}"))
}

/// Returns the header of a page that is followed by another one: the position of its last entry.
pub(super) fn next_page((time_ms, name): (i64, &str)) -> HeaderMap {
    // A token is plain ASCII.
    let token = HeaderValue::from_str(&token(time_ms, name)).ok();
    token.map(|token| (NEXT_TOKEN, token)).into_iter().collect()
}

/// Returns the position of a token; `None` without a token.
pub(super) fn place(token: Option<&str>) -> Result<Option<(i64, String)>, E2bError> {
    let Some(token) = token.filter(|token| !token.is_empty()) else {
        return Ok(None);
    };
    let read = || {
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(token.get(..token.len().min(MAX_TOKEN_BYTES))?)
            .ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let (time, name) = text.split_once(' ')?;
        Some((time.parse().ok()?, name.to_owned()))
    };
    read().map(Some).ok_or_else(bad_token)
}

pub(super) fn bad_token() -> E2bError {
    E2bError::field("nextToken", "not a token issued by this server")
}

/// Returns the number of entries per page. A request for more than the maximum gets the maximum.
pub(super) fn limit(asked: Option<i64>, most: usize) -> Result<usize, E2bError> {
    match asked {
        None => Ok(most),
        Some(asked) => usize::try_from(asked)
            .ok()
            .filter(|limit| *limit > 0)
            .map(|limit| limit.min(most))
            .ok_or_else(|| E2bError::field("limit", "expected 1 or more")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn page_token_round_trips(time: i64, name in "[a-z0-9._-]{0,64}") {
            let place = place(Some(&token(time, &name))).unwrap();
            prop_assert_eq!(place, Some((time, name)));
        }

        #[test]
        fn any_page_token_is_parsed_or_rejected(text in ".*") {
            let _ = place(Some(&text));
        }
    }
}
