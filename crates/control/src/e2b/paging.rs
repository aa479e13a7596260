//! Pages: where one ended is a token, which only this server reads. No I/O.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::error::E2bError;

/// Header with the token of the next page; absent on the last.
pub(super) const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");

/// Entries of a page, at most and where the request does not say.
pub(super) const MAX_LIMIT: usize = 100;

/// The longest token, bytes.
const MAX_TOKEN_BYTES: usize = 256;

/// The token of a place: a time in milliseconds since 1970, and a name among those of that time.
fn token(time_ms: i64, name: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{time_ms} {name}"))
}

/// The header of a page behind which there is another: the place of its last entry.
pub(super) fn next_page((time_ms, name): (i64, &str)) -> HeaderMap {
    // A token is plain ASCII.
    let token = HeaderValue::from_str(&token(time_ms, name)).ok();
    token.map(|token| (NEXT_TOKEN, token)).into_iter().collect()
}

/// The place of a token; nothing for none.
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
    E2bError::field("nextToken", "is not one that this server has given")
}

/// How many entries; more than a page can have is as many as it can have.
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
        fn a_token_leads_back_to_its_place(time: i64, name in "[a-z0-9._-]{0,64}") {
            let place = place(Some(&token(time, &name))).unwrap();
            prop_assert_eq!(place, Some((time, name)));
        }

        #[test]
        fn any_text_is_a_place_or_refused(text in ".*") {
            let _ = place(Some(&text));
        }
    }
}
