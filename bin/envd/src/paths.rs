//! Resolution of paths in requests.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use crate::users::User;

/// Invalid path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// The path is in another user's home directory.
    #[error("cannot expand `{0}`: only `~` and `~/…` are supported, not another user's home")]
    OtherHome(String),
    /// The path contains a NUL byte, which no file name can have.
    #[error("the path contains a NUL byte")]
    Nul,
}

/// Makes a path absolute. An empty path is the default directory, or else the home directory. `~`
/// and `~/x` are in the home directory. A relative path starts at the home directory. `.` and `..`
/// are resolved by name.
///
/// # Errors
/// See [`PathError`].
pub fn resolve(path: &str, user: &User, default: Option<&str>) -> Result<PathBuf, PathError> {
    if path.contains('\0') {
        return Err(PathError::Nul);
    }
    let home = Path::new(&user.home);
    let joined = match path {
        "" => default.map_or_else(|| home.to_owned(), |dir| home.join(dir)),
        "~" => home.to_owned(),
        _ => match path.strip_prefix('~') {
            None => home.join(path),
            Some(rest) => match rest.strip_prefix('/') {
                Some(below) => home.join(below.trim_start_matches('/')),
                None => return Err(PathError::OtherHome(path.to_owned())),
            },
        },
    };
    Ok(clean(&joined))
}

fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// True if symbolic links form a cycle.
pub(crate) fn is_link_cycle(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn user() -> User {
        crate::users::parse_passwd_line("u:x:1:1::/home/u:/bin/sh").expect("a line")
    }

    #[test]
    fn each_form_has_its_meaning() {
        let resolved =
            |path: &str, default: Option<&str>| resolve(path, &user(), default).expect(path);
        assert_eq!(resolved("", None), Path::new("/home/u"));
        assert_eq!(resolved("", Some("/work")), Path::new("/work"));
        assert_eq!(resolved("~", None), Path::new("/home/u"));
        assert_eq!(resolved("~/a//b", None), Path::new("/home/u/a/b"));
        assert_eq!(resolved("a/../b/.", Some("/work")), Path::new("/home/u/b"));
        assert_eq!(resolved("/../../etc", None), Path::new("/etc"));
        assert!(matches!(
            resolve("~root/x", &user(), None),
            Err(PathError::OtherHome(_))
        ));
        assert_eq!(resolve("a\0b", &user(), None), Err(PathError::Nul));
    }

    proptest! {
        #[test]
        fn what_is_resolved_is_absolute_and_clean(path in ".*") {
            if let Ok(path) = resolve(&path, &user(), None) {
                prop_assert!(path.is_absolute());
                prop_assert!(!path.components().any(|c| matches!(c, Component::ParentDir)));
            }
        }
    }
}
