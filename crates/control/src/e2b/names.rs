//! How clients of the E2B API call a template, and how it is called here. No I/O.
//!
//! ```text
//! [wrenn/]name[:tag]    there        here
//! name, name:default    wrenn/name:default    name
//! name:tag              wrenn/name:tag        name..tag
//! template-0123abcd     template-0123abcd:default    template-0123abcd   (a snapshot that nobody named)
//! ```
//!
//! A name with a tag becomes `name..tag`. No two become the same: a name that is given with a tag holds no `..` and does not
//! end with a dot, so the first `..` is where the tag begins. A name without `/` and `:` stands for the template that is
//! called exactly so here. `wrenn` is the only namespace there is; a name in another one names nothing.

use wrenn_proto::TemplateName;

/// The namespace of all templates.
pub(super) const NAMESPACE: &str = "wrenn";

/// The tag of a name without one.
const DEFAULT_TAG: &str = "default";

/// Between name and tag.
const SEPARATOR: &str = "..";

/// Why a text names no template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NameError {
    #[error("expected `[{NAMESPACE}/]name[:tag]`")]
    Form,
    #[error("there is no namespace but `{NAMESPACE}`")]
    Namespace,
    #[error("a name has letters, digits, `_`, `-` and single dots, and no dot at its ends")]
    Name,
    #[error("a tag has letters, digits, `.`, `_`, `-`")]
    Tag,
    #[error("name and tag together have more than 62 characters")]
    TooLong,
}

/// What a template is called here, by what a client calls it.
pub(super) fn parse(text: &str) -> Result<TemplateName, NameError> {
    let (name, tag) = split(text)?;
    let Some(tag) = tag.filter(|tag| *tag != DEFAULT_TAG) else {
        return name.parse().map_err(|_| NameError::Name);
    };
    if name.contains(SEPARATOR) || name.ends_with('.') || name.parse::<TemplateName>().is_err() {
        return Err(NameError::Name);
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if tag.is_empty() || !tag.bytes().all(plain) {
        return Err(NameError::Tag);
    }
    format!("{name}{SEPARATOR}{tag}")
        .parse()
        .map_err(|_| NameError::TooLong)
}

/// Name and tag of a text, as far as they are in it.
pub(super) fn split(text: &str) -> Result<(&str, Option<&str>), NameError> {
    let rest = match text.split_once('/') {
        None => text,
        Some((NAMESPACE, rest)) => rest,
        Some(_) => return Err(NameError::Namespace),
    };
    let (name, tag) = match rest.split_once(':') {
        None => (rest, None),
        Some((name, tag)) => (name, Some(tag)),
    };
    if name.is_empty() || name.contains('/') || tag.is_some_and(|tag| tag.contains([':', '/'])) {
        return Err(NameError::Form);
    }
    Ok((name, tag))
}

/// A template as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    /// Its name without namespace and tag.
    pub(super) name: String,
    pub(super) tag: String,
    /// Its user gave it a name.
    pub(super) named: bool,
}

impl Shown {
    /// Of a template that is called so here.
    pub(super) fn of(internal: &str) -> Self {
        let (name, tag) = match internal.split_once(SEPARATOR) {
            Some((name, tag)) if !tag.is_empty() && tag != DEFAULT_TAG => (name, tag),
            _ => (internal, DEFAULT_TAG),
        };
        Self {
            name: name.to_owned(),
            tag: tag.to_owned(),
            named: !is_made_up(name),
        }
    }

    /// What creates from it: a text that [`parse`] takes.
    pub(super) fn id(&self) -> String {
        let Self { name, tag, named } = self;
        if *named {
            format!("{NAMESPACE}/{name}:{tag}")
        } else {
            format!("{name}:{tag}")
        }
    }

    /// Its names with their namespace: none if nobody named it.
    pub(super) fn names(&self) -> Vec<String> {
        let name = || format!("{NAMESPACE}/{}", self.name);
        self.named.then(name).into_iter().collect()
    }
}

/// Whether it is a name as [`TemplateName::random`] makes them.
fn is_made_up(name: &str) -> bool {
    name.strip_prefix("template-")
        .is_some_and(|rest| rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_forms_of_a_name_lead_to_their_template() {
        for (text, here) in [
            ("base", "base"),
            ("base:default", "base"),
            ("wrenn/base", "base"),
            ("wrenn/base:default", "base"),
            ("base:v1", "base..v1"),
            ("wrenn/base:v1.2", "base..v1.2"),
            ("a.b:c", "a.b..c"),
            ("a..b", "a..b"),
            ("template-0123abcd:default", "template-0123abcd"),
        ] {
            assert_eq!(parse(text).unwrap().as_str(), here, "{text}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for (text, why) in [
            ("", NameError::Form),
            ("wrenn/", NameError::Form),
            (":x", NameError::Form),
            ("a:b:c", NameError::Form),
            ("wrenn/a/b", NameError::Form),
            ("a:b/c", NameError::Namespace),
            ("other/a", NameError::Namespace),
            ("../etc", NameError::Namespace),
            ("é", NameError::Name),
            ("a..b:c", NameError::Name),
            ("a.:c", NameError::Name),
            ("a:", NameError::Tag),
            ("a:b c", NameError::Tag),
        ] {
            assert_eq!(parse(text), Err(why), "{text}");
        }
        let long = format!("{}:{}", "a".repeat(60), "b".repeat(3));
        assert_eq!(parse(&long), Err(NameError::TooLong));
    }

    #[test]
    fn a_snapshot_without_a_name_has_no_names() {
        let shown = Shown::of("template-0123abcd");
        assert_eq!(shown.id(), "template-0123abcd:default");
        assert!(shown.names().is_empty());
        let shown = Shown::of("mine..v1");
        assert_eq!(shown.id(), "wrenn/mine:v1");
        assert_eq!(shown.names(), ["wrenn/mine"]);
    }

    proptest! {
        #[test]
        fn two_names_with_tags_never_become_one(
            a in "[a-z0-9][a-z.-]{0,4}", s in "[a-z.]{1,4}", b in "[a-z0-9][a-z.-]{0,4}", t in "[a-z.]{1,4}"
        ) {
            let (one, two) = (parse(&format!("{a}:{s}")), parse(&format!("{b}:{t}")));
            if let (Ok(one), Ok(two)) = (one, two) {
                prop_assert_eq!(one == two, (a, s) == (b, t));
            }
        }

        #[test]
        fn what_is_shown_leads_back(name in "[a-z0-9][a-z0-9._-]{0,12}") {
            // A name may end in what looks like a tag that no reference can hold; it is then found by its plain name.
            let shown = Shown::of(&name);
            if let Ok(back) = parse(&shown.id()) {
                prop_assert_eq!(back.as_str(), name.as_str());
            }
        }
    }
}
