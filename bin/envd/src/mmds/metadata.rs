//! Content of the metadata service's response. No I/O.

use serde::Deserialize;
use sha2::{Digest as _, Sha512};
use subtle::ConstantTimeEq as _;

use crate::identity::{Identity, is_word};

/// Response of the service. An absent or null field is empty, and unknown fields are ignored, so
/// that a new or missing field does not affect the others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Id of the sandbox.
    #[serde(rename = "instanceID")]
    instance_id: Option<String>,
    /// Id of the template.
    #[serde(rename = "envID")]
    env_id: Option<String>,
    /// SHA-512 of the token that `/init` may set, in hexadecimal.
    #[serde(rename = "accessTokenHash")]
    access_token_hash: Option<String>,
}

/// Invalid response.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The response is not JSON of the expected form.
    #[error("failed to parse the metadata")]
    NotJson(#[source] serde_json::Error),
    /// An id cannot be a line of a file.
    #[error("invalid `{field}`: expected at most 64 bytes of letters, digits, `-`, `.` and `_`")]
    BadWord {
        /// Name of the field.
        field: &'static str,
    },
}

impl Metadata {
    /// Parses a response.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, MetadataError> {
        let metadata: Self = serde_json::from_slice(bytes).map_err(MetadataError::NotJson)?;
        for (field, word) in [
            ("instanceID", &metadata.instance_id),
            ("envID", &metadata.env_id),
        ] {
            if !word.as_deref().is_none_or(is_word) {
                return Err(MetadataError::BadWord { field });
            }
        }
        Ok(metadata)
    }

    /// Returns the guest's identity, or `None` if the service does not know it yet.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        let sandbox_id = self.instance_id.clone().filter(|id| !id.is_empty())?;
        Some(Identity {
            sandbox_id,
            template_id: self.env_id.clone().unwrap_or_default(),
        })
    }

    /// Returns the hash of the token that may be set, or `None` if the response contains none.
    #[must_use]
    pub fn token_hash(&self) -> Option<TokenHash> {
        let hash = self.access_token_hash.as_deref()?;
        let hash = hash.trim().to_ascii_lowercase();
        (!hash.is_empty()).then_some(TokenHash(hash))
    }
}

/// SHA-512 of the token that may be set. Does not reveal the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenHash(String);

impl TokenHash {
    /// True if this is the hash of `token`. The hash for no token is that of the empty token.
    #[must_use]
    pub fn allows(&self, token: Option<&str>) -> bool {
        let mut right = String::with_capacity(128);
        for byte in Sha512::digest(token.unwrap_or_default()) {
            right.push_str(&format!("{byte:02x}"));
        }
        right.as_bytes().ct_eq(self.0.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Metadata {
        Metadata::parse(text.as_bytes()).expect(text)
    }

    #[test]
    fn each_field_may_be_absent_and_others_may_come() {
        let all = parse(r#"{"instanceID":"sb-1","envID":"base","address":"","new":[1]}"#);
        let identity = all.identity().expect("known");
        assert_eq!(
            (identity.sandbox_id.as_str(), identity.template_id.as_str()),
            ("sb-1", "base")
        );
        assert_eq!(all.token_hash(), None);
        let some = parse(r#"{"instanceID":"sb-1","envID":null}"#);
        assert_eq!(some.identity().expect("known").template_id, "");
        for none in ["{}", r#"{"envID":"x"}"#, r#"{"instanceID":""}"#] {
            assert_eq!(parse(none).identity(), None, "{none}");
        }
        for bad in ["", "[]x", "1", r#"{"instanceID":1}"#] {
            assert!(Metadata::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let broken = br#"{"instanceID":"a\nb"}"#;
        assert!(matches!(
            Metadata::parse(broken),
            Err(MetadataError::BadWord {
                field: "instanceID"
            })
        ));
    }

    #[test]
    fn a_hash_allows_its_token_only() {
        let hash = |hash: &str| parse(&format!(r#"{{"accessTokenHash":"{hash}"}}"#)).token_hash();
        assert_eq!(hash(""), None);
        // printf '%s' token | sha512sum
        let of_token = hash("FCF5F25E6BA1DC1A5C3F55F2D5A19B4C37C1E1B7A9E0A1D2C3B4A5968778695A")
            .expect("a hash");
        assert!(!of_token.allows(Some("token")), "another hash");
        // printf '' | sha512sum
        let of_none = hash("cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e").expect("a hash");
        assert!(of_none.allows(None) && of_none.allows(Some("")));
        assert!(!of_none.allows(Some("token")));
        // printf abc | sha512sum
        let of_abc = hash("ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f").expect("a hash");
        assert!(of_abc.allows(Some("abc")) && !of_abc.allows(Some("abd")) && !of_abc.allows(None));
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Metadata::parse(&bytes);
        }
    }
}
