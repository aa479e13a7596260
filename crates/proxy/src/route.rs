//! Which port of which sandbox a request is for.
//!
//! | `Host` of the request                                  | address                                          |
//! |--------------------------------------------------------|--------------------------------------------------|
//! | `localhost`, an IP address, `sandbox.<domain>`, a shared name of the configuration | the headers `E2b-Sandbox-Id` and `E2b-Sandbox-Port` |
//! | anything else                                          | the label left of the first dot, `<port>-<id>`   |
//!
//! On a shared name both headers or neither: a request with neither may still be a signed link.
//! Reads only; the sandbox need not exist.

use std::{fmt, net::IpAddr};

use http::{HeaderMap, HeaderName, Uri, header, uri::Authority};

/// Header that names the sandbox.
pub const SANDBOX_ID: HeaderName = HeaderName::from_static("e2b-sandbox-id");

/// Header that names the port.
pub const SANDBOX_PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");

/// Longest id: with the port and its `-` it is one label of a host name, which has 63 signs at most.
const MAX_ID_LEN: usize = 57;

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Id as it was written: of the form that ids have here or with E2B, though perhaps nobody's.
    pub id: String,
    /// Port in the sandbox; not 0.
    pub port: u16,
}

/// What a request says of where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// To this port.
    Port(Address),
    /// It does not say.
    Unsaid,
}

/// Why a request goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddress {
    /// No `Host`, or not one.
    #[error("the request has no valid Host")]
    NoHost,
    /// Not a shared name, and the label is not `<port>-<id>`.
    #[error("invalid host: expected <port>-<sandboxID>.<domain>")]
    Host,
    /// One of the two headers without the other, or one twice.
    #[error("expected one header {SANDBOX_ID} and one header {SANDBOX_PORT}")]
    Headers,
    /// Not 1 to 65535.
    #[error("invalid sandbox port")]
    Port,
    /// Not of the form of an id.
    #[error("invalid sandbox id")]
    Id,
}

/// Reads the address of a request.
///
/// # Errors
/// If the host, or what it or the headers name, is not well-formed.
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

/// The host and port that a client addressed: of an absolute request target if it has one, else of the one `Host` header.
///
/// # Errors
/// If there is none, several, or one with a user name.
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
        (None, None) => Ok(Route::Unsaid),
        _ => Err(BadAddress::Headers),
    }
}

fn address(id: &str, port: &str) -> Result<Address, BadAddress> {
    let digits = !port.is_empty() && port.bytes().all(|sign| sign.is_ascii_digit());
    let number = port.parse::<u16>().ok().filter(|&number| number != 0);
    let port = number.filter(|_| digits).ok_or(BadAddress::Port)?;
    // Ids made here have a `-` behind their first two letters; E2B's have none.
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
