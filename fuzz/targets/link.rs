//! Signed links. Lines: path, user, expiry, text before the signed query, text after it.
//!
//! The proxy finds a sandbox by the signature, the guest agent then checks it again. Both must read
//! the same grant from a query.
#![no_main]

use std::sync::LazyLock;

use axum::extract::Query;
use http::{Method, Uri};
use libfuzzer_sys::fuzz_target;
use wrenn_envd::{
    auth::{LinkRefused, check_link},
    http::link::FileQuery,
    settings::{Init, Settings, Unnamed},
};
use wrenn_fuzz::texts;
use wrenn_proto::Grant;
use wrenn_proxy::SignedLink;

const TOKEN: &str = "token";

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| {
    let settings = Settings::default();
    let init = Init {
        access_token: Some(TOKEN.to_owned()),
        ..Init::default()
    };
    settings.apply(init, Unnamed::Keep);
    settings
});

fuzz_target!(|input: &[u8]| {
    let Some([path, user, expires, before, after]) = texts(input) else {
        return;
    };
    let grant = Grant {
        path,
        operation: "read",
        user,
        expires: expires.parse().ok(),
    };
    let query = signed_query(&grant);
    let link = SignedLink::parse(&Method::GET, "/files", &query).expect("a signed link");
    assert!(link.is_signed_with(TOKEN));
    assert!(!link.is_signed_with("other"));
    let written = SignedLink::parse(&Method::POST, "/files", &query).expect("a signed link");
    assert!(!written.is_signed_with(TOKEN));
    compare(&query);
    compare(&format!("{before}{query}{after}"));
});

fn signed_query(grant: &Grant<'_>) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("path", grant.path);
    query.append_pair("username", grant.user);
    if let Some(expires) = grant.expires {
        query.append_pair("signature_expiration", &expires.to_string());
    }
    query.append_pair("signature", &grant.sign(TOKEN));
    query.finish()
}

/// Checks that proxy and guest agent agree on a query that the guest agent accepts.
fn compare(query: &str) {
    let Ok(uri) = Uri::try_from(format!("/files?{query}")) else {
        return;
    };
    let Ok(Query(file)) = Query::<FileQuery>::try_from_uri(&uri) else {
        return;
    };
    let grant = Grant {
        path: &file.path,
        operation: "read",
        user: file.username.as_deref().unwrap_or_default(),
        expires: file.signature_expiration,
    };
    let guest = check_link(&SETTINGS, None, file.signature.as_deref(), grant);
    let guest = !matches!(guest, Err(LinkRefused::Unsigned | LinkRefused::Forged));
    // A fragment is not part of a request's query.
    let query = uri.query().unwrap_or_default();
    let proxy = SignedLink::parse(&Method::GET, "/files", query);
    assert_eq!(proxy.is_some_and(|link| link.is_signed_with(TOKEN)), guest);
}
