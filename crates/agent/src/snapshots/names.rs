//! Names of snapshots, stored as one small file per name, `<name>.json`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wrenn_model::TemplateName;
use wrenn_snapshot::SnapshotId;

/// Mode of the files.
const MODE: u32 = 0o644;

/// Failure to read, set or remove a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NameError {
    /// The name belongs to another snapshot.
    #[error("`name`: template `{0}` already exists")]
    Taken(TemplateName),
    #[error("failed to parse {path}")]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("failed to {step} {path}")]
    Io {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Snapshot that a name refers to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct NameRecord {
    pub(super) build: SnapshotId,
}

/// Directory of names.
#[derive(Debug)]
pub(super) struct Names(PathBuf);

impl Names {
    pub(super) fn open(dir: &Path) -> Result<Self, NameError> {
        fs::create_dir_all(dir).map_err(failed("create", dir))?;
        Ok(Self(dir.to_owned()))
    }

    /// Opens a directory for reading only. It need not exist.
    pub(super) fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    fn path(&self, name: &TemplateName) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    /// True if the name exists, even if its file is not readable.
    pub(super) fn is_given(&self, name: &TemplateName) -> bool {
        self.path(name).exists()
    }

    pub(super) fn get(&self, name: &TemplateName) -> Result<Option<NameRecord>, NameError> {
        let path = self.path(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let record = serde_json::from_slice(&text);
        record
            .map(Some)
            .map_err(|source| NameError::Damaged { path, source })
    }

    /// Returns all names in order, each with its record or the error from reading it.
    #[expect(clippy::type_complexity, reason = "used once")]
    pub(super) fn each(
        &self,
    ) -> Result<Vec<(TemplateName, Result<NameRecord, NameError>)>, NameError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(failed("list", &self.0))? {
            let name = entry.map_err(failed("list", &self.0))?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(Ok(name)) = name.map(str::parse::<TemplateName>) else {
                continue;
            };
            // A name that is missing was removed in the meantime.
            if let Some(record) = self.get(&name).transpose() {
                found.push((name, record));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Sets a name atomically. Of two concurrent calls for the same name one succeeds, unless both
    /// overwrite.
    pub(super) fn put(
        &self,
        name: &TemplateName,
        build: SnapshotId,
        overwrite: bool,
    ) -> Result<(), NameError> {
        let path = self.path(name);
        let text = serde_json::to_vec(&NameRecord { build }).map_err(io::Error::from);
        let written = text.and_then(|text| match overwrite {
            true => wrenn_durable::replace(&path, &text, MODE),
            false => wrenn_durable::create(&path, &text, MODE),
        });
        match written {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(NameError::Taken(name.clone()))
            }
            other => other.map_err(failed("write", &path)),
        }
    }

    /// Removes a name. Returns false if it does not exist.
    pub(super) fn remove(&self, name: &TemplateName) -> Result<bool, NameError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("remove", &path)(error)),
        }
    }
}

fn failed<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> NameError + 'a {
    move |source| NameError::Io {
        step,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn name_is_unique_unless_it_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path()).unwrap();
        let name: TemplateName = "mine".parse().unwrap();
        let (first, second) = (SnapshotId([1; 16]), SnapshotId([2; 16]));
        names.put(&name, first, false).unwrap();
        assert!(matches!(
            names.put(&name, second, false),
            Err(NameError::Taken(_))
        ));
        assert_eq!(names.get(&name).unwrap().unwrap().build, first);
        names.put(&name, second, true).unwrap();
        assert_eq!(names.each().unwrap()[0].1.as_ref().unwrap().build, second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(names.remove(&name).unwrap());
        assert!(!names.remove(&name).unwrap());
    }

    #[test]
    fn damaged_name_hides_no_other_and_can_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::open(dir.path()).unwrap();
        let (good, bad): (TemplateName, TemplateName) =
            ("good".parse().unwrap(), "bad".parse().unwrap());
        names.put(&good, SnapshotId([1; 16]), false).unwrap();
        fs::write(dir.path().join("bad.json"), "{").unwrap();
        let each = names.each().unwrap();
        assert!(matches!(each[0], (_, Err(NameError::Damaged { .. }))));
        assert!(each[1].1.is_ok());
        assert!(names.remove(&bad).unwrap());
    }
}
