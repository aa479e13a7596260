//! CORS preflights: the requests with which a browser asks whether a page of another origin may
//! send a request.
//!
//! A preflight carries only the names of the request's headers, not their values. On a shared name
//! the target sandbox is therefore unknown, and the proxy answers the preflight itself: every
//! origin is allowed. It does the same for the guest agent of a sandbox that does not run: a
//! preflight shows no token, and must not resume a sandbox. Access is decided on the request that follows, by the sandbox id and the
//! token in it. There are no cookies, which a browser would attach on its own. The server that
//! produces the response decides whether the page may read it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};

/// Time for which a browser may cache the result, in seconds: two hours, the maximum that any
/// browser respects.
const MAX_AGE_SEC: u32 = 7200;

/// Returns the response if `request` is a preflight.
pub(crate) fn answer<B>(request: &Request<B>) -> Option<Response<Bytes>> {
    let asked = request.headers();
    let is_preflight = request.method() == Method::OPTIONS
        && asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if !is_preflight {
        return None;
    }
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    open_to_all(headers);
    // Mirrored one by one: `*` would not cover `Authorization`, and older browsers do not support
    // it.
    for (from, to) in [
        (
            header::ACCESS_CONTROL_REQUEST_METHOD,
            header::ACCESS_CONTROL_ALLOW_METHODS,
        ),
        (
            header::ACCESS_CONTROL_REQUEST_HEADERS,
            header::ACCESS_CONTROL_ALLOW_HEADERS,
        ),
    ] {
        mirror(asked, &from, headers, &to);
    }
    headers.insert(
        header::ACCESS_CONTROL_MAX_AGE,
        HeaderValue::from(MAX_AGE_SEC),
    );
    Some(response)
}

/// Allows pages of any origin to read a response.
pub(crate) fn open_to_all(headers: &mut HeaderMap) {
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderValue::from_static("*"),
    );
}

fn mirror(asked: &HeaderMap, from: &HeaderName, answered: &mut HeaderMap, to: &HeaderName) {
    for value in asked.get_all(from) {
        answered.append(to, value.clone());
    }
}
