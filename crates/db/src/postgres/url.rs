//! URLs of PostgreSQL.

use std::borrow::Cow;

/// Adds a host to a URL that has a user and no host, for example
/// `postgres://user@/db?host=/run/postgresql`. libpq accepts such a URL, but the URL standard does
/// not. The parameter `host` takes precedence over the added host.
pub(super) fn with_host(url: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.into();
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if !authority.ends_with('@') {
        return url.into();
    }
    format!("{scheme}://{authority}localhost{path}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_added_only_to_a_url_with_a_user_and_no_host() {
        for (url, expected) in [
            (
                "postgres://u@/db?host=/s",
                "postgres://u@localhost/db?host=/s",
            ),
            (
                "postgres://u:p@?host=/s",
                "postgres://u:p@localhost?host=/s",
            ),
            ("postgresql://u@", "postgresql://u@localhost"),
            ("postgres://u@h/db?user=a@/b", "postgres://u@h/db?user=a@/b"),
            ("postgres:///db?host=/s", "postgres:///db?host=/s"),
            ("postgres:db", "postgres:db"),
        ] {
            assert_eq!(with_host(url), expected);
        }
    }
}
