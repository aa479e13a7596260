//! Debian mirrors of the host, used for the guest's packages.
//!
//! Wrenn does not name a mirror. It uses the sources that the host is configured with, in both
//! formats of `sources.list(5)`, filtered to the requested release.

use std::{fs, io, path::Path};

/// Returns the sources of apt on this host as one-line entries, filtered to one release and its
/// updates.
///
/// # Errors
/// If a file exists but cannot be read.
pub(crate) fn host_sources(etc_apt: &Path, suite: &str) -> io::Result<Vec<String>> {
    let mut files = vec![etc_apt.join("sources.list")];
    match fs::read_dir(etc_apt.join("sources.list.d")) {
        Ok(entries) => {
            for entry in entries {
                files.push(entry?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    files.sort();
    let mut lines = Vec::new();
    for file in files {
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => lines.extend(one_line_entries(&text, suite)),
            Some("sources") => lines.extend(deb822_entries(&text, suite)),
            _ => {}
        }
    }
    lines.dedup();
    Ok(lines)
}

fn of_release(suite: &str, release: &str) -> bool {
    suite == release
        || suite
            .strip_prefix(release)
            .is_some_and(|rest| matches!(rest, "-updates" | "-security"))
}

/// Filters lines of the form `deb [options] uri suite component…`.
fn one_line_entries(text: &str, release: &str) -> Vec<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| line.starts_with("deb "))
        .filter(|line| {
            line.split_whitespace()
                .any(|word| of_release(word, release))
        })
        .map(str::to_owned)
        .collect()
}

/// Converts stanzas of `Field: value` lines, separated by empty lines, to one-line entries.
fn deb822_entries(text: &str, release: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let without_comments: Vec<_> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    for stanza in without_comments.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Vec<&str> {
            stanza
                .iter()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
                .map(|(_, value)| value.split_whitespace().collect())
                .unwrap_or_default()
        };
        if !field("Types").contains(&"deb") || field("Enabled") == ["no"] {
            continue;
        }
        let signed = match field("Signed-By")[..] {
            [path] if path.starts_with('/') => format!(" [signed-by={path}]"),
            _ => String::new(),
        };
        let components = field("Components").join(" ");
        for uri in field("URIs") {
            for suite in field("Suites") {
                if of_release(suite, release) {
                    lines.push(format!("deb{signed} {uri} {suite} {components}"));
                }
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_other_releases_and_other_projects_are_left_out() {
        let text = "deb http://mirror.example/debian bookworm main\n\
            # deb http://mirror.example/debian bookworm contrib\n\
            deb http://mirror.example/debian trixie main\n\
            deb-src http://mirror.example/debian bookworm main\n\
            deb http://other.example nodistro main\n\
            deb http://mirror.example/security bookworm-security main\n";
        assert_eq!(
            one_line_entries(text, "bookworm"),
            [
                "deb http://mirror.example/debian bookworm main",
                "deb http://mirror.example/security bookworm-security main"
            ]
        );
    }

    #[test]
    fn a_stanza_becomes_one_line_for_each_suite() {
        let text = "Types: deb\n# comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb\nEnabled: no\nURIs: http://x\nSuites: bookworm\nComponents: main\n";
        assert_eq!(
            deb822_entries(text, "bookworm"),
            [
                "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main",
                "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm-updates main"
            ]
        );
    }

    #[test]
    fn files_of_both_forms_are_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let more = dir.path().join("sources.list.d");
        fs::create_dir(&more).expect("made");
        fs::write(
            dir.path().join("sources.list"),
            "deb http://a bookworm main\n",
        )
        .expect("written");
        fs::write(
            more.join("b.sources"),
            "Types: deb\nURIs: http://b\nSuites: bookworm\nComponents: main\n",
        )
        .expect("written");
        fs::write(more.join("c.list.disabled"), "deb http://c bookworm main\n").expect("written");
        assert_eq!(
            host_sources(dir.path(), "bookworm").expect("readable"),
            ["deb http://a bookworm main", "deb http://b bookworm main"]
        );
    }
}
