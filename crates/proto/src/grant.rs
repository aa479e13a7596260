//! Signed links to files in a guest. The holder of a link can read or write one path without a
//! token.

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use sha2::{Digest as _, Sha256};

/// Operation that a signed link permits.
#[derive(Debug, Clone, Copy)]
pub struct Grant<'a> {
    /// Decoded `path` parameter of the query.
    pub path: &'a str,
    /// `read` or `write`.
    pub operation: &'a str,
    /// User from the query; empty if absent.
    pub user: &'a str,
    /// Expiry time, in seconds since 1970; `None` if the link does not expire.
    pub expires: Option<i64>,
}

impl Grant<'_> {
    /// Returns the signature: `v1_`, followed by the unpadded standard base64 of SHA-256 over
    /// `path:operation:user:token`. If the link expires, `:expiration` is appended to the hashed
    /// text. Source: E2B's SDKs.
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
    fn signature_matches_the_sdks() {
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
