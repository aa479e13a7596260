//! Snapshot ids: names of snapshots, of memory diff files and of disk layers.

use serde::{Deserialize, Serialize};
use wrenn_store::{ArtifactId, Kind};

/// Snapshot id: 16 random bytes, written as 32 hexadecimal digits. No snapshot has the id that is
/// all zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SnapshotId(pub [u8; 16]);

/// Error for text that is not 32 lowercase hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid snapshot id `{0}`: expected 32 lowercase hexadecimal digits")]
pub struct ParseSnapshotIdError(String);

impl SnapshotId {
    /// Generates a new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// Returns the id of the artifact of a kind that has this id.
    #[must_use]
    pub fn artifact(self, kind: Kind) -> ArtifactId {
        ArtifactId::new(kind, self.to_string()).expect("hexadecimal digits are a valid key")
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

impl std::str::FromStr for SnapshotId {
    type Err = ParseSnapshotIdError;

    fn from_str(text: &str) -> Result<Self, ParseSnapshotIdError> {
        let mut bytes = [0; 16];
        let rejected = || ParseSnapshotIdError(text.chars().take(80).collect());
        hex::decode_to_slice(text, &mut bytes).map_err(|_| rejected())?;
        // Only one spelling is accepted, because the id becomes a file name.
        if hex::encode(bytes) == text {
            Ok(Self(bytes))
        } else {
            Err(rejected())
        }
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = ParseSnapshotIdError;

    fn try_from(text: String) -> Result<Self, ParseSnapshotIdError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_hexadecimal_ids_are_accepted() {
        let id = SnapshotId::random();
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "..", "0g", &"A".repeat(32), &"0".repeat(31)] {
            assert!(wrong.parse::<SnapshotId>().is_err(), "{wrong}");
        }
    }
}
