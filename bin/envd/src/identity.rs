//! Identity of the guest, for programs in it: files below `/run` and environment variables.
//!
//! The host provides the identity twice: immediately by `/snapshot/recover`, and a little later by
//! the metadata service ([`crate::mmds`]). Both use this module, so the identity has one form.

use std::{
    fs::{self, File},
    io::{self, Seek as _, Write as _},
    path::Path,
};

/// Maximum length of a value in an identity, in bytes.
const MAX_WORD_BYTES: usize = 64;

/// Ids of the sandbox that this guest is, and of its template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Id of the sandbox.
    pub sandbox_id: String,
    /// Id of the template. If empty, the previous value stays.
    pub template_id: String,
}

impl Identity {
    /// Returns variables for every process's environment, under Wrenn's names and under those that
    /// E2B's clients expect.
    pub fn variables(&self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for prefix in ["WRENN", "E2B"] {
            all.push((format!("{prefix}_SANDBOX"), "true".to_owned()));
            all.push((format!("{prefix}_SANDBOX_ID"), self.sandbox_id.clone()));
            if !self.template_id.is_empty() {
                all.push((format!("{prefix}_TEMPLATE_ID"), self.template_id.clone()));
            }
        }
        all
    }

    /// Writes the files. `root` is `/`, except in tests.
    ///
    /// # Errors
    /// Fails if a file cannot be written.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        for (dir, prefix) in [("run/wrenn", "WRENN"), ("run/e2b", "E2B")] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir)?;
            write_if_other(&dir.join(format!(".{prefix}_SANDBOX")), "true")?;
            write_if_other(&dir.join(format!(".{prefix}_SANDBOX_ID")), &self.sandbox_id)?;
            if !self.template_id.is_empty() {
                let file = dir.join(format!(".{prefix}_TEMPLATE_ID"));
                write_if_other(&file, &self.template_id)?;
            }
        }
        Ok(())
    }
}

/// True if a value may be used as a line of a file, a host name or the value of a variable.
#[must_use]
pub fn is_word(word: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    word.len() <= MAX_WORD_BYTES && word.bytes().all(allowed)
}

/// Writes a file if its content differs. On a resume most files stay unchanged, and the host waits
/// for the resume.
///
/// The new content overwrites the old content. Truncating the file first would make the file system
/// free the file's block and allocate another.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn write_if_other(path: &Path, content: &str) -> io::Result<()> {
    let old = fs::read(path).ok();
    if old.as_deref() == Some(content.as_bytes()) {
        return Ok(());
    }
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(content.as_bytes())?;
    if old.is_some_and(|old| old.len() > content.len()) {
        let length = file.stream_position()?;
        file.set_len(length)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_over_the_one_before() {
        let root = tempfile::tempdir().expect("a directory");
        for id in ["sb-1", "sb-2"] {
            let identity = Identity {
                sandbox_id: id.into(),
                template_id: "mine".into(),
            };
            identity.write(root.path()).expect("room");
        }
        let read = |path: &str| fs::read_to_string(root.path().join(path)).expect("written");
        assert_eq!(read("run/wrenn/.WRENN_SANDBOX"), "true");
        assert_eq!(read("run/wrenn/.WRENN_SANDBOX_ID"), "sb-2");
        assert_eq!(read("run/e2b/.E2B_SANDBOX_ID"), "sb-2");
        assert_eq!(read("run/e2b/.E2B_TEMPLATE_ID"), "mine");
    }

    #[test]
    fn a_file_has_the_new_content_and_nothing_of_the_old() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("name");
        for content in ["short", "somewhat longer", "short", "other", ""] {
            write_if_other(&path, content).expect("room");
            assert_eq!(fs::read_to_string(&path).expect("written"), content);
        }
    }

    #[test]
    fn a_word_is_short_and_plain() {
        assert!(is_word("sb-1.a_B") && is_word(""));
        assert!(!is_word("a b") && !is_word("a\nb") && !is_word(&"x".repeat(65)));
    }
}
