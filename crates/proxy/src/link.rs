//! Signed links. Those of E2B's SDKs identify their sandbox only by the token that signed them. A
//! client that builds links itself adds the parameter `sandbox_id`, which is not part of the
//! signature: the sandbox is then found without a search.

use std::{
    borrow::Cow,
    time::{SystemTime, UNIX_EPOCH},
};

use http::Method;
use subtle::ConstantTimeEq as _;
use wrenn_model::SandboxId;
use wrenn_proto::Grant;

/// Access that a link grants, and its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedLink<'a> {
    path: Cow<'a, str>,
    user: Cow<'a, str>,
    signature: Cow<'a, str>,
    operation: &'static str,
    expires: Option<i64>,
    sandbox: Option<SandboxId>,
}

impl<'a> SignedLink<'a> {
    /// Parses the signed link of a request; `None` if the request is not one.
    #[must_use]
    pub fn parse(method: &Method, path: &str, query: &'a str) -> Option<Self> {
        let operation = match *method {
            Method::GET | Method::HEAD => "read",
            Method::POST => "write",
            _ => return None,
        };
        if path != "/files" {
            return None;
        }
        let (mut path, mut user, mut signature, mut expires) = (None, None, None, None);
        let mut sandbox = None;
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            // The guest agent rejects duplicate names, so using the first value is safe.
            match &*name {
                "path" => path = path.or(Some(value)),
                "username" => user = user.or(Some(value)),
                "signature" => signature = signature.or(Some(value)),
                "signature_expiration" => expires = expires.or(Some(value)),
                "sandbox_id" => sandbox = sandbox.or_else(|| value.parse().ok()),
                _ => {}
            }
        }
        let expires = match expires {
            None => None,
            Some(text) => Some(text.parse().ok()?),
        };
        Some(Self {
            path: path.unwrap_or_default(),
            user: user.unwrap_or_default(),
            signature: signature?,
            operation,
            expires,
            sandbox,
        })
    }

    /// Returns the sandbox that the link names. The token of this sandbox must have signed it.
    #[must_use]
    pub fn sandbox(&self) -> Option<SandboxId> {
        self.sandbox.clone()
    }

    /// Returns the signature as sent.
    #[must_use]
    pub fn signature(&self) -> &str {
        &self.signature
    }

    /// True if the link has expired according to this machine's clock. The guest's own clock may be
    /// behind for a short time after a restore.
    pub(crate) fn has_expired(&self) -> bool {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        self.expires.is_some_and(|expires| expires < now)
    }

    /// True if the guest agent's `token` signed the link. Does not check expiry.
    #[must_use]
    pub fn is_signed_with(&self, token: &str) -> bool {
        let grant = Grant {
            path: &self.path,
            operation: self.operation,
            user: &self.user,
            expires: self.expires,
        };
        let expected = grant.sign(token);
        bool::from(expected.as_bytes().ct_eq(self.signature.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &str =
        "path=%2Ftmp%2Fa&signature=v1_g7p%2BJ5QvIpRdbHMeNxcfb8LDrRVIMz5M5OTfgfKx9sg";

    #[test]
    fn sdk_link_is_verified_by_its_token_only() {
        let link = SignedLink::parse(&Method::GET, "/files", QUERY).expect("a link");
        assert!(link.is_signed_with("tok_i0000000000000000000"));
        assert!(!link.is_signed_with("tok_i0000000000000000001"));
        let written = SignedLink::parse(&Method::POST, "/files", QUERY).expect("a link");
        assert!(!written.is_signed_with("tok_i0000000000000000000"));
        assert_eq!(link.sandbox(), None);
    }

    #[test]
    fn sandbox_id_is_not_part_of_the_signature() {
        let query = format!("{QUERY}&sandbox_id=sb-1");
        let link = SignedLink::parse(&Method::GET, "/files", &query).expect("a link");
        assert!(link.is_signed_with("tok_i0000000000000000000"));
        assert_eq!(link.sandbox(), "sb-1".parse().ok());
        let query = format!("{QUERY}&sandbox_id=../x");
        let link = SignedLink::parse(&Method::GET, "/files", &query).expect("a link");
        assert_eq!(link.sandbox(), None);
    }

    #[test]
    fn other_requests_are_not_signed_links() {
        assert_eq!(SignedLink::parse(&Method::GET, "/files", "path=a"), None);
        assert_eq!(SignedLink::parse(&Method::GET, "/health", QUERY), None);
        assert_eq!(SignedLink::parse(&Method::DELETE, "/files", QUERY), None);
        let expiring = format!("{QUERY}&signature_expiration=soon");
        assert_eq!(SignedLink::parse(&Method::GET, "/files", &expiring), None);
    }
}
