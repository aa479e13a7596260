//! Unimplemented calls of the E2B API. No I/O.

use http::Method;

/// Unimplemented calls: method, path (`*` matches any one segment) and feature.
const CALLS: [(Method, &str, &str); 33] = [
    (Method::POST, "/v3/templates", BUILDS),
    (Method::POST, "/v2/templates", BUILDS),
    (Method::POST, "/templates", BUILDS),
    (Method::POST, "/templates/*", BUILDS),
    (Method::POST, "/templates/*/builds/*", BUILDS),
    (Method::POST, "/v2/templates/*/builds/*", BUILDS),
    (Method::GET, "/templates/*/files/*", BUILDS),
    (Method::GET, "/templates/*/builds/*/status", BUILDS),
    (Method::GET, "/templates/*/builds/*/logs", BUILDS),
    (Method::GET, "/templates/*", "reading one template"),
    (Method::PATCH, "/templates/*", "changing templates"),
    (Method::PATCH, "/v2/templates/*", "changing templates"),
    (Method::GET, "/default-templates", "default templates"),
    (Method::POST, "/templates/tags", TAGS),
    (Method::DELETE, "/templates/tags", TAGS),
    (Method::GET, "/templates/*/tags", TAGS),
    (Method::GET, "/templates/*/tags/*", TAGS),
    (Method::GET, "/sandboxes/*/logs", LOGS),
    (Method::GET, "/v2/sandboxes/*/logs", LOGS),
    (Method::POST, "/volumes", VOLUMES),
    (Method::GET, "/volumes", VOLUMES),
    (Method::GET, "/volumes/*", VOLUMES),
    (Method::DELETE, "/volumes/*", VOLUMES),
    (Method::GET, "/volumecontent/*/*", VOLUMES),
    (Method::POST, "/volumecontent/*/*", VOLUMES),
    (Method::PUT, "/volumecontent/*/*", VOLUMES),
    (Method::PATCH, "/volumecontent/*/*", VOLUMES),
    (Method::DELETE, "/volumecontent/*/*", VOLUMES),
    (Method::GET, "/secrets", SECRETS),
    (Method::POST, "/secrets", SECRETS),
    (Method::GET, "/secrets/*", SECRETS),
    (Method::POST, "/secrets/*", SECRETS),
    (Method::DELETE, "/secrets/*", SECRETS),
];

const BUILDS: &str = "template builds";
const TAGS: &str = "template tags";
const LOGS: &str = "sandbox logs";
const VOLUMES: &str = "volumes";
const SECRETS: &str = "secrets";

/// Unimplemented parts of the API: first path segment and feature. All calls below belong to it.
const PARTS: [(&str, &str); 6] = [
    ("admin", "administration"),
    ("api-keys", "API keys of this API (see `/v1/api-keys`)"),
    ("clusters", "clusters"),
    ("events", "lifecycle events"),
    ("nodes", "nodes"),
    ("teams", "teams"),
];

/// Returns the feature that a call belongs to, if the call is not implemented.
pub(super) fn feature(method: &Method, path: &str) -> Option<&'static str> {
    let fits = |pattern: &str| {
        let (mut wanted, mut given) = (pattern.split('/'), path.split('/'));
        loop {
            match (wanted.next(), given.next()) {
                (None, None) => return true,
                (Some("*"), Some(part)) if !part.is_empty() => {}
                (Some(wanted), Some(part)) if wanted == part => {}
                _ => return false,
            }
        }
    };
    let call = CALLS
        .iter()
        .find(|(known, pattern, _)| known == method && fits(pattern));
    let root = path.split('/').nth(1);
    let part = || PARTS.iter().find(|(known, _)| root == Some(*known));
    call.map(|(.., what)| *what)
        .or_else(|| part().map(|(_, what)| *what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unimplemented_call_is_matched_by_method_and_path() {
        assert_eq!(feature(&Method::POST, "/v3/templates"), Some(BUILDS));
        assert_eq!(
            feature(&Method::GET, "/templates/a/builds/b/status"),
            Some(BUILDS)
        );
        assert_eq!(feature(&Method::GET, "/volumes/x"), Some(VOLUMES));
        for method in [Method::PATCH, Method::DELETE] {
            assert_eq!(feature(&method, "/volumecontent/x/path"), Some(VOLUMES));
        }
        assert_eq!(feature(&Method::GET, "/volumes/"), None);
        assert_eq!(feature(&Method::PUT, "/volumes"), None);
        assert_eq!(feature(&Method::GET, "/sandboxes/a"), None);
        for path in ["/teams", "/teams/x/metrics", "/teams/"] {
            assert_eq!(feature(&Method::PATCH, path), Some("teams"), "{path}");
        }
        assert_eq!(feature(&Method::GET, "/teamsx"), None);
    }
}
