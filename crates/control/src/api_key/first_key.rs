//! First API keys. They are generated if missing and written to files that only their owner can
//! read.

use std::{fs, io, path::Path};

use wrenn_db::Db;
use wrenn_model::{Scopes, TeamId};

use super::{Auth, KeyForm};
use crate::{config::ControlConfig, error::ControlError};

/// Name of a key that is generated here.
const NAME: &str = "first key";

/// Generates a key for each form whose file is missing or holds no key of this database, and writes
/// it to that file.
pub async fn ensure_first_keys(
    db: &Db,
    auth: &Auth,
    config: &ControlConfig,
) -> Result<(), ControlError> {
    let wanted = [
        (KeyForm::Wrenn, &config.first_key_file),
        (KeyForm::E2b, &config.first_e2b_key_file),
    ];
    for (form, file) in wanted {
        if let Some(file) = file
            && !is_good_file(auth, file).await?
        {
            write_first_key(db, auth, form, file).await?;
        }
    }
    Ok(())
}

/// True if the file holds a valid key. A key is not valid if the database is new, restored from an
/// older copy, or another one.
async fn is_good_file(auth: &Auth, file: &Path) -> Result<bool, ControlError> {
    match fs::read_to_string(file) {
        Ok(key) => Ok(auth.identify(key.trim()).await?.is_some()),
        Err(_) => Ok(false),
    }
}

async fn write_first_key(
    db: &Db,
    auth: &Auth,
    form: KeyForm,
    file: &Path,
) -> Result<(), ControlError> {
    let key = auth
        .make(&TeamId::default(), NAME, form, Scopes::all())
        .await?;
    let (path, secret) = (file.to_owned(), key.secret);
    let write = move || wrenn_durable::replace(&path, format!("{secret}\n").as_bytes(), 0o600);
    let written = tokio::task::spawn_blocking(write).await;
    let written = written.unwrap_or_else(|e| Err(io::Error::other(e)));
    if let Err(source) = written {
        // A key that is in no file is useless, and would count as the first key at the next start.
        db.drop_api_key(&key.row.id).await?;
        let path = file.to_owned();
        return Err(ControlError::KeyFile { path, source });
    }
    tracing::info!(file = %file.display(), "first API key written");
    Ok(())
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

    fn config(file: &Path, e2b_file: &Path) -> ControlConfig {
        ControlConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            traffic_listen: "127.0.0.1:0".parse().unwrap(),
            database_url: String::new(),
            agent_url: String::new(),
            agent_token: String::new(),
            default_egress: wrenn_model::Egress::Deny,
            first_key_file: Some(file.to_owned()),
            first_e2b_key_file: Some(e2b_file.to_owned()),
            poll_interval: std::time::Duration::from_secs(1),
            limits: crate::config::Limits::default(),
        }
    }

    #[tokio::test]
    async fn first_key_of_each_form_is_created_once_and_again_if_its_file_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir).await;
        let auth = Auth::new(db.clone());
        let files = [dir.path().join("api-key"), dir.path().join("e2b-api-key")];
        let config = config(&files[0], &files[1]);
        let read = |file: &Path| fs::read_to_string(file).unwrap();
        ensure_first_keys(&db, &auth, &config).await.unwrap();
        let keys = [read(&files[0]), read(&files[1])];
        for ((file, key), prefix) in files.iter().zip(&keys).zip(["wrn_", "e2b_"]) {
            assert!(key.starts_with(prefix), "{key}");
            assert!(auth.identify(key.trim()).await.unwrap().is_some());
            let mode = fs::metadata(file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }

        ensure_first_keys(&db, &auth, &config).await.unwrap();
        assert_eq!([read(&files[0]), read(&files[1])], keys);

        fs::remove_file(&files[1]).unwrap();
        ensure_first_keys(&db, &auth, &config).await.unwrap();
        assert_eq!(read(&files[0]), keys[0]);
        let other = read(&files[1]);
        assert_ne!(other, keys[1]);
        assert!(auth.identify(other.trim()).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn key_file_of_another_database_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = [dir.path().join("api-key"), dir.path().join("e2b-api-key")];
        let config = config(&files[0], &files[1]);
        for database in [&one, &other, &one] {
            let db = open(database).await;
            let auth = Auth::new(db.clone());
            ensure_first_keys(&db, &auth, &config).await.unwrap();
            for file in &files {
                let key = fs::read_to_string(file).unwrap();
                assert!(auth.identify(key.trim()).await.unwrap().is_some());
            }
            db.close().await;
        }
    }

    #[tokio::test]
    async fn a_key_that_cannot_be_written_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir).await;
        let auth = Auth::new(db.clone());
        let file = dir.path().join("nowhere/api-key");
        let config = config(&file, &file);
        let error = ensure_first_keys(&db, &auth, &config).await.unwrap_err();
        assert!(matches!(error, ControlError::KeyFile { .. }), "{error}");
        assert!(db.api_keys(&TeamId::default()).await.unwrap().is_empty());
    }
}
