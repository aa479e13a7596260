use proptest::prelude::*;

use super::*;

fn ask(host: &str, named: &[(&str, &str)]) -> Result<Route, BadAddress> {
    let mut headers = HeaderMap::new();
    headers.insert(header::HOST, host.parse().expect("a header's value"));
    for (name, value) in named {
        let name: HeaderName = name.parse().expect("a header's name");
        headers.append(name, value.parse().expect("a header's value"));
    }
    route(
        &Uri::from_static("/"),
        &headers,
        &["build-server".to_owned()],
    )
}

fn port(port: u16, id: &str) -> Result<Route, BadAddress> {
    let id = id.to_owned();
    Ok(Route::Port(Address { id, port }))
}

const BOTH: [(&str, &str); 2] = [("E2b-Sandbox-Id", "i0abc"), ("E2b-Sandbox-Port", "3000")];

#[test]
fn headers_route_requests_on_shared_names() {
    for host in [
        "localhost:8001",
        "LOCALHOST",
        "127.0.0.1:8001",
        "[::1]:8001",
        "sandbox.e2b.example",
        "build-server:8001",
    ] {
        assert_eq!(ask(host, &BOTH), port(3000, "i0abc"), "{host}");
        assert_eq!(ask(host, &[]), Ok(Route::Unaddressed), "{host}");
    }
}

#[test]
fn headers_are_ignored_on_the_name_of_a_sandbox() {
    assert_eq!(ask("80-i1.example.com", &BOTH), port(80, "i1"));
    for host in ["example.com", "sandbox", "sandbox."] {
        assert_eq!(ask(host, &BOTH), Err(BadAddress::Host), "{host}");
    }
}

#[test]
fn label_contains_port_and_id() {
    assert_eq!(ask("49983-i0abc.example.com", &[]), port(49983, "i0abc"));
    assert_eq!(
        ask("65535-sb-0123456789abcdefghij.localhost:8001", &[]),
        port(65535, "sb-0123456789abcdefghij")
    );
    assert_eq!(
        ask("80-sb-0a1b2c3d.localhost:8001", &[]),
        port(80, "sb-0a1b2c3d")
    );
    assert_eq!(ask("80-I0ABC.Example.com.", &[]), port(80, "i0abc"));
    for (host, bad) in [
        ("0-i0abc.x", BadAddress::Port),
        ("65536-i0abc.x", BadAddress::Port),
        ("-i0abc.x", BadAddress::Port),
        ("80-.x", BadAddress::Id),
        ("80-sb-.x", BadAddress::Id),
        ("80-a-b.x", BadAddress::Id),
        ("80-a_b.x", BadAddress::Id),
    ] {
        assert_eq!(ask(host, &[]), Err(bad), "{host}");
    }
}

#[test]
fn incomplete_address_is_unaddressed() {
    assert_eq!(ask("localhost", &BOTH[..1]), Err(BadAddress::Headers));
    assert_eq!(ask("localhost", &BOTH[1..]), Err(BadAddress::Headers));
    let twice = [BOTH[0], BOTH[0], BOTH[1]];
    assert_eq!(ask("localhost", &twice), Err(BadAddress::Headers));
    assert_eq!(
        ask("localhost", &[BOTH[0], ("E2b-Sandbox-Port", "+80")]),
        Err(BadAddress::Port)
    );
    assert_eq!(
        ask("localhost", &[("E2b-Sandbox-Id", "../x"), BOTH[1]]),
        Err(BadAddress::Id)
    );
}

#[test]
fn invalid_or_ambiguous_host_is_rejected() {
    assert_eq!(ask("me@localhost", &BOTH), Err(BadAddress::NoHost));
    assert_eq!(
        route(&Uri::from_static("/"), &HeaderMap::new(), &[]),
        Err(BadAddress::NoHost)
    );
    let mut headers = HeaderMap::new();
    headers.append(header::HOST, "80-i1.x".parse().expect("a value"));
    headers.append(header::HOST, "80-i2.x".parse().expect("a value"));
    assert_eq!(
        route(&Uri::from_static("/"), &headers, &[]),
        Err(BadAddress::NoHost)
    );
}

#[test]
fn absolute_target_takes_precedence_over_host() {
    let mut headers = HeaderMap::new();
    headers.insert(header::HOST, "80-i1.x".parse().expect("a value"));
    let uri = Uri::from_static("http://81-i2.x/path");
    assert_eq!(route(&uri, &headers, &[]), port(81, "i2"));
}

proptest! {
    #[test]
    fn any_host_and_headers_are_routed_or_rejected(host in "[ -~]{0,80}", id in "[ -~]{0,80}", number in "[ -~]{0,8}") {
        let _ = ask(&host, &[("E2b-Sandbox-Id", &id), ("E2b-Sandbox-Port", &number)]);
    }

    #[test]
    fn host_name_round_trips(
        id in "(sb-)?[a-z0-9]{1,40}",
        number in 1_u16..,
        domain in "[a-z]{1,9}(\\.[a-z]{1,9}){0,2}",
    ) {
        let host = format!("{number}-{id}.{domain}");
        prop_assert_eq!(ask(&host, &[]), port(number, &id));
        let number = number.to_string();
        let named = ask("localhost", &[("E2b-Sandbox-Id", &id), ("E2b-Sandbox-Port", &number)]);
        prop_assert_eq!(named, ask(&host, &[]));
    }
}
