//! The question that a browser asks before a request that a page of elsewhere makes: may it?
//!
//! It carries none of the request's headers, only their names, so on a shared name nobody can tell which sandbox it is for; it is
//! answered here: any page may ask. Whether the request itself is let through is decided when it comes, by the id and the token
//! that it shows (there are no cookies, which a browser would show of its own accord), and whether the page may read the answer
//! is said by the server that gives it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};

/// How long a browser need not ask again, seconds: two hours, the most that any of them heeds.
const MAX_AGE_SEC: u32 = 7200;

/// The answer, if it is that question.
pub(crate) fn answer<B>(request: &Request<B>) -> Option<Response<Bytes>> {
    let asked = request.headers();
    let is_asked = request.method() == Method::OPTIONS
        && asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if !is_asked {
        return None;
    }
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    open_to_all(headers);
    // Named one by one: a `*` would not count for `Authorization`, and older browsers do not know it.
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

/// Lets pages of everywhere read an answer.
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
