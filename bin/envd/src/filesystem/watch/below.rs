//! Operations on a directory's name and on the names below it.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// Removes a name and all names below it.
pub(super) fn remove_below(names: &mut BTreeSet<PathBuf>, top: &Path) {
    // Paths are ordered by their components, so the names below `top` are adjacent.
    let from = names.range(top.to_owned()..);
    let below: Vec<_> = from
        .take_while(|name| name.starts_with(top))
        .cloned()
        .collect();
    for name in &below {
        names.remove(name);
    }
}

/// True if a name equals `top` or is below it.
pub(super) fn is_below(name: &Path, top: &Path) -> bool {
    rest(name, top).is_some()
}

/// Replaces `old` by `new` in a name at or below `old`. Returns `None` for other names.
pub(super) fn replaced(name: &Path, old: &Path, new: &Path) -> Option<PathBuf> {
    // Not `join`, which adds a slash before an empty path.
    let rest = rest(name, old)?;
    Some(new.components().chain(rest.components()).collect())
}

/// Returns the part of a name below `top`. Compares bytes, which is fast, because each move of a
/// directory checks all directories of a watch.
fn rest<'a>(name: &'a Path, top: &Path) -> Option<&'a Path> {
    let top = top.as_os_str().as_bytes();
    let rest = match name.as_os_str().as_bytes().strip_prefix(top)? {
        [] => &[],
        [b'/', rest @ ..] => rest,
        _ => return None,
    };
    Some(Path::new(OsStr::from_bytes(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_name_is_told_from_what_begins_like_it() {
        let new = |name, old| {
            let new = replaced(Path::new(name), Path::new(old), Path::new("x/y"))?;
            new.into_os_string().into_string().ok()
        };
        assert_eq!(new("a/b", "a").as_deref(), Some("x/y/b"));
        assert_eq!(new("a", "a").as_deref(), Some("x/y"));
        assert_eq!(new("ab", "a"), None);
        assert_eq!(new("b/a", "a"), None);
        let all = ["a", "a/b", "a-b", "a/b/c", "ab", "b"];
        let mut names: BTreeSet<PathBuf> = all.into_iter().map(PathBuf::from).collect();
        remove_below(&mut names, Path::new("a"));
        assert_eq!(names, ["a-b", "ab", "b"].map(PathBuf::from).into());
    }
}
