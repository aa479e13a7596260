//! Identifiers, validated when they are parsed.
//!
//! Both kinds of identifier become file names. A value of these types contains no separator, does not
//! start with a dot, and is always a single path component.
//!
//! | use of a sandbox id | limit | longest |
//! |---|---|---|
//! | directory, cgroup | 255 bytes | 43 |
//! | host name of the guest | 64 bytes | 43 |
//! | label of a host name, `<port>-<id>` | 63 bytes | 49 |
//! | socket of the supervisor: addressed through its directory's descriptor | – | – |
//! | network devices and namespaces: named after the network slot, not after the sandbox | – | – |
//!
//! New identifiers have 20 random characters of `[a-z0-9]`, about 103 bits: nobody can guess one.
//! Those of earlier releases had 8 hexadecimal digits and stay valid.

use std::{fmt, str::FromStr};

use rand::RngExt;
use serde::{Deserialize, Serialize};

/// Reason why a string is not a valid identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidId {
    /// The string has neither form of a sandbox id.
    #[error(
        "invalid sandbox id `{0}`: expected `sb-` and 1 to 40 characters of a-z, 0-9, or `i` and 20 of them"
    )]
    Sandbox(String),
    /// The string is not a template name.
    #[error(
        "invalid template name `{0}`: expected a letter or digit, then letters, digits, `.`, `_`, `-`, at most 64 characters"
    )]
    Template(String),
}

macro_rules! checked_string {
    ($name:ident, $check:ident, $variant:ident) => {
        impl $name {
            /// Returns the identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(s: &str) -> Result<Self, InvalidId> {
                if $check(s) {
                    Ok(Self(s.to_owned()))
                } else {
                    Err(InvalidId::$variant(s.chars().take(80).collect()))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(s: String) -> Result<Self, InvalidId> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Sandbox id in one of two forms. The first form is `sb-` and 1 to 40 characters of `[a-z0-9]`;
/// new ids have 20 of them. The second form, for clients of the E2B API, is `i` and
/// 20 characters of `[a-z0-9]`: these clients build host names from the id, in which `-` is a
/// separator.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// Template name: a letter or digit, followed by letters, digits, `.`, `_` or `-`; at most 64
/// characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

checked_string!(SandboxId, is_sandbox_id, Sandbox);
checked_string!(TemplateName, is_template_name, Template);

impl SandboxId {
    /// Returns a new id: `sb-` and 20 random characters of `[a-z0-9]`.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("sb-{}", random_characters()))
    }

    /// Returns a new id in the form of the E2B API: `i` and 20 random characters of `[a-z0-9]`.
    #[must_use]
    pub fn random_e2b() -> Self {
        Self(format!("i{}", random_characters()))
    }

    /// True if the id has the form of the E2B API.
    #[must_use]
    pub fn is_e2b(&self) -> bool {
        is_e2b_id(&self.0)
    }
}

impl TemplateName {
    /// Returns a new name: `template-` and 20 random characters of `[a-z0-9]`.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("template-{}", random_characters()))
    }

    /// True if the name has a form that [`random`](Self::random) returns, or returned in earlier
    /// releases.
    #[must_use]
    pub fn is_random(name: &str) -> bool {
        name.strip_prefix("template-").is_some_and(|rest| {
            let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            match rest.len() {
                RANDOM_LENGTH => rest.bytes().all(is_id_character),
                EARLIER_RANDOM_LENGTH => rest.bytes().all(is_hex),
                _ => false,
            }
        })
    }
}

/// Number of random characters of a new identifier.
const RANDOM_LENGTH: usize = 20;

/// Number of random characters in earlier releases, all of them hexadecimal digits.
const EARLIER_RANDOM_LENGTH: usize = 8;

fn random_characters() -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = rand::rng();
    let character = |_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]);
    (0..RANDOM_LENGTH).map(character).collect()
}

fn is_sandbox_id(s: &str) -> bool {
    let plain = |rest: &str| (1..=40).contains(&rest.len()) && rest.bytes().all(is_id_character);
    s.strip_prefix("sb-").is_some_and(plain) || is_e2b_id(s)
}

fn is_e2b_id(s: &str) -> bool {
    s.strip_prefix('i')
        .is_some_and(|rest| rest.len() == RANDOM_LENGTH && rest.bytes().all(is_id_character))
}

const fn is_id_character(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_template_name(s: &str) -> bool {
    s.len() <= 64
        && s.starts_with(|c: char| c.is_ascii_alphanumeric())
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn path_traversal_in_a_name_is_rejected() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\0b",
            "-a",
            ".a",
            "a b",
            "é",
            "/etc/passwd",
        ] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad:?}");
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
            assert!(format!("sb-{bad}").parse::<SandboxId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn template_name_longer_than_64_characters_is_rejected() {
        assert!("a".repeat(64).parse::<TemplateName>().is_ok());
        assert!("a".repeat(65).parse::<TemplateName>().is_err());
    }

    #[test]
    fn identifiers_of_earlier_releases_are_valid() {
        for id in ["sb-0123abcd", "sb-1", "i0123456789abcdefghij"] {
            assert!(id.parse::<SandboxId>().is_ok(), "{id}");
        }
        assert!("template-0123abcd".parse::<TemplateName>().is_ok());
        assert!(TemplateName::is_random("template-0123abcd"));
        for other in [
            "template-0123abcg",
            "template-0123abc",
            "template-",
            "mine",
            "template-0123456789ABCDEFGHIJ",
        ] {
            assert!(!TemplateName::is_random(other), "{other}");
        }
    }

    #[test]
    fn a_new_id_is_a_valid_id() {
        for _ in 0..1000 {
            let id = SandboxId::random();
            assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id.clone()));
            // 20 characters of 36 are more than 96 bits.
            assert_eq!(id.as_str().len(), 23);
            assert!(!id.is_e2b());
            let id = SandboxId::random_e2b();
            assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id.clone()));
            assert!(id.is_e2b() && id.as_str().len() == 21);
            let name = TemplateName::random();
            assert_eq!(name.as_str().parse::<TemplateName>(), Ok(name.clone()));
            assert_eq!(name.as_str().len(), 29);
            assert!(TemplateName::is_random(name.as_str()));
        }
    }

    proptest! {
        #[test]
        fn any_accepted_name_is_one_plain_path_component(s in ".*") {
            if let Ok(name) = s.parse::<TemplateName>() {
                let path = std::path::Path::new(name.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert_eq!(path.file_name().and_then(|f| f.to_str()), Some(name.as_str()));
            }
        }
    }
}
