//! Per-request work of the traffic proxy, and of signed links.

#![allow(clippy::unwrap_used, reason = "a benchmark stops where it fails")]

use divan::black_box;
use http::{HeaderMap, HeaderValue, Uri, header};
use wrenn_proto::Grant;

fn main() {
    divan::main();
}

/// Finds sandbox and port in the host name of a request.
#[divan::bench]
fn route_by_host(bencher: divan::Bencher<'_, '_>) {
    let uri = Uri::from_static("/files?path=%2Ftmp%2Fa");
    let mut headers = HeaderMap::new();
    let host = HeaderValue::from_static("49983-i0123456789abcdefghij.example.test");
    headers.insert(header::HOST, host);
    let shared = ["sandbox.example.test".to_owned()];
    bencher.bench_local(|| wrenn_proxy::route::route(&uri, black_box(&headers), &shared).unwrap());
}

/// Decides whether a path is one of the guest agent's internal calls.
#[divan::bench(args = ["/process.Process/Start", "/a%252fb/../%69nit"])]
fn check_path(path: &str) -> bool {
    wrenn_proxy::path::is_internal(black_box(path))
}

/// Computes the signature of a link.
#[divan::bench]
fn sign_link() -> String {
    let grant = Grant {
        path: "/home/user/report.pdf",
        operation: "read",
        user: "user",
        expires: Some(1_800_000_000),
    };
    grant.sign(black_box("0123456789abcdef0123456789abcdef"))
}
