//! Permissions of SQLite's files. Only their owner may access them, because they contain the tokens
//! of the guest agents.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use sqlx::sqlite::SqliteConnectOptions;

const MODE: u32 = 0o600;

/// Creates the database file if the URL permits it, and restricts existing files to their owner.
/// SQLite gives the same mode to files that it creates next to the database.
pub(super) fn restrict(options: &SqliteConnectOptions, url: &str) -> io::Result<()> {
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
