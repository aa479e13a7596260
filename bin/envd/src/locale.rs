//! Default locale of processes.

use std::{collections::BTreeMap, fs};

/// Files that set the system's locale, in order of precedence: of systemd (`locale.conf(5)`), and
/// of Debian.
const FILES: [&str; 2] = ["/etc/locale.conf", "/etc/default/locale"];

/// Locale of an image that sets none. Without a locale, programs treat text as ASCII.
const DEFAULT: (&str, &str) = ("LANG", "C.UTF-8");

/// Returns the locale's environment variables. The files are read for each process, because
/// commands in the guest may change them.
#[must_use]
pub fn variables() -> BTreeMap<String, String> {
    let set = FILES
        .iter()
        .find_map(|path| fs::read_to_string(path).ok())
        .map(|text| parse(&text))
        .filter(|variables| !variables.is_empty());
    set.unwrap_or_else(|| {
        [DEFAULT]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into()
    })
}

/// Parses lines of the form `LANG=value` or `LC_NAME="value"`. Ignores all other lines.
fn parse(text: &str) -> BTreeMap<String, String> {
    let assignment = |line: &str| {
        let (name, value) = line.trim().split_once('=')?;
        let value = value.trim_matches(['"', '\'']);
        let is_locale = name == "LANG" || name == "LANGUAGE" || name.starts_with("LC_");
        (is_locale && !value.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    };
    text.lines().filter_map(assignment).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_assignments_of_the_locale_count() {
        let text = "# LANG=x\nLANG=\"de_DE.UTF-8\"\n LC_TIME='C'\nLC_ALL=\nPATH=/x\nLANG\n";
        let expected = [("LANG", "de_DE.UTF-8"), ("LC_TIME", "C")];
        let expected = expected.map(|(n, v)| (n.to_owned(), v.to_owned()));
        assert_eq!(parse(text), expected.into());
        assert!(parse("").is_empty());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = parse(&text);
        }
    }
}
