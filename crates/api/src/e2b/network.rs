//! Network access of a sandbox: checks of the requested rules, and changes while it runs.

use std::net::Ipv4Addr;

use axum::extract::State;
use http::StatusCode;
use ipnet::Ipv4Net;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use wrenn_control::lifecycle::new_traffic_token;
use wrenn_db::{NetworkLists, Options};
use wrenn_model::Egress;

use super::{
    error::{E2bConflict, E2bError, E2bErrors, E2bNotFound},
    extract::{E2bJson, E2bSandboxPath},
};
use crate::app::AppState;

/// Maximum number of entries in both lists together.
const MAX_ENTRIES: usize = 256;

/// Maximum length of an entry, in bytes: that of a host name.
const MAX_ENTRY_BYTES: usize = 253;

/// CIDR block of all addresses.
const EVERYTHING: &str = "0.0.0.0/0";

/// Network settings of a create request.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkConfig {
    #[serde(flatten)]
    out: OutConfig,
    /// `false`: the ports of the sandbox require a token.
    allow_public_traffic: Option<bool>,
    /// `Host` of requests, as the servers in the sandbox see it; `${PORT}` stands for the port.
    mask_request_host: Option<String>,
    /// Not implemented.
    https_ports: Option<Vec<i64>>,
}

/// Rules for outbound traffic. An omitted field is cleared.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct OutConfig {
    /// IPv4 addresses and CIDR blocks. Take precedence over `denyOut`.
    allow_out: Option<Vec<String>>,
    /// IPv4 addresses and CIDR blocks.
    deny_out: Option<Vec<String>>,
    /// Not implemented.
    dns_servers: Option<Vec<String>>,
    /// Not implemented.
    #[schema(value_type = Option<Object>)]
    rules: Option<Map<String, Value>>,
    /// Not implemented.
    #[schema(value_type = Option<Object>)]
    egress_proxy: Option<Value>,
}

/// Body of a network update. Replaces the rules for outbound traffic.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct NetworkUpdate {
    #[serde(flatten)]
    out: OutConfig,
    /// Access to the internet. Default: the server's setting.
    allow_internet_access: Option<bool>,
}

impl NetworkConfig {
    /// Checks the settings and stores them in a sandbox's options.
    pub(super) fn apply(&self, options: &mut Options) -> Result<(), E2bError> {
        if self
            .https_ports
            .as_ref()
            .is_some_and(|ports| !ports.is_empty())
        {
            return Err(E2bError::unimplemented("`network.httpsPorts`"));
        }
        options.network = self.out.lists("network.")?;
        if self.allow_public_traffic == Some(false) {
            options.traffic_token = new_traffic_token();
        }
        if let Some(host) = &self.mask_request_host {
            check_host(host)?;
            options.mask_host.clone_from(host);
        }
        Ok(())
    }
}

impl OutConfig {
    fn lists(&self, prefix: &str) -> Result<NetworkLists, E2bError> {
        let unimplemented = |name: &str| E2bError::unimplemented(&format!("`{prefix}{name}`"));
        if self
            .dns_servers
            .as_ref()
            .is_some_and(|list| !list.is_empty())
        {
            return Err(unimplemented("dnsServers"));
        }
        if self.rules.as_ref().is_some_and(|rules| !rules.is_empty()) {
            return Err(unimplemented("rules"));
        }
        if self
            .egress_proxy
            .as_ref()
            .is_some_and(|proxy| !proxy.is_null())
        {
            return Err(unimplemented("egressProxy"));
        }
        let allow = self.allow_out.clone().unwrap_or_default();
        let deny = self.deny_out.clone().unwrap_or_default();
        check_lists(prefix, &allow, &deny)?;
        Ok(NetworkLists { allow, deny })
    }
}

/// Checks both lists. Only addresses and CIDR blocks can be filtered. Host names are valid only if
/// everything else is denied, and are not implemented. Otherwise they would allow traffic that is
/// allowed anyway, which the client cannot have intended.
fn check_lists(prefix: &str, allow: &[String], deny: &[String]) -> Result<(), E2bError> {
    let (allow_name, deny_name) = (format!("{prefix}allowOut"), format!("{prefix}denyOut"));
    if allow.len() + deny.len() > MAX_ENTRIES {
        let why =
            format!("exceeds, together with `{deny_name}`, the limit of {MAX_ENTRIES} entries");
        return Err(E2bError::field(&allow_name, why));
    }
    for entry in deny {
        if kind(&deny_name, entry)? == Entry::Host {
            let why = format!("`{entry}` is a host name; expected an IPv4 address or CIDR block");
            return Err(E2bError::field(&deny_name, why));
        }
    }
    for entry in allow {
        if kind(&allow_name, entry)? == Entry::Host {
            if !deny.iter().any(|denied| denied == EVERYTHING) {
                let why = format!(
                    "`{entry}` is a host name, which requires `{EVERYTHING}` in `{deny_name}`"
                );
                return Err(E2bError::field(&allow_name, why));
            }
            return Err(E2bError::unimplemented(&format!(
                "host names in `{allow_name}`"
            )));
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Block,
    Host,
}

fn kind(name: &str, entry: &str) -> Result<Entry, E2bError> {
    let shown: String = entry.chars().take(80).collect();
    let bad = |why: &str| Err(E2bError::field(name, format!("`{shown}` {why}")));
    let address = entry.split_once('/').map_or(entry, |(address, _)| address);
    if address.parse::<Ipv4Addr>().is_ok() {
        let fits = address == entry || entry.parse::<Ipv4Net>().is_ok();
        return match fits {
            true => Ok(Entry::Block),
            false => bad("is not a valid CIDR block"),
        };
    }
    if entry.contains(':') {
        return bad("is not an IPv4 address; sandboxes have no IPv6");
    }
    let plain = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let host = entry.strip_prefix("*.").unwrap_or(entry);
    let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if entry.len() > MAX_ENTRY_BYTES || numeric || !host.split('.').all(plain) {
        return bad("is not an IPv4 address, CIDR block or host name");
    }
    Ok(Entry::Host)
}

/// Checks a host with an optional port, as it may appear in a `Host` header.
fn check_host(host: &str) -> Result<(), E2bError> {
    let plain = host.replace("${PORT}", "0");
    let fits = !plain.is_empty() && plain.len() <= MAX_ENTRY_BYTES;
    let authority = plain.parse::<http::uri::Authority>();
    if fits && authority.is_ok_and(|authority| !authority.as_str().contains('@')) {
        return Ok(());
    }
    Err(E2bError::field(
        "network.maskRequestHost",
        "expected a host with an optional port",
    ))
}

/// Returns the egress that the client asked for, else the server's default.
pub(super) fn egress(asked: Option<bool>, default: Egress) -> Egress {
    match asked {
        None => default,
        Some(true) => Egress::Allow,
        Some(false) => Egress::Deny,
    }
}

/// Replaces the rules for outbound traffic of a running or paused sandbox.
///
/// Omitted fields are cleared. Open connections stay open.
#[utoipa::path(
    put, path = "/sandboxes/{id}/network", tag = "e2b", operation_id = "e2b_update_network", request_body = NetworkUpdate,
    params(("id" = String, Path, description = "Sandbox id.")),
    responses((status = 204, description = "The rules were replaced."), E2bErrors, E2bNotFound, E2bConflict)
)]
pub(super) async fn update(
    State(app): State<AppState>,
    E2bSandboxPath(id): E2bSandboxPath,
    E2bJson(request): E2bJson<NetworkUpdate>,
) -> Result<StatusCode, E2bError> {
    let lists = request.out.lists("")?;
    let egress = egress(request.allow_internet_access, app.default_egress);
    app.lifecycle
        .set_network(&id, egress, request.allow_internet_access, lists)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    fn lists(allow: &[&str], deny: &[&str]) -> u16 {
        let owned = |list: &[&str]| {
            list.iter()
                .map(|&entry| entry.to_owned())
                .collect::<Vec<_>>()
        };
        match check_lists("", &owned(allow), &owned(deny)) {
            Ok(()) => 204,
            Err(error) => error.status.as_u16(),
        }
    }

    #[test]
    fn only_addresses_and_blocks_are_accepted() {
        assert_eq!(lists(&["1.1.1.1", "10.0.0.0/8"], &["0.0.0.0/0"]), 204);
        assert_eq!(lists(&["example.com"], &[]), 400);
        assert_eq!(lists(&["example.com"], &["1.1.1.1"]), 400);
        assert_eq!(lists(&["*.example.com"], &["0.0.0.0/0"]), 501);
        assert_eq!(lists(&[], &["example.com"]), 400);
        for bad in [
            "1.1.1.1/33",
            "1.1.1",
            "::1",
            "2001:db8::/32",
            "",
            "a b",
            "a..b",
            "1.1.1.1/",
            "1.1.1.1/+8",
            "010.0.0.1/8",
        ] {
            assert_eq!(lists(&[bad], &["0.0.0.0/0"]), 400, "{bad}");
        }
        let many = vec!["1.1.1.1"; MAX_ENTRIES + 1];
        assert_eq!(lists(&many, &[]), 400);
    }

    #[test]
    fn masked_host_must_be_a_valid_header_value() {
        for good in ["localhost", "localhost:${PORT}", "example.com:80"] {
            assert!(check_host(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a\r\nb", "u@h", "a/b"] {
            assert!(check_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unimplemented_field_is_rejected_unless_empty() {
        for (text, built) in [
            (
                r#"{"rules":{}, "dnsServers":[], "egressProxy":null, "httpsPorts":[]}"#,
                true,
            ),
            (r#"{"rules":{"x":[]}}"#, false),
            (r#"{"dnsServers":["1.1.1.1"]}"#, false),
            (r#"{"egressProxy":{"address":"x"}}"#, false),
            (r#"{"httpsPorts":[443]}"#, false),
        ] {
            let config: NetworkConfig = serde_json::from_str(text).unwrap();
            let done = config.apply(&mut Options::default());
            match built {
                true => assert!(done.is_ok(), "{text}"),
                false => assert_eq!(done.unwrap_err().status.as_u16(), 501, "{text}"),
            }
        }
    }
}
