//! The metadata service: who the guest is, in version 2 of Firecracker's MMDS protocol.
//!
//! A guest asks `PUT /latest/api/token` with `X-metadata-token-ttl-seconds` (1 to 21600) for a token, and `GET /…` with that in
//! `X-metadata-token` for the data: `instanceID` (the sandbox), `envID` (its template), `address` (empty: there is no log collector),
//! `accessTokenHash` (SHA-512 of the guest agent's token, hexadecimal). With `Accept: application/json` the answer is JSON, else
//! keys by line, or a value as it is. A machine that Firecracker runs has Firecracker's own.
//!
//! | request                                   | answer                                   |
//! |-------------------------------------------|------------------------------------------|
//! | not HTTP/1, head too long                 | 400                                      |
//! | another method                            | 405 with `Allow: GET, PUT`               |
//! | PUT with `X-Forwarded-For`                | 400: somebody else's request             |
//! | PUT of another path                       | 404                                      |
//! | PUT without a lifetime, or a wrong one    | 400                                      |
//! | GET without a token, or one that is over  | 401                                      |
//! | GET of what is not there                  | 404                                      |
//! | GET of a value that is no text, by line   | 501                                      |
//!
//! The guest is trusted with nothing: a connection has a deadline, its head a size, and there are few at a time (`serve`). No I/O
//! here. Tokens are this process's: a guest that was restored asks for another.

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

/// Where tokens are asked for.
const TOKEN_PATH: &str = "/latest/api/token";

/// Names of the header with a token: Firecracker's own and that of the service which it follows.
const TOKEN_HEADERS: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];

/// Names of the header with a token's lifetime.
const TTL_HEADERS: [&str; 2] = [
    "x-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token-ttl-seconds",
];

/// Lifetimes that a token may have, seconds.
const TTL_SECONDS: std::ops::RangeInclusive<u64> = 1..=21_600;

/// The service's data and the tokens that it gave.
#[derive(Debug)]
pub struct Mmds {
    data: Value,
    tokens: Tokens,
}

impl Mmds {
    /// What a sandbox's guest is told.
    pub(crate) fn of(spec: &SupervisorSpec) -> Self {
        Self::new(json!({
            "instanceID": spec.id,
            "envID": spec.template,
            "address": "",
            "accessTokenHash": hex::encode(Sha512::digest(&spec.envd_token)),
        }))
    }

    /// A service with other data.
    #[must_use]
    pub fn new(data: Value) -> Self {
        Self {
            data,
            tokens: Tokens::default(),
        }
    }

    /// The answer to a request that came at `now`.
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

/// The path without its query and without slashes that follow another.
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

/// A value for those who do not take JSON: the keys of an object, by line, with a slash behind those that lead further; a text
/// as it is. `None` for anything else.
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
