//! Signed links to files of a guest: whoever holds one may read or write one path, without a token.

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};

/// What a signed link grants.
#[derive(Debug, Clone, Copy)]
pub struct Grant<'a> {
    /// Path as it stands in the query, decoded.
    pub path: &'a str,
    /// `read` or `write`.
    pub operation: &'a str,
    /// User as it stands in the query; empty if absent.
    pub user: &'a str,
    /// Seconds since 1970 after which the link is dead.
    pub expires: Option<i64>,
}

impl Grant<'_> {
    /// Its signature: `v1_` and the unpadded standard base64 of SHA-256 over `path:operation:user:token`, followed by
    /// `:expiration` if there is one. Source: E2B's SDKs.
    #[must_use]
    pub fn sign(&self, token: &str) -> String {
        let Self {
            path,
            operation,
            user,
            expires,
        } = self;
        let mut text = format!("{path}:{operation}:{user}:{token}");
        if let Some(expires) = expires {
            text.push_str(&format!(":{expires}"));
        }
        format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(Sha256::digest(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_the_sdks_compute() {
        let grant = Grant {
            path: "/tmp/a",
            operation: "read",
            user: "",
            expires: None,
        };
        assert_eq!(
            grant.sign("tok_i0000000000000000000"),
            "v1_g7p+J5QvIpRdbHMeNxcfb8LDrRVIMz5M5OTfgfKx9sg"
        );
    }
}
