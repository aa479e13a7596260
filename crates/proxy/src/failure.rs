//! Responses that the proxy generates itself.
//!
//! Clients search the message of a 502 for `was not found` and `port is not open`, so the E2B
//! contract fixes these texts. Scripts of any origin may read these responses.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::{
    lookup::Rejected,
    path, preflight,
    route::{Address, BadAddress},
};

/// Reasons for which a request was not answered by the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{0}")]
    BadAddress(#[from] BadAddress),
    #[error("the link's signature matches no running sandbox")]
    NoSuchLink,
    #[error(
        "too many links without a sandbox id are being looked up; add `sandbox_id` to the link"
    )]
    TooManySearches,
    #[error("signature is already expired")]
    LinkExpired,
    #[error("invalid signature")]
    BadSignature,
    #[error("unauthorized access, wrong or missing X-Access-Token")]
    BadGuestToken,
    #[error("unsupported request target: expected a path")]
    BadTarget,
    #[error("The sandbox was not found")]
    NotFound,
    #[error("The sandbox is running but port is not open")]
    PortClosed,
    #[error("The sandbox is changing state; try again")]
    Changing,
    #[error("The sandbox cannot be resumed: {0}")]
    ResumeDenied(String),
    #[error("The traffic access token is missing: send it in the header `{TRAFFIC_TOKEN}`")]
    NoTrafficToken,
    #[error("The traffic access token in the header `{TRAFFIC_TOKEN}` is invalid")]
    BadTrafficToken,
    #[error("The path is not available to clients")]
    Internal,
    #[error("The sandbox has too many connections")]
    TooMany,
    #[error("The sandbox could not be reached: {0}")]
    Unreachable(String),
}

/// Header in which clients send a sandbox's traffic access token.
pub(crate) const TRAFFIC_TOKEN: &str = "e2b-traffic-access-token";

impl From<Rejected> for Failure {
    fn from(refused: Rejected) -> Self {
        match refused {
            Rejected::NotFound => Self::NotFound,
            Rejected::Changing => Self::Changing,
            Rejected::ResumeDenied(why) => Self::ResumeDenied(why),
            Rejected::Unavailable(why) => Self::Unreachable(why),
            Rejected::TooManySearches => Self::TooManySearches,
        }
    }
}

/// Response body that the E2B contract defines.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    /// `None` for errors that stand in for one of the guest agent's, which carry no sandbox id.
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox_id: Option<&'a str>,
    message: &'a str,
    code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

impl Failure {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::BadAddress(_) | Self::NoSuchLink | Self::BadTarget => StatusCode::BAD_REQUEST,
            Self::NotFound | Self::PortClosed | Self::Unreachable(_) => StatusCode::BAD_GATEWAY,
            Self::LinkExpired | Self::BadSignature | Self::BadGuestToken => {
                StatusCode::UNAUTHORIZED
            }
            Self::Changing => StatusCode::CONFLICT,
            Self::ResumeDenied(_) | Self::NoTrafficToken | Self::BadTrafficToken => {
                StatusCode::FORBIDDEN
            }
            Self::Internal => StatusCode::NOT_FOUND,
            Self::TooMany | Self::TooManySearches => StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// Builds the response. `address` is `None` while the target is unknown. The body is then plain
    /// text, or JSON without an id if it says that the sandbox does not exist. It is an HTML
    /// page if a person will read it (see [`is_browser`]). An error that stands in for one of the
    /// guest agent's always has the guest agent's JSON form.
    pub(crate) fn answer(&self, address: Option<&Address>, browser: bool) -> Response<Bytes> {
        let message = self.to_string();
        let (kind, body) = match address {
            None if *self == Self::NotFound => {
                let code = self.status().as_u16();
                let body = Body {
                    sandbox_id: None,
                    message: &message,
                    code,
                    port: None,
                };
                ("application/json", json(&body))
            }
            None => ("text/plain; charset=utf-8", message),
            Some(address) if browser && !self.is_guest_agents() => (
                "text/html; charset=utf-8",
                page(self.status(), &message, address),
            ),
            Some(address) => {
                let body = Body {
                    sandbox_id: (!self.is_guest_agents()).then_some(&address.id),
                    message: &message,
                    code: self.status().as_u16(),
                    port: (*self == Self::PortClosed).then_some(address.port),
                };
                ("application/json", json(&body))
            }
        };
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.status() == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        preflight::open_to_all(headers);
        response
    }

    /// True if the guest agent would report this error with the same text.
    fn is_guest_agents(&self) -> bool {
        matches!(
            self,
            Self::LinkExpired | Self::BadSignature | Self::BadGuestToken
        )
    }
}

fn json(body: &Body<'_>) -> String {
    serde_json::to_string(body).unwrap_or_else(|_| body.message.to_owned())
}

/// True if a person will read the response. A script in a page that calls an API is recognized by
/// its content type or its `Accept` header, or by the fetch mode that the browser adds.
pub(crate) fn is_browser(headers: &HeaderMap) -> bool {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let begins = |name, with: &str| text(name).is_some_and(|value| value.starts_with(with));
    let wants = |kind: &str| text(header::ACCEPT).is_some_and(|value| value.contains(kind));
    // A navigation opens a page, in a window or in a frame.
    let opens = text(FETCH_MODE).is_none_or(|mode| mode.ends_with("navigate"));
    begins(header::USER_AGENT, "Mozilla/")
        && !begins(header::CONTENT_TYPE, "application/")
        && (!wants("application/json") || wants("text/html"))
        && opens
}

/// Header in which browsers state the mode of a request.
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

fn page(status: StatusCode, message: &str, address: &Address) -> String {
    let message = escape(message);
    // Sandbox ids contain no characters with a meaning in HTML.
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{status}</title></head>\
         <body><h1>{message}</h1><p>Sandbox {}, port {}</p></body></html>\n",
        address.id, address.port
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Rejects paths that the guest agent reserves for its host.
pub(crate) fn check_path(address: &Address, path: &str) -> Result<(), Failure> {
    if address.port == wrenn_proto::guest::ENVD_PORT && path::is_internal(path) {
        return Err(Failure::Internal);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> Address {
        Address {
            id: "i0".to_owned(),
            port: 8080,
        }
    }

    #[test]
    fn error_responses_have_the_bodies_of_the_contract() {
        let text = |failure: Failure| {
            let answer = failure.answer(Some(&address()), false);
            let body = String::from_utf8_lossy(answer.body()).into_owned();
            format!("{} {body}", answer.status().as_u16())
        };
        assert_eq!(
            text(Failure::NotFound),
            r#"502 {"sandboxId":"i0","message":"The sandbox was not found","code":502}"#
        );
        assert_eq!(
            text(Failure::PortClosed),
            r#"502 {"sandboxId":"i0","message":"The sandbox is running but port is not open","code":502,"port":8080}"#
        );
        assert!(text(Failure::NoTrafficToken).starts_with("403 {"));
        assert!(text(Failure::BadTrafficToken).starts_with("403 {"));
        assert!(text(Failure::ResumeDenied("no".to_owned())).starts_with("403 {"));
        assert!(text(Failure::Changing).starts_with("409 {"));
        assert!(text(Failure::Internal).starts_with("404 {"));
        assert!(text(Failure::TooMany).starts_with("429 {"));
        let answer = Failure::TooMany.answer(None, false);
        assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
        let bad = Failure::from(BadAddress::Host).answer(None, false);
        assert_eq!(bad.status(), 400);
        assert!(bad.body().starts_with(b"invalid host"));
    }

    #[test]
    fn browser_navigation_gets_a_page_and_a_script_gets_json() {
        let kind = |more: &[(HeaderName, &'static str)]| {
            let mut headers = HeaderMap::new();
            let agent = HeaderValue::from_static("Mozilla/5.0 (X11)");
            headers.insert(header::USER_AGENT, agent);
            for (name, value) in more {
                headers.insert(name, HeaderValue::from_static(value));
            }
            let why = Failure::ResumeDenied("<script>".to_owned());
            why.answer(Some(&address()), is_browser(&headers))
        };
        let accepts = (header::ACCEPT, "text/html,application/xhtml+xml,*/*;q=0.8");
        let opens = (FETCH_MODE, "navigate");
        for more in [&[][..], &[accepts, opens], &[(header::ACCEPT, "*/*")]] {
            let page = kind(more);
            assert_eq!(
                page.headers()[header::CONTENT_TYPE],
                "text/html; charset=utf-8",
                "{more:?}"
            );
            let body = String::from_utf8_lossy(page.body()).into_owned();
            assert!(body.contains("&lt;script&gt;") && !body.contains("<script>"));
        }
        for script in [
            (header::CONTENT_TYPE, "application/json"),
            (header::ACCEPT, "application/json"),
            (header::ACCEPT, "*/*, application/json"),
            (FETCH_MODE, "cors"),
            (FETCH_MODE, "same-origin"),
        ] {
            let json = kind(std::slice::from_ref(&script));
            assert_eq!(
                json.headers()[header::CONTENT_TYPE],
                "application/json",
                "{script:?}"
            );
        }
    }
}
