//! Metadata service: provides the guest's identity, in version 2 of Firecracker's MMDS protocol.
//!
//! A guest requests a token with `PUT /latest/api/token` and the header
//! `X-metadata-token-ttl-seconds` (1 to 21600). It then reads data with `GET /…` and the token in
//! `X-metadata-token`. The data is:
//!
//! - `instanceID`: id of the sandbox
//! - `envID`: name of its template
//! - `address`: empty, because there is no log collector
//! - `accessTokenHash`: SHA-512 of the guest agent's token, hexadecimal
//!
//! With `Accept: application/json` the response is JSON. Otherwise it is a list of keys, one per
//! line, or a plain value. Firecracker's own service is not configured.
//!
//! | request                                   | response                                 |
//! |-------------------------------------------|------------------------------------------|
//! | not HTTP/1, or head too long              | 400                                      |
//! | other method                              | 405 with `Allow: GET, PUT`               |
//! | PUT with `X-Forwarded-For`                | 400: forwarded request                   |
//! | PUT of another path                       | 404                                      |
//! | PUT with a missing or invalid lifetime    | 400                                      |
//! | GET with a missing or expired token       | 401                                      |
//! | GET of an unknown key                     | 404                                      |
//! | GET of a non-string value, plain          | 501                                      |
//!
//! The guest is not trusted: the duration of a connection, the size of a request head and the
//! number of connections are limited (`serve`). This module does no I/O. Tokens are valid only in
//! this process; a restored guest must request a new one.

pub mod http;
pub(crate) mod serve;
mod tokens;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha512};
use wrenn_proto::supervise::SupervisorSpec;

use self::{
    http::{Request, Response},
    tokens::Tokens,
};

/// Path of token requests.
const TOKEN_PATH: &str = "/latest/api/token";

/// Names of the token header: Firecracker's name, and the name in the EC2 metadata service that
/// MMDS is modelled on.
const TOKEN_HEADERS: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];

/// Names of the header with the lifetime of a token.
const TTL_HEADERS: [&str; 2] = [
    "x-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token-ttl-seconds",
];

/// Valid token lifetimes, in seconds.
const TTL_SECONDS: std::ops::RangeInclusive<u64> = 1..=21_600;

/// Data of the service, and the tokens that it has issued.
#[derive(Debug)]
pub struct Mmds {
    data: Value,
    tokens: Tokens,
}

impl Mmds {
    /// Creates the service for a sandbox's guest.
    pub(crate) fn for_sandbox(spec: &SupervisorSpec) -> Self {
        Self::new(json!({
            "instanceID": spec.id,
            "envID": spec.template,
            "address": "",
            "accessTokenHash": hex::encode(Sha512::digest(&spec.envd_token)),
        }))
    }

    /// Creates a service with the given data.
    #[must_use]
    pub fn new(data: Value) -> Self {
        Self {
            data,
            tokens: Tokens::default(),
        }
    }

    /// Returns the response to a request received at `now`.
    pub fn answer(&mut self, request: &Request<'_>, now: Instant) -> Response {
        match request.method {
            "GET" => self.get(request, now),
            "PUT" => self.put(request, now),
            _ => Response::text(405, "Not allowed HTTP method.").with_header("Allow: GET, PUT"),
        }
    }

    fn put(&mut self, request: &Request<'_>, now: Instant) -> Response {
        if request.header(&["x-forwarded-for"]).is_some() {
            let text = "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For";
            return Response::text(400, text);
        }
        let path = clean(request.path);
        if path != TOKEN_PATH {
            return not_found(&path);
        }
        let Some(ttl) = request.header(&TTL_HEADERS) else {
            let text = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
            return Response::text(400, text);
        };
        let ttl = std::str::from_utf8(ttl).ok();
        let ttl = ttl.and_then(|ttl| ttl.trim().parse().ok());
        match ttl.filter(|ttl| TTL_SECONDS.contains(ttl)) {
            Some(ttl) => {
                let token = self.tokens.give(now, Duration::from_secs(ttl));
                Response::text(200, &token)
                    .with_header(format!("X-metadata-token-ttl-seconds: {ttl}"))
            }
            None => Response::text(
                400,
                "Invalid time to live value provided for token. Please provide a value between 1 and 21600.",
            ),
        }
    }

    fn get(&self, request: &Request<'_>, now: Instant) -> Response {
        let Some(token) = request.header(&TOKEN_HEADERS) else {
            let text = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` \
                header to specify the session token.";
            return Response::text(401, text);
        };
        if !self.tokens.holds(token, now) {
            return Response::text(401, "MMDS token not valid.");
        }
        let path = clean(request.path);
        let Some(value) = self.data.pointer(path.trim_end_matches('/')) else {
            return not_found(&path);
        };
        if request.accepts_json() {
            return Response::json(value);
        }
        match lines(value) {
            Some(text) => Response::text(200, &text),
            None => Response::text(
                501,
                "Cannot retrieve value. The value has an unsupported type.",
            ),
        }
    }
}

fn not_found(path: &str) -> Response {
    Response::text(404, &format!("Resource not found: {path}."))
}

/// Removes the query and repeated slashes from a path.
fn clean(path: &str) -> String {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let mut clean = String::with_capacity(path.len());
    for sign in path.chars() {
        if sign != '/' || !clean.ends_with('/') {
            clean.push(sign);
        }
    }
    clean
}

/// Returns a value in plain form: a string as is, an object as a list of its keys, one per line,
/// with a slash after keys of nested objects. `None` for any other type.
fn lines(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(object) => {
            let line = |(key, value): (&String, &Value)| match value {
                Value::Object(_) => format!("{key}/"),
                _ => key.clone(),
            };
            let lines: Vec<_> = object.iter().map(line).collect();
            Some(lines.join("\n"))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;
