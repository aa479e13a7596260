//! Files of SQLite.

use std::{fs, os::unix::fs::PermissionsExt as _};

use wrenn_db::Db;
use wrenn_model::TeamId;

#[tokio::test]
async fn no_file_of_the_database_is_open_to_others() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/a%20b.db?mode=rwc", dir.path().display());
    for _ in 0..2 {
        let db = Db::open(&url).await.unwrap();
        db.api_keys(&TeamId::default()).await.unwrap();
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
async fn after_a_flush_the_file_has_everything_without_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let url = |name| format!("sqlite://{}/{name}?mode=rwc", dir.path().display());
    let db = Db::open(&url("db")).await.unwrap();
    let id = db.installation_id().await.unwrap();
    for (copy, flushed) in [("before", false), ("after", true)] {
        if flushed {
            db.keep().await.unwrap();
        }
        fs::copy(dir.path().join("db"), dir.path().join(copy)).unwrap();
        let copied = Db::open(&url(copy)).await.unwrap();
        let same = copied.installation_id().await.unwrap() == id;
        assert_eq!(same, flushed, "{copy}");
    }
}
