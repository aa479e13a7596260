//! Ids of artifacts.

use serde::{Deserialize, Serialize};

use crate::Content;

/// Maximum length of a key, in bytes.
const MAX_KEY_BYTES: usize = 80;

/// Kind of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Pages of one generation of a VM's memory.
    Memory,
    /// Map from the pages of a VM's memory to generations.
    Header,
    /// Layer of a disk (qcow2).
    Disk,
    /// State of CPUs and devices.
    Device,
    /// Uncompressed kernel.
    Kernel,
    /// Initial RAM disk.
    Initrd,
    /// Image at the base of a disk (raw).
    Rootfs,
    /// Description of a snapshot.
    Manifest,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Memory,
        Self::Header,
        Self::Disk,
        Self::Device,
        Self::Kernel,
        Self::Initrd,
        Self::Rootfs,
        Self::Manifest,
    ];

    /// Returns the first part of the ids of this kind.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "mem",
            Self::Header => "header",
            Self::Disk => "disk",
            Self::Device => "device",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Rootfs => "rootfs",
            Self::Manifest => "manifest",
        }
    }
}

/// Id of an artifact: kind and key, written as `disk/0123…`. The key has 1 to 80 digits, lowercase
/// letters and `-`. Two artifacts with the same id have the same content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ArtifactId {
    kind: Kind,
    key: String,
}

/// Error for text that is not an artifact id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid artifact id `{0}`: expected a kind, `/`, and 1 to 80 of `a-z`, `0-9` and `-`")]
pub struct ParseArtifactIdError(String);

impl ArtifactId {
    /// Returns the id with this kind and key.
    ///
    /// # Errors
    /// The key has another form.
    pub fn new(kind: Kind, key: impl Into<String>) -> Result<Self, ParseArtifactIdError> {
        let key = key.into();
        let is_valid =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(is_valid) {
            return Ok(Self { kind, key });
        }
        let shown: String = key.chars().take(MAX_KEY_BYTES).collect();
        Err(ParseArtifactIdError(format!("{}/{shown}", kind.name())))
    }

    /// Returns the kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl std::fmt::Display for ArtifactId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind.name(), self.key)
    }
}

impl std::str::FromStr for ArtifactId {
    type Err = ParseArtifactIdError;

    fn from_str(text: &str) -> Result<Self, ParseArtifactIdError> {
        let invalid = || ParseArtifactIdError(text.chars().take(MAX_KEY_BYTES).collect());
        let (kind, key) = text.split_once('/').ok_or_else(invalid)?;
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
        Self::new(kind.ok_or_else(invalid)?, key)
    }
}

impl From<ArtifactId> for String {
    fn from(id: ArtifactId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for ArtifactId {
    type Error = ParseArtifactIdError;

    fn try_from(text: String) -> Result<Self, ParseArtifactIdError> {
        text.parse()
    }
}

/// Immutable file, with the means to verify its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Id.
    pub id: ArtifactId,
    /// Length and checksums of the content.
    #[serde(flatten)]
    pub content: Content,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_are_written() {
        for kind in Kind::ALL {
            let id = ArtifactId::new(kind, "0a-z9").unwrap();
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        assert_eq!(
            ArtifactId::new(Kind::Memory, "x").unwrap().to_string(),
            "mem/x"
        );
    }

    #[test]
    fn an_id_is_never_a_path_to_another_place() {
        let long = format!("disk/{}", "a".repeat(81));
        for text in [
            "", "disk", "disk/", "disk/..", "disk/a/b", "disk/A", "other/a", "/a", &long,
        ] {
            assert!(text.parse::<ArtifactId>().is_err(), "{text}");
        }
    }
}
