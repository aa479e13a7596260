//! Routing of a request to a sandbox by client input. Lines: host, sandbox id header, port header,
//! path.
#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use libfuzzer_sys::fuzz_target;
use wrenn_fuzz::fields;
use wrenn_proxy::{path, route};

fuzz_target!(|input: &[u8]| {
    let [host, id, port, path] = fields(input);
    let mut headers = HeaderMap::new();
    let mut add = |name: HeaderName, value: &[u8]| {
        // An empty line means that the request does not have the header.
        if let Ok(value) = HeaderValue::from_bytes(value)
            && !value.is_empty()
        {
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
    if let Ok(path) = std::str::from_utf8(path)
        && path::is_internal(path)
    {
        assert!(path::is_internal(&format!("//./{path}")));
    }
});
