//! The first API key: made where there is none, and written to a file that only its owner reads.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::Auth;
use crate::{db::Db, error::ControlError};

/// Name of a key made here.
const NAME: &str = "first key";

/// Makes a key if the database has none or the file is missing, and writes it to the file.
pub(crate) async fn ensure_first_key(
    db: &Db,
    auth: &Auth,
    file: &Path,
) -> Result<(), ControlError> {
    let known = !db.api_keys().await?.is_empty();
    if known && file.exists() {
        return Ok(());
    }
    let key = auth.make(NAME).await?;
    let (path, secret) = (file.to_owned(), key.secret);
    let written = tokio::task::spawn_blocking(move || write(&path, &secret)).await;
    let written = written.unwrap_or_else(|e| Err(io::Error::other(e)));
    if let Err(source) = written {
        // A key that nobody can read is of no use, and would be taken for the first one at the next start.
        db.drop_api_key(&key.row.id).await?;
        let path = file.to_owned();
        return Err(ControlError::KeyFile { path, source });
    }
    tracing::info!(file = %file.display(), "wrote a first API key");
    Ok(())
}

/// Writes it whole or not at all: beside its place, then renamed.
fn write(file: &Path, secret: &str) -> io::Result<()> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = PathBuf::from(name);
    let result = write_new(&beside, secret).and_then(|()| fs::rename(&beside, file));
    if result.is_err() {
        // It may not have been made.
        let _ = fs::remove_file(&beside);
    }
    result
}

fn write_new(path: &Path, secret: &str) -> io::Result<()> {
    // Left by a process of the same number that was killed.
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(format!("{secret}\n").as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    async fn open(dir: &tempfile::TempDir) -> Db {
        let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
        Db::open(&url).await.unwrap()
    }

    #[tokio::test]
    async fn it_is_made_once_and_again_when_its_file_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir).await;
        let auth = Auth::new(db.clone());
        let file = dir.path().join("api-key");
        ensure_first_key(&db, &auth, &file).await.unwrap();
        let key = fs::read_to_string(&file).unwrap();
        assert!(auth.is_good(key.trim()).await.unwrap());
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        ensure_first_key(&db, &auth, &file).await.unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), key);

        fs::remove_file(&file).unwrap();
        ensure_first_key(&db, &auth, &file).await.unwrap();
        let other = fs::read_to_string(&file).unwrap();
        assert_ne!(other, key);
        assert!(auth.is_good(other.trim()).await.unwrap());
    }

    #[tokio::test]
    async fn a_key_that_cannot_be_written_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir).await;
        let auth = Auth::new(db.clone());
        let file = dir.path().join("nowhere/api-key");
        let error = ensure_first_key(&db, &auth, &file).await.unwrap_err();
        assert!(matches!(error, ControlError::KeyFile { .. }), "{error}");
        assert!(db.api_keys().await.unwrap().is_empty());
    }
}
