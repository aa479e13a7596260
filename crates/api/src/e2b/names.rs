//! Template names: the form that clients of the E2B API use, and the internal form. No I/O.
//!
//! ```text
//! client                   full form                    internal
//! name, name:default       wrenn/name:default           name
//! name:tag                 wrenn/name:tag               name..tag
//! template-0123abcd        template-0123abcd:default    template-0123abcd   (unnamed snapshot)
//! ```
//!
//! Clients write `[wrenn/]name[:tag]`. A name with a tag becomes `name..tag` internally. This
//! mapping is unambiguous: a name given with a tag contains no `..` and does not end with a dot, so
//! the tag begins after the first `..`. A name without `/` and `:` refers to the template with
//! exactly that internal name. `wrenn` is the only namespace; names in other namespaces refer to
//! nothing.

use wrenn_model::TemplateName;

/// Namespace of all templates.
pub(super) const NAMESPACE: &str = "wrenn";

/// Tag of a name that is given without one.
const DEFAULT_TAG: &str = "default";

/// Separator of name and tag in the internal form.
const SEPARATOR: &str = "..";

/// Reason for which a text is not a template name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NameError {
    #[error("expected `[{NAMESPACE}/]name[:tag]`")]
    Form,
    #[error("unknown namespace; the only namespace is `{NAMESPACE}`")]
    Namespace,
    #[error(
        "expected a name of letters, digits, `_`, `-` and single dots, without a dot at its ends"
    )]
    Name,
    #[error("expected a tag of letters, digits, `.`, `_`, `-`")]
    Tag,
    #[error("name and tag together exceed the limit of 62 characters")]
    TooLong,
}

/// Converts a name from the client's form to the internal one.
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

/// Splits a text into name and tag. The tag is `None` if the text has none.
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

/// Template name as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    /// Name without namespace and tag.
    pub(super) name: String,
    pub(super) tag: String,
    /// True if a user chose the name.
    pub(super) named: bool,
}

impl Shown {
    /// Converts an internal name.
    pub(super) fn of(internal: &str) -> Self {
        let (name, tag) = match internal.split_once(SEPARATOR) {
            Some((name, tag)) if !tag.is_empty() && tag != DEFAULT_TAG => (name, tag),
            _ => (internal, DEFAULT_TAG),
        };
        Self {
            name: name.to_owned(),
            tag: tag.to_owned(),
            named: !TemplateName::is_random(name),
        }
    }

    /// Returns the id for use in a create, which [`parse`] accepts.
    pub(super) fn id(&self) -> String {
        let Self { name, tag, named } = self;
        if *named {
            format!("{NAMESPACE}/{name}:{tag}")
        } else {
            format!("{name}:{tag}")
        }
    }

    /// Returns the names with namespace; empty for an unnamed snapshot.
    pub(super) fn names(&self) -> Vec<String> {
        let name = || format!("{NAMESPACE}/{}", self.name);
        self.named.then(name).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_forms_of_a_name_resolve_to_their_template() {
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
    fn invalid_name_is_rejected() {
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
        let new = TemplateName::random();
        assert!(Shown::of(new.as_str()).names().is_empty());
        let shown = Shown::of("mine..v1");
        assert_eq!(shown.id(), "wrenn/mine:v1");
        assert_eq!(shown.names(), ["wrenn/mine"]);
    }

    proptest! {
        #[test]
        fn different_tagged_names_never_collide(
            a in "[a-z0-9][a-z.-]{0,4}", s in "[a-z.]{1,4}", b in "[a-z0-9][a-z.-]{0,4}", t in "[a-z.]{1,4}"
        ) {
            let (one, two) = (parse(&format!("{a}:{s}")), parse(&format!("{b}:{t}")));
            if let (Ok(one), Ok(two)) = (one, two) {
                prop_assert_eq!(one == two, (a, s) == (b, t));
            }
        }

        #[test]
        fn shown_name_resolves_to_its_template(name in "[a-z0-9][a-z0-9._-]{0,12}") {
            // An internal name may end in a text that is not a valid tag. Such a template is found
            // by its plain name.
            let shown = Shown::of(&name);
            if let Ok(back) = parse(&shown.id()) {
                prop_assert_eq!(back.as_str(), name.as_str());
            }
        }
    }
}
