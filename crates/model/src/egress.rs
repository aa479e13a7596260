//! Network access of a sandbox to addresses beyond its host.

use serde::{Deserialize, Serialize};

/// Network access of a sandbox to addresses beyond its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// No traffic leaves the sandbox.
    Deny,
    /// Connections to addresses beyond the host are allowed. The host and other sandboxes remain
    /// unreachable.
    Allow,
}

impl std::str::FromStr for Egress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err(format!("expected `allow` or `deny`, got `{s}`")),
        }
    }
}

/// Maximum network access that the operator of a host permits its sandboxes. A client's request
/// cannot exceed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EgressLimit {
    /// Only ranges that the operator opens.
    Never,
    /// Public addresses, and ranges that the operator opens.
    #[default]
    Public,
    /// Every address except the host, other sandboxes and link-local addresses.
    Any,
}

impl std::str::FromStr for EgressLimit {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "never" => Ok(Self::Never),
            "public" => Ok(Self::Public),
            "any" => Ok(Self::Any),
            _ => Err(format!("expected `never`, `public` or `any`, got `{s}`")),
        }
    }
}

impl std::fmt::Display for EgressLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Public => "public",
            Self::Any => "any",
        })
    }
}
