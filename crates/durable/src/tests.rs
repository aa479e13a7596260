#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

use std::process::Command;

use super::*;

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_file_is_replaced_with_its_mode_and_nothing_else_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    replace(&path, b"a longer text", 0o644).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"a longer text");
    assert_eq!(mode(&path) & 0o700, 0o600);
    replace(&path, b"short", 0o600).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"short");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn a_file_that_exists_is_not_created_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    create(&path, b"first", 0o600).unwrap();
    let error = create(&path, b"second", 0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&path).unwrap(), b"first");
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn one_of_many_concurrent_creates_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let made: Vec<bool> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8_u8)
            .map(|n| {
                scope.spawn({
                    let path = &path;
                    move || create(path, &[n], 0o600).is_ok()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 1);
    let winner = fs::read(&path).unwrap();
    assert!(made[usize::from(winner[0])]);
    assert_eq!(names(dir.path()), ["file"]);
}

#[test]
fn a_dropped_draft_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    replace(&path, b"old", 0o600).unwrap();
    let mut draft = Draft::new(&path, 0o600).unwrap();
    draft.file().write_all(b"new").unwrap();
    assert_eq!(names(dir.path()).len(), 2);
    drop(draft);
    assert_eq!(names(dir.path()), ["file"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn failed_rename_leaves_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("directory");
    fs::create_dir(&path).unwrap();
    replace(&path, b"new", 0o600).unwrap_err();
    assert_eq!(names(dir.path()), ["directory"]);
    assert!(replace(&dir.path().join("missing/file"), b"new", 0o600).is_err());
}

/// The test runs itself again with a limit of the file size, which fails writes as a full disk
/// does.
#[test]
fn failed_write_keeps_the_old_file() {
    const DIR: &str = "WRENN_DURABLE_TEST_DIR";
    let content = vec![b'x'; 1 << 20];
    if let Some(dir) = std::env::var_os(DIR) {
        let path = Path::new(&dir).join("file");
        let error = replace(&path, &content, 0o600).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    replace(&path, b"old", 0o600).unwrap();
    let limited = Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f 8; exec "$0" --exact "$1""#])
        .arg(std::env::current_exe().unwrap())
        .arg("tests::failed_write_keeps_the_old_file")
        .env(DIR, dir.path())
        .output()
        .unwrap();
    assert!(limited.status.success(), "{limited:?}");
    let report = String::from_utf8_lossy(&limited.stdout);
    assert!(report.contains("1 passed"), "{report}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["file"]);
    replace(&path, &content, 0o600).unwrap();
    assert_eq!(fs::read(&path).unwrap(), content);
}

#[test]
fn a_directory_is_renamed() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    rename(&from, &to).unwrap();
    assert_eq!(names(dir.path()), ["to"]);
}

#[test]
fn a_path_without_a_directory_is_in_the_current_one() {
    assert_eq!(directory(Path::new("file")), Path::new("."));
    assert_eq!(directory(Path::new("/file")), Path::new("/"));
}
