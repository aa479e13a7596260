//! Determines the sandbox and port that a request is addressed to.
//!
//! | `Host` of the request                     | address                                        |
//! |-------------------------------------------|------------------------------------------------|
//! | `localhost`                               | headers, see below                             |
//! | an IP address                             | headers, see below                             |
//! | `sandbox.<domain>`                        | headers, see below                             |
//! | a shared name of the configuration        | headers, see below                             |
//! | any other                                 | the label left of the first dot, `<port>-<id>` |
//!
//! The headers are `E2b-Sandbox-Id` and `E2b-Sandbox-Port`. On a shared name a request must have
//! both or neither; a request with neither may still be a signed link, or show the token of a guest
//! agent. Routing only parses: the sandbox need not exist.

use std::{fmt, net::IpAddr};

use http::{HeaderMap, HeaderName, Uri, header, uri::Authority};

/// Header that names the sandbox.
pub const SANDBOX_ID: HeaderName = HeaderName::from_static("e2b-sandbox-id");

/// Header that names the port.
pub const SANDBOX_PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");

/// Maximum length of an id: together with the port and `-` it forms one label of a host name, which
/// has at most 63 characters.
const MAX_ID_LEN: usize = 57;

/// Target of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Sandbox id as sent. It has the form of an id of this platform or of E2B, but may not exist.
    pub id: String,
    /// Port in the sandbox; not 0.
    pub port: u16,
}

/// Target that a request states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// The request names this port.
    Port(Address),
    /// The request names no sandbox.
    Unaddressed,
}

/// Reasons for which a request has no valid target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddress {
    /// No `Host`, or an invalid one.
    #[error("missing or invalid `Host`")]
    NoHost,
    /// Not a shared name, and the label is not `<port>-<id>`.
    #[error("invalid host: expected <port>-<sandboxID>.<domain>")]
    Host,
    /// One of the two headers without the other, or one of them twice.
    #[error(
        "expected exactly one `{SANDBOX_ID}` header and one `{SANDBOX_PORT}` header, or the guest \
         agent's token in `x-access-token`"
    )]
    Headers,
    /// Not a number from 1 to 65535.
    #[error("invalid sandbox port")]
    Port,
    /// Not a well-formed id.
    #[error("invalid sandbox id")]
    Id,
}

/// Reads the target of a request.
///
/// # Errors
/// If the host, or the id or port that it or the headers name, is not well-formed.
pub fn route(uri: &Uri, headers: &HeaderMap, shared_names: &[String]) -> Result<Route, BadAddress> {
    let authority = authority(uri, headers)?;
    let host = authority.host().trim_end_matches('.').to_ascii_lowercase();
    if is_shared(&host, shared_names) {
        return by_headers(headers);
    }
    let label = host.split('.').next().unwrap_or_default();
    let (port, id) = label.split_once('-').ok_or(BadAddress::Host)?;
    Ok(Route::Port(address(id, port)?))
}

/// Returns the host and port that a client addressed: those of an absolute request target if there
/// is one, otherwise those of the single `Host` header.
///
/// # Errors
/// If there is no host, more than one, or one with a user name.
pub fn authority(uri: &Uri, headers: &HeaderMap) -> Result<Authority, BadAddress> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(BadAddress::NoHost);
    }
    let authority = match uri.authority() {
        Some(authority) => Some(authority.clone()),
        None => first.and_then(|host| Authority::try_from(host.as_bytes()).ok()),
    };
    authority
        .filter(|authority| !authority.as_str().contains('@') && !authority.host().is_empty())
        .ok_or(BadAddress::NoHost)
}

fn is_shared(host: &str, shared_names: &[String]) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address.parse::<IpAddr>().is_ok()
        || host
            .strip_prefix("sandbox.")
            .is_some_and(|domain| !domain.is_empty())
        || shared_names
            .iter()
            .any(|name| name.eq_ignore_ascii_case(host))
}

fn by_headers(headers: &HeaderMap) -> Result<Route, BadAddress> {
    let one = |name: &HeaderName| {
        let mut values = headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().map(Some).map_err(|_| BadAddress::Headers),
            (None, _) => Ok(None),
            _ => Err(BadAddress::Headers),
        }
    };
    match (one(&SANDBOX_ID)?, one(&SANDBOX_PORT)?) {
        (Some(id), Some(port)) => Ok(Route::Port(address(id, port)?)),
        (None, None) => Ok(Route::Unaddressed),
        _ => Err(BadAddress::Headers),
    }
}

fn address(id: &str, port: &str) -> Result<Address, BadAddress> {
    let digits = !port.is_empty() && port.bytes().all(|sign| sign.is_ascii_digit());
    let number = port.parse::<u16>().ok().filter(|&number| number != 0);
    let port = number.filter(|_| digits).ok_or(BadAddress::Port)?;
    // Ids of this platform have a `-` after their first two letters; E2B's have none.
    let signs = id.strip_prefix("sb-").unwrap_or(id);
    let plain = |sign: u8| sign.is_ascii_lowercase() || sign.is_ascii_digit();
    if signs.is_empty() || id.len() > MAX_ID_LEN || !signs.bytes().all(plain) {
        return Err(BadAddress::Id);
    }
    let id = id.to_owned();
    Ok(Address { id, port })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.port, self.id)
    }
}

#[cfg(test)]
mod tests;
