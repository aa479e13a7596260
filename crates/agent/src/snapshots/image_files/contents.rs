//! Content of the files of images.
//!
//! To describe a file, it is read to its end, which takes up to a second. The description is
//! therefore kept beside the file, in `<file>.content.json`, and is valid as long as size and
//! modification time of the file are the same. It is written again if it is missing.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use wrenn_store::{Artifact, ArtifactId, Content, Kind};

/// Descriptions of files.
#[derive(Debug, Default)]
pub(super) struct Contents(Mutex<HashMap<PathBuf, Description>>);

/// Content of `<file>.content.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Description {
    /// Size of the file, in bytes, and its modification time, in seconds and nanoseconds since 1970.
    stamp: (u64, i64, i64),
    content: Content,
}

impl Contents {
    /// Returns the artifact of a file; `None` if the file cannot be read. Blocks while the file is
    /// read, if that was not done before.
    pub(super) fn artifact(&self, kind: Kind, path: &Path) -> Option<Artifact> {
        let content = match self.content(path) {
            Ok(content) => content,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "failed to read a file of an image");
                }
                return None;
            }
        };
        let id = ArtifactId::new(kind, content.key()).ok()?;
        Some(Artifact { id, content })
    }

    fn content(&self, path: &Path) -> io::Result<Content> {
        let meta = fs::metadata(path)?;
        let stamp = (meta.len(), meta.mtime(), meta.mtime_nsec());
        // Held while the file is read, so that it is read once.
        let mut known = self.0.lock();
        if let Some(known) = known.get(path).filter(|known| known.stamp == stamp) {
            return Ok(known.content.clone());
        }
        let beside = beside(path);
        let described = match read(&beside).filter(|read| read.stamp == stamp) {
            Some(described) => described,
            None => {
                let content = Content::of(&fs::File::open(path)?)?;
                let described = Description { stamp, content };
                write(&beside, &described);
                described
            }
        };
        let content = described.content.clone();
        known.insert(path.to_owned(), described);
        Ok(content)
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".content.json");
    name.into()
}

fn read(path: &Path) -> Option<Description> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a description. Without it, the file is read again by the next process.
fn write(path: &Path, described: &Description) {
    let text = serde_json::to_vec(described).map_err(io::Error::from);
    let written = text.and_then(|text| wrenn_durable::replace(path, &text, 0o644));
    if let Err(error) = written {
        tracing::info!(path = %path.display(), %error, "failed to write the description of a file");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn description_is_kept_beside_the_file_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        fs::write(&path, "first").unwrap();
        let id = || {
            let artifact = Contents::default().artifact(Kind::Kernel, &path);
            artifact.unwrap().id.to_string()
        };
        let first = id();
        // The description is used instead of the file.
        let text = fs::read_to_string(beside(&path)).unwrap();
        let other = text.replace("\"len\":5", "\"len\":6");
        fs::write(beside(&path), &other).unwrap();
        assert_ne!(id(), first);
        fs::write(beside(&path), "damaged").unwrap();
        assert_eq!(id(), first);
        fs::write(&path, "another").unwrap();
        assert_ne!(id(), first);
        fs::remove_file(&path).unwrap();
        assert_eq!(Contents::default().artifact(Kind::Kernel, &path), None);
    }
}
