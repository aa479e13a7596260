//! Metadata that clients attach to files, stored as extended attributes `user.e2b.<name>`.

use std::{collections::BTreeMap, io, path::Path};

use http::HeaderMap;

const PREFIX: &str = "user.e2b.";
const HEADER_PREFIX: &str = "x-metadata-";
const MAX_NAME_BYTES: usize = 246;
const MAX_TOTAL_BYTES: usize = 4096;

/// Returns the metadata in an upload's headers `X-Metadata-<name>: <value>`.
///
/// # Errors
/// Returns a message if a name or value is not printable ASCII or the headers are too long.
pub fn from_headers(headers: &HeaderMap) -> Result<BTreeMap<String, String>, String> {
    let mut words = BTreeMap::new();
    let mut total = 0;
    for (name, value) in headers {
        let Some(name) = name.as_str().strip_prefix(HEADER_PREFIX) else {
            continue;
        };
        let printable = |bytes: &[u8]| bytes.iter().all(|b| (0x20..0x7f).contains(b));
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !printable(value.as_bytes()) {
            return Err(format!(
                "invalid header `{HEADER_PREFIX}{name}`: expected a name of 1 to {MAX_NAME_BYTES} bytes and a value of printable ASCII"
            ));
        }
        total += PREFIX.len() + name.len() + value.len();
        if total > MAX_TOTAL_BYTES {
            return Err(format!("metadata headers exceed {MAX_TOTAL_BYTES} bytes"));
        }
        words.insert(
            name.to_owned(),
            String::from_utf8_lossy(value.as_bytes()).into_owned(),
        );
    }
    Ok(words)
}

/// Returns the metadata of a file. Empty if there are none or the file system does not support
/// them.
#[must_use]
pub fn read(path: &Path) -> BTreeMap<String, String> {
    let Ok(names) = xattr::list_deref(path) else {
        return BTreeMap::new();
    };
    names
        .filter_map(|name| {
            let name = name.to_str()?.strip_prefix(PREFIX)?.to_owned();
            let value = xattr::get_deref(path, format!("{PREFIX}{name}")).ok()??;
            Some((name, String::from_utf8(value).ok()?))
        })
        .collect()
}

/// Replaces all metadata of a file. Returns false if the file system does not support metadata.
///
/// # Errors
/// Returns the kernel's error, except for missing support.
pub fn replace(path: &Path, words: &BTreeMap<String, String>) -> io::Result<bool> {
    let apply = || -> io::Result<bool> {
        for old in read(path).keys().filter(|old| !words.contains_key(*old)) {
            xattr::remove_deref(path, format!("{PREFIX}{old}"))?;
        }
        for (name, value) in words {
            xattr::set_deref(path, format!("{PREFIX}{name}"), value.as_bytes())?;
        }
        Ok(true)
    };
    match apply() {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_from_headers_within_bounds() {
        let mut headers = HeaderMap::new();
        headers.insert("x-metadata-colour", "light green".parse().expect("a value"));
        headers.insert("content-type", "x".parse().expect("a value"));
        let words = from_headers(&headers).expect("fine");
        assert_eq!(
            words,
            BTreeMap::from([("colour".to_owned(), "light green".to_owned())])
        );
        headers.insert(
            "x-metadata-long",
            "v".repeat(4096).parse().expect("a value"),
        );
        assert!(from_headers(&headers).is_err());
    }

    #[test]
    fn each_write_replaces_all_words() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
        let words = |list: &[&str]| -> BTreeMap<_, _> {
            list.iter()
                .map(|w| ((*w).to_owned(), "v".to_owned()))
                .collect()
        };
        if !replace(file.path(), &words(&["a", "b"])).expect("applied") {
            return;
        }
        assert_eq!(read(file.path()), words(&["a", "b"]));
        replace(file.path(), &words(&["c"])).expect("applied");
        assert_eq!(read(file.path()), words(&["c"]));
    }
}
