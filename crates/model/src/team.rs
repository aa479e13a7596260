//! Owners of sandboxes, and what an API key may do.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Team that owns sandboxes and API keys: 1 to 40 characters of `[a-z0-9-]`, the first of them not
/// `-`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TeamId(String);

impl TeamId {
    /// Team of the first API keys and of everything that an earlier release created.
    pub const DEFAULT: &'static str = "default";

    /// Returns the id as text. Never empty.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TeamId {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl FromStr for TeamId {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if (1..=40).contains(&s.len()) && s.bytes().all(plain) && !s.starts_with('-') {
            return Ok(Self(s.to_owned()));
        }
        Err(format!("`{s}` is not a team id"))
    }
}

impl fmt::Display for TeamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Part of the API that a key may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Sandboxes, their content, templates and snapshots.
    Sandboxes,
    /// API keys of the team.
    Keys,
    /// State of the hosts, logs of the sandboxes of all teams, and sandboxes that no database
    /// knows.
    Hosts,
}

impl Scope {
    /// All scopes, in the order in which they are stored.
    pub const ALL: [Self; 3] = [Self::Sandboxes, Self::Keys, Self::Hosts];

    /// Returns the name used on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Keys => "keys",
            Self::Hosts => "hosts",
        }
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scope| scope.as_str() == s);
        found.ok_or_else(|| format!("expected `sandboxes`, `keys` or `hosts`, got `{s}`"))
    }
}

/// Scopes of a key. Stored as their names, separated by commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scopes(Vec<Scope>);

impl Scopes {
    /// Returns all scopes.
    #[must_use]
    pub fn all() -> Self {
        Self(Scope::ALL.to_vec())
    }

    /// True if the scope is one of these.
    #[must_use]
    pub fn contains(&self, scope: Scope) -> bool {
        self.0.contains(&scope)
    }

    /// True if these scopes include all of the others.
    #[must_use]
    pub fn include(&self, others: &Self) -> bool {
        others.0.iter().all(|scope| self.contains(*scope))
    }

    /// Returns the scopes, in their order.
    #[must_use]
    pub fn as_slice(&self) -> &[Scope] {
        &self.0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        let mut scopes: Vec<_> = scopes.into_iter().collect();
        scopes.sort_unstable();
        scopes.dedup();
        Self(scopes)
    }
}

impl FromStr for Scopes {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        s.split(',').map(str::parse).collect()
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|scope| scope.as_str()).collect();
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn team_id_accepts_its_alphabet_only() {
        for good in ["default", "a", "team-7", &"a".repeat(40)] {
            assert_eq!(good.parse::<TeamId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "A", "a b", "é", "a'", &"a".repeat(41)] {
            assert!(bad.parse::<TeamId>().is_err(), "{bad}");
        }
        assert_eq!(TeamId::DEFAULT.parse(), Ok(TeamId::default()));
    }

    #[test]
    fn scopes_are_parsed_from_their_text() {
        let scopes: Scopes = "hosts,sandboxes,hosts".parse().unwrap();
        assert_eq!(scopes.to_string(), "sandboxes,hosts");
        assert!(scopes.contains(Scope::Hosts) && !scopes.contains(Scope::Keys));
        assert!(Scopes::all().include(&scopes) && !scopes.include(&Scopes::all()));
        assert_eq!(Scopes::all().to_string().parse(), Ok(Scopes::all()));
        for bad in ["", "all", "keys,", "Keys"] {
            assert!(bad.parse::<Scopes>().is_err(), "{bad}");
        }
    }
}
