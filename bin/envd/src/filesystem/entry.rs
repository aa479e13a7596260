//! Operations on files, directories and symbolic links: stat, create, move, list, remove.

use std::{
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, chown},
    path::{Path, PathBuf},
};

use buffa_types::google::protobuf::Timestamp;
use wrenn_proto::rpc::filesystem::{EntryInfo, FileType};

use super::{FileError, metadata, mount};
use crate::{
    paths::is_link_cycle,
    users::{Names, User},
};

/// Describes the entry at a path.
///
/// # Errors
/// Fails if there is no entry.
pub fn stat(path: &Path) -> Result<EntryInfo, FileError> {
    stat_as(path, path, &mut Names::default()).map_err(FileError::at(path))
}

/// Describes the entry at `real`, under the path `shown`.
///
/// # Errors
/// Fails if there is no entry.
pub(super) fn stat_as(shown: &Path, real: &Path, names: &mut Names) -> io::Result<EntryInfo> {
    let own = fs::symlink_metadata(real)?;
    Ok(describe(shown, real, &own, names))
}

/// Describes the entry at `real`, under the path `shown`. For a symbolic link, type and mode are
/// those of the target, and size and permissions are those of the link.
fn describe(shown: &Path, real: &Path, own: &Metadata, names: &mut Names) -> EntryInfo {
    let is_symlink = own.is_symlink();
    let target = if is_symlink {
        fs::metadata(real).ok()
    } else {
        Some(own.clone())
    };
    let symlink_target = is_symlink.then(|| {
        let resolved = fs::canonicalize(real).unwrap_or_else(|_| real.to_owned());
        resolved.display().to_string()
    });
    let kind = target
        .as_ref()
        .map_or(FileType::FILE_TYPE_UNSPECIFIED, file_type);
    EntryInfo {
        name: shown
            .file_name()
            .unwrap_or(OsStr::new("/"))
            .to_string_lossy()
            .into_owned(),
        r#type: kind.into(),
        path: shown.display().to_string(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        // 0 if the target does not exist: a link's own mode has no meaning.
        mode: target.as_ref().map_or(0, Metadata::mode) & 0o777,
        permissions: permissions(own),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: Timestamp {
            seconds: own.mtime(),
            nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
            ..Default::default()
        }
        .into(),
        symlink_target,
        metadata: metadata::read(real).into_iter().collect(),
        is_symlink,
        ..Default::default()
    }
}

fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

/// Formats permissions like Go, as the contract requires: the letters of the file type and of the
/// special bits, or `-` if there are none, then the nine permission characters. Examples:
/// `-rw-r--r--`, `drwxr-xr-x`, `dtrwxrwxrwx`, `Lrwxrwxrwx`, `Dcrw-rw-rw-`.
fn permissions(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let mode = metadata.mode();
    let letters = [
        (kind.is_dir(), 'd'),
        (kind.is_symlink(), 'L'),
        (kind.is_block_device() || kind.is_char_device(), 'D'),
        (kind.is_fifo(), 'p'),
        (kind.is_socket(), 'S'),
        (mode & 0o4000 != 0, 'u'),
        (mode & 0o2000 != 0, 'g'),
        (kind.is_char_device(), 'c'),
        (mode & 0o1000 != 0, 't'),
    ];
    let mut text: String = letters
        .into_iter()
        .filter_map(|(holds, letter)| holds.then_some(letter))
        .collect();
    if text.is_empty() {
        text.push('-');
    }
    text.extend((0..9).rev().map(|bit| {
        let symbol = ['x', 'w', 'r'][bit % 3];
        if mode >> bit & 1 == 1 { symbol } else { '-' }
    }));
    text
}

/// Creates a directory and its missing parents, with mode 0755, owned by the user.
///
/// # Errors
/// `DirectoryExists` if the directory exists, `NotADirectoryThere` if something else exists at the
/// path.
pub fn make_dir(path: &Path, user: &User) -> Result<EntryInfo, FileError> {
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => return Err(FileError::DirectoryExists(path.to_owned())),
        Ok(_) => return Err(FileError::NotADirectoryThere(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(FileError::NotADirectoryThere(path.to_owned()));
        }
        Err(error) => return Err(FileError::at(path)(error)),
    }
    match make_directories(path, user) {
        // A dangling symbolic link.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(FileError::NotADirectoryThere(path.to_owned()))
        }
        Err(error) => Err(FileError::at(path)(error)),
        Ok(_) => stat(path),
    }
}

/// Creates a directory and its missing parents. Returns the number of missing directories.
///
/// # Errors
/// Returns the kernel's error.
pub fn make_directories(path: &Path, user: &User) -> io::Result<usize> {
    let mut missing: Vec<PathBuf> = Vec::new();
    let mut at = path;
    while fs::metadata(at).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        missing.push(at.to_owned());
        let Some(parent) = at.parent() else { break };
        at = parent;
    }
    for dir in missing.iter().rev() {
        match fs::DirBuilder::new().mode(0o755).create(dir) {
            Ok(()) => {
                let owned = chown(dir, Some(user.uid), Some(user.gid));
                mount::tolerate_at(owned, dir)?;
            }
            // Another call created the directory first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    if !fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    Ok(missing.len())
}

/// Moves an entry within a file system and replaces an existing destination. Creates missing
/// parents of the destination.
///
/// # Errors
/// `not_found` if the source does not exist.
pub fn rename(source: &Path, destination: &Path, user: &User) -> Result<EntryInfo, FileError> {
    fs::symlink_metadata(source).map_err(FileError::at(source))?;
    if let Some(parent) = destination.parent() {
        make_directories(parent, user).map_err(FileError::at(parent))?;
    }
    fs::rename(source, destination).map_err(FileError::at(source))?;
    stat(destination)
}

/// Removes a file, a symbolic link or a directory with its content. Succeeds if there is no entry.
///
/// # Errors
/// Returns the kernel's error.
pub fn remove(path: &Path) -> Result<(), FileError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Err(FileError::at(path)(error))
        }
        _ => Ok(()),
    }
}

/// Lists a directory down to a depth, sorted by name, each directory before its content. Follows a
/// symbolic link at the root only. The paths begin as in the client's request.
///
/// # Errors
/// Fails if the path is not a directory.
pub fn list(path: &Path, depth: u32) -> Result<Vec<EntryInfo>, FileError> {
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(error) if is_link_cycle(&error) => {
            return Err(FileError::LinkCycle(path.to_owned()));
        }
        Err(error) => return Err(FileError::at(path)(error)),
    };
    if !real.is_dir() {
        return Err(FileError::NotADirectory(path.to_owned()));
    }
    let mut entries = Vec::new();
    let mut names = Names::default();
    walk(path, &real, depth, &mut names, &mut entries).map_err(FileError::at(path))?;
    Ok(entries)
}

fn walk(
    shown: &Path,
    real: &Path,
    depth: u32,
    names: &mut Names,
    entries: &mut Vec<EntryInfo>,
) -> io::Result<()> {
    let mut children = fs::read_dir(real)?.collect::<io::Result<Vec<_>>>()?;
    children.sort_by_key(fs::DirEntry::file_name);
    for child in children {
        let (shown, real) = (shown.join(child.file_name()), child.path());
        // The entry may have been removed in the meantime.
        let Ok(own) = fs::symlink_metadata(&real) else {
            continue;
        };
        entries.push(describe(&shown, &real, &own, names));
        if depth > 1 && own.is_dir() {
            match walk(&shown, &real, depth - 1, names, entries) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> User {
        crate::users::find("root")
            .expect("readable")
            .expect("there")
    }

    #[test]
    fn entries_are_described_as_the_contract_says() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("file");
        fs::write(&file, "hello").expect("written");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).expect("linked");
        let dangling = dir.path().join("dangling");
        std::os::unix::fs::symlink("/no/such", &dangling).expect("linked");
        let entry = stat(&file).expect("there");
        assert_eq!(
            (entry.size, entry.permissions.as_str(), entry.mode),
            (5, "-rw-r--r--", 0o644)
        );
        assert_eq!(entry.owner, "root");
        let entry = stat(&link).expect("there");
        assert_eq!(entry.r#type, FileType::FILE_TYPE_FILE);
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
        assert_eq!(
            entry.symlink_target.as_deref(),
            file.canonicalize().expect("there").to_str()
        );
        let entry = stat(&dangling).expect("there");
        assert_eq!(entry.r#type, FileType::FILE_TYPE_UNSPECIFIED);
        assert_eq!(entry.symlink_target.as_deref(), dangling.to_str());
        assert_eq!(entry.mode, 0);
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
    }

    #[test]
    fn permissions_are_written_as_go_does() {
        let of = |path: &Path| permissions(&fs::symlink_metadata(path).expect("there"));
        assert_eq!(of(Path::new("/dev/null")), "Dcrw-rw-rw-");
        let dir = tempfile::tempdir().expect("temporary directory");
        let with = |mode| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(dir.path(), mode).expect("set");
            of(dir.path())
        };
        assert_eq!(with(0o1777), "dtrwxrwxrwx");
        assert_eq!(with(0o6750), "dugrwxr-x---");
        assert_eq!(with(0o755), "drwxr-xr-x");
    }

    #[test]
    fn a_directory_is_made_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("a/b");
        make_dir(&path, &root()).expect("made");
        assert!(matches!(
            make_dir(&path, &root()),
            Err(FileError::DirectoryExists(_))
        ));
        let file = dir.path().join("file");
        fs::write(&file, "").expect("written");
        assert!(matches!(
            make_dir(&file, &root()),
            Err(FileError::NotADirectoryThere(_))
        ));
        assert!(matches!(
            make_dir(&file.join("x"), &root()),
            Err(FileError::NotADirectoryThere(_))
        ));
    }

    #[test]
    fn a_list_goes_as_deep_as_asked_and_follows_no_link_below() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let top = dir.path().join("top");
        fs::create_dir_all(top.join("a/deep")).expect("made");
        fs::write(top.join("a/deep/file"), "").expect("written");
        fs::write(top.join("b"), "").expect("written");
        std::os::unix::fs::symlink(&top, top.join("loop")).expect("linked");
        let by_link = dir.path().join("by-link");
        std::os::unix::fs::symlink(&top, &by_link).expect("linked");
        let names = |path: &Path, depth| -> Vec<String> {
            let prefix = format!("{}/", path.display());
            let list = list(path, depth).expect("listed");
            list.iter()
                .map(|e| e.path.strip_prefix(&prefix).expect("below").to_owned())
                .collect()
        };
        assert_eq!(names(&top, 1), ["a", "b", "loop"]);
        assert_eq!(
            names(&by_link, 3),
            ["a", "a/deep", "a/deep/file", "b", "loop"]
        );
        assert!(matches!(
            list(&top.join("b"), 1),
            Err(FileError::NotADirectory(_))
        ));
    }

    #[test]
    fn removing_what_is_not_there_is_fine() {
        let dir = tempfile::tempdir().expect("temporary directory");
        remove(&dir.path().join("none")).expect("fine");
        fs::create_dir_all(dir.path().join("a/b")).expect("made");
        remove(&dir.path().join("a")).expect("removed");
        assert!(!dir.path().join("a").exists());
    }
}
