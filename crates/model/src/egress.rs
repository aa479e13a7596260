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
