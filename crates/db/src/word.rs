//! Names of enumerated values in text columns.

use wrenn_model::{Egress, OnTimeout, SandboxStatus, Scopes, TeamId};

/// Text column whose value is one of a set of names.
#[derive(sqlx::Type)]
#[sqlx(transparent)]
pub(crate) struct Word(String);

impl TryFrom<Word> for SandboxStatus {
    type Error = String;

    fn try_from(word: Word) -> Result<Self, String> {
        Self::parse(&word.0).ok_or_else(|| format!("`{}` is not a status", word.0))
    }
}

/// Reads types from their names.
macro_rules! parsed {
    ($($kind:ty),*) => {
        $(impl TryFrom<Word> for $kind {
            type Error = String;

            fn try_from(word: Word) -> Result<Self, String> {
                word.0.parse()
            }
        })*
    };
}

parsed!(Egress, OnTimeout, Scopes, TeamId);

/// Returns the name of a policy.
pub(crate) const fn egress_word(egress: Egress) -> &'static str {
    match egress {
        Egress::Deny => "deny",
        Egress::Allow => "allow",
    }
}
