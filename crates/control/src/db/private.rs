//! Permissions of SQLite's files. Only their owner may access them, because they contain the tokens
//! of the guest agents.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr as _,
};

use sqlx::sqlite::SqliteConnectOptions;

const MODE: u32 = 0o600;

/// Creates the database file if the URL permits it, and restricts existing files to their owner.
/// SQLite gives the same mode to files that it creates next to the database. An invalid URL is left
/// for SQLite to reject.
pub(super) fn keep(url: &str) -> io::Result<()> {
    let Ok(options) = SqliteConnectOptions::from_str(url) else {
        return Ok(());
    };
    let file = options.get_filename();
    if url.contains("mode=rwc") {
        make(file)?;
    }
    for suffix in ["", "-wal", "-shm"] {
        match fs::set_permissions(with_suffix(file, suffix), Permissions::from_mode(MODE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn make(file: &Path) -> io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(file);
    match made {
        // SQLite reports a missing directory itself.
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::super::Db;
    use super::*;

    #[tokio::test]
    async fn no_file_of_the_database_is_open_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/a%20b.db?mode=rwc", dir.path().display());
        for _ in 0..2 {
            let db = Db::open(&url).await.unwrap();
            db.api_keys().await.unwrap();
            let mut names = Vec::new();
            for entry in fs::read_dir(dir.path()).unwrap() {
                let path = entry.unwrap().path();
                let mode = fs::metadata(&path).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, MODE, "{}", path.display());
                names.push(path.file_name().unwrap().to_owned());
                // As left by an earlier version.
                fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            }
            assert!(names.contains(&"a b.db".into()), "{names:?}");
            db.close().await;
        }
    }
}
