//! Removes hop-by-hop headers, and adds the headers that the proxy sets.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, uri::Authority};

use crate::lookup::Target;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Header that carries the guest agent's access token.
pub(crate) const ACCESS_TOKEN: HeaderName =
    HeaderName::from_static(wrenn_proto::headers::ACCESS_TOKEN);
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const TRAFFIC_TOKEN: HeaderName = HeaderName::from_static(crate::failure::TRAFFIC_TOKEN);

/// Hop-by-hop headers, removed whether or not `Connection` lists them. `Trailer` is not among them:
/// trailers are forwarded.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers that determine how a message is parsed or authorized. A client cannot have them removed
/// by listing them in `Connection`.
const KEPT: [HeaderName; 4] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRAILER,
    ACCESS_TOKEN,
];

/// Properties of a request that its forwarded headers depend on.
pub(crate) struct ForwardContext<'a> {
    /// Port in the sandbox.
    pub(crate) port: u16,
    /// True if the target is the guest agent rather than a server of the user.
    pub(crate) is_envd: bool,
    /// Host that the client addressed.
    pub(crate) authority: &'a Authority,
    /// Address of the client.
    pub(crate) client: IpAddr,
    /// Resolved target sandbox.
    pub(crate) target: &'a Target,
}

/// Returns the protocol that a request asks to upgrade to, if any.
pub(crate) fn requested_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = tokens(headers).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| asks).cloned()
}

/// Converts a client's headers into those sent to the sandbox. With `upgrade`, the request asks for
/// that protocol.
pub(crate) fn prepare_request(
    headers: &mut HeaderMap,
    context: &ForwardContext<'_>,
    upgrade: Option<&HeaderValue>,
) {
    let takes_trailers = headers
        .get_all(header::TE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|coding| coding.trim().eq_ignore_ascii_case("trailers"));
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // The length of a chunked body is defined by its chunks alone; with a conflicting
        // `Content-Length` two servers could see two different requests.
        headers.remove(header::CONTENT_LENGTH);
    }
    remove_hop_by_hop(headers);
    // The proxy answers this itself, when the body is first read.
    headers.remove(header::EXPECT);
    // The traffic token is meant for the proxy alone.
    headers.remove(TRAFFIC_TOKEN);
    if takes_trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        switch_to(headers, protocol.clone());
    }
    add_forwarded(headers, context);
    if let Some(host) = host(context) {
        headers.insert(header::HOST, host);
    }
    if let Some(token) = context.target.injected_token().filter(|_| context.is_envd)
        && let Ok(mut token) = HeaderValue::from_str(token)
    {
        token.set_sensitive(true);
        headers.insert(ACCESS_TOKEN, token);
    }
}

/// Converts a sandbox's headers into those sent to the client.
pub(crate) fn prepare_answer(headers: &mut HeaderMap, status: StatusCode) {
    let protocol = headers.get(header::UPGRADE).cloned();
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    remove_hop_by_hop(headers);
    // With these two statuses the header is part of the response.
    let keeps = matches!(
        status,
        StatusCode::SWITCHING_PROTOCOLS | StatusCode::UPGRADE_REQUIRED
    );
    if let Some(protocol) = protocol.filter(|_| keeps) {
        switch_to(headers, protocol);
    }
}

fn switch_to(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers)
        .filter_map(|token| token.parse().ok())
        .filter(|name| !KEPT.contains(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn add_forwarded(headers: &mut HeaderMap, context: &ForwardContext<'_>) {
    let client = context.client.to_canonical();
    let before: Vec<&str> = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    let chain = before
        .iter()
        .fold(String::new(), |chain, hop| chain + hop + ", ");
    if let Ok(chain) = HeaderValue::from_str(&format!("{chain}{client}")) {
        headers.insert(FORWARDED_FOR, chain);
    }
    // A proxy in front of this one that terminates TLS has already set the right value.
    if !headers.contains_key(FORWARDED_HOST)
        && let Ok(host) = HeaderValue::from_str(context.authority.as_str())
    {
        headers.insert(FORWARDED_HOST, host);
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
}

fn host(context: &ForwardContext<'_>) -> Option<HeaderValue> {
    let masked = context.target.mask_host.as_deref();
    match masked.filter(|mask| !context.is_envd && !mask.is_empty()) {
        Some(mask) => {
            HeaderValue::from_str(&mask.replace("${PORT}", &context.port.to_string())).ok()
        }
        None => HeaderValue::from_str(context.authority.as_str()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(sent: &[(&str, &str)], port: u16, target: &Target) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in sent {
            let name: HeaderName = name.parse().expect("a header's name");
            headers.append(name, value.parse().expect("a header's value"));
        }
        let context = ForwardContext {
            port,
            is_envd: port == 49983,
            authority: &Authority::from_static("80-i1.example.com:8001"),
            client: "::ffff:10.0.0.1".parse().expect("an address"),
            target,
        };
        let upgrade = requested_upgrade(&headers);
        prepare_request(&mut headers, &context, upgrade.as_ref());
        headers
    }

    #[test]
    fn connection_headers_are_not_forwarded() {
        let sent = [
            ("connection", "close, X-Own, host"),
            ("x-own", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("trailer", "x-sum"),
            ("accept", "*/*"),
        ];
        let headers = prepared(&sent, 80, &Target::default());
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "accept",
                "host",
                "te",
                "trailer",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-proto"
            ]
        );
        assert_eq!(headers["te"], "trailers");
    }

    #[test]
    fn upgrade_is_requested_from_the_upstream() {
        let sent = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ];
        let headers = prepared(&sent, 80, &Target::default());
        assert_eq!(headers["connection"], "upgrade");
        assert_eq!(headers["upgrade"], "websocket");
    }

    #[test]
    fn forwarded_headers_name_the_client() {
        let headers = prepared(
            &[
                ("x-forwarded-for", "1.1.1.1"),
                ("x-forwarded-proto", "https"),
            ],
            80,
            &Target::default(),
        );
        assert_eq!(headers["x-forwarded-for"], "1.1.1.1, 10.0.0.1");
        assert_eq!(headers["x-forwarded-host"], "80-i1.example.com:8001");
        assert_eq!(headers["x-forwarded-proto"], "https");
    }

    #[test]
    fn masked_host_is_sent_to_servers_but_not_to_the_guest_agent() {
        let target = Target {
            mask_host: Some("localhost:${PORT}".to_owned()),
            guest_token: Some("secret".to_owned()),
            is_open: true,
            ..Target::default()
        };
        let headers = prepared(&[("host", "80-i1.example.com:8001")], 80, &target);
        assert_eq!(headers["host"], "localhost:80");
        assert!(!headers.contains_key("x-access-token"));
        let headers = prepared(&[("host", "x"), ("x-access-token", "old")], 49983, &target);
        assert_eq!(headers["host"], "80-i1.example.com:8001");
        assert_eq!(headers["x-access-token"], "secret");
    }

    #[test]
    fn traffic_token_is_not_forwarded() {
        let headers = prepared(&[("e2b-traffic-access-token", "t")], 80, &Target::default());
        assert!(!headers.contains_key("e2b-traffic-access-token"));
    }
}
