//! Routing of a request to a sandbox by client input: host, headers, path, signed link.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use libfuzzer_sys::fuzz_target;
use wrenn_proxy::{SignedLink, path, route};

fuzz_target!(|input: (&[u8], &[u8], &[u8], &str, &str)| {
    let (host, id, port, path, query) = input;
    let mut headers = HeaderMap::new();
    let mut add = |name: HeaderName, value: &[u8]| {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    };
    add(header::HOST, host);
    add(route::SANDBOX_ID, id);
    add(route::SANDBOX_PORT, port);
    if let Ok(route::Route::Port(address)) = route::route(&Uri::from_static("/"), &headers, &[]) {
        // An id fits into one label of a host name. Routing that host name must return the same
        // address.
        assert!(address.port != 0 && address.id.len() <= 57);
        headers.clear();
        let host = format!("{address}.example");
        headers.insert(header::HOST, host.parse().expect("a host name"));
        let again = route::route(&Uri::from_static("/"), &headers, &[]);
        assert_eq!(again, Ok(route::Route::Port(address)));
    }
    // A blocked path must stay blocked with additions that do not change its meaning.
    if path::is_internal(path) {
        assert!(path::is_internal(&format!("//./{path}")));
    }
    if let Some(link) = SignedLink::parse(&Method::GET, "/files", query) {
        let _ = link.is_signed_with("token");
    }
});
