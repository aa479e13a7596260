//! Files of SQLite.

use std::{fs, os::unix::fs::PermissionsExt as _};

use wrenn_db::Db;

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
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
            names.push(path.file_name().unwrap().to_owned());
            // As left by an earlier version.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        }
        assert!(names.contains(&"a b.db".into()), "{names:?}");
        db.close().await;
    }
}

#[tokio::test]
async fn a_flush_empties_the_write_ahead_log() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/db?mode=rwc", dir.path().display());
    let db = Db::open(&url).await.unwrap();
    db.keep().await.unwrap();
    // Without its log, the file has everything.
    fs::copy(dir.path().join("db"), dir.path().join("copy")).unwrap();
    let copy = format!("sqlite://{}/copy?mode=rw", dir.path().display());
    let id = db.installation_id().await.unwrap();
    let copied = Db::open(&copy).await.unwrap();
    assert_ne!(copied.installation_id().await.unwrap(), id);
    db.keep().await.unwrap();
    fs::copy(dir.path().join("db"), dir.path().join("copy2")).unwrap();
    let copy = format!("sqlite://{}/copy2?mode=rw", dir.path().display());
    let copied = Db::open(&copy).await.unwrap();
    assert_eq!(copied.installation_id().await.unwrap(), id);
}
