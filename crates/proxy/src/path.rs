//! Paths of the guest agent that only its host may call.
//!
//! Paths are compared after undoing everything that could hide them: percent-encoding (also
//! nested), empty and dot segments, backslashes, letter case, and parameters. The forwarded path is
//! never changed: a request that is not rejected is sent on as it arrived.

/// First segments of the host's own calls. Every path that starts with one of these is rejected.
const INTERNAL: [&str; 8] = [
    "init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "snapshot", "upgrade",
];

/// Number of nested percent-encodings that are decoded. A deeper path is rejected: no client sends
/// one.
const MAX_DECODINGS: usize = 8;

/// True if a request's path could address one of the guest agent's internal calls.
#[must_use]
pub fn is_internal(path: &str) -> bool {
    let Some(path) = decode_fully(path) else {
        return true;
    };
    let meant = path.split(['?', '#']).next().unwrap_or_default();
    let mut segments: Vec<&str> = Vec::new();
    for segment in meant.split(['/', '\\']) {
        // Strip the parameters of a segment, and whitespace and control characters around it.
        let segment = segment.split(';').next().unwrap_or_default();
        let segment = segment.trim_matches(|sign: char| sign.is_whitespace() || sign.is_control());
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment),
        }
    }
    segments
        .first()
        .is_some_and(|first| INTERNAL.iter().any(|name| first.eq_ignore_ascii_case(name)))
}

/// Decodes percent-encoding repeatedly until none is left; `None` if it is nested too deeply.
fn decode_fully(path: &str) -> Option<String> {
    let mut path = path.to_owned();
    for _ in 0..MAX_DECODINGS {
        let decoded = decode(&path);
        if decoded == path {
            return Some(path);
        }
        path = decoded;
    }
    None
}

/// Decodes percent-encoding once; invalid encodings are kept as they are.
fn decode(path: &str) -> String {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let byte = match bytes[at..] {
            [b'%', high, low, ..] => hex(high).zip(hex(low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        decoded.push(byte.unwrap_or(bytes[at]));
        at += if byte.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn host_calls_are_internal_in_any_spelling() {
        for path in [
            "/init",
            "/init/",
            "//init",
            "/./init",
            "/x/../init",
            "/%69nit",
            "/%2569nit",
            "/INIT",
            "/init;a=b",
            "/init%20",
            "/init%00",
            "\\init",
            "/%2finit",
            "/..%2f..%2finit",
            "/init%3fx",
            "/snapshot/prepare",
            "/snapshot/recover",
            "/snapshot",
            "/freeze",
            "/unfreeze",
            "/collapse",
            "/fsfreeze",
            "/fsthaw",
            "/upgrade",
            "/files/../init",
            "/files/%2e%2e/init",
            "/files/..;/init",
        ] {
            assert!(is_internal(path), "{path}");
        }
    }

    #[test]
    fn client_calls_are_not_internal() {
        for path in [
            "/",
            "/health",
            "/metrics",
            "/envs",
            "/files",
            "/files/compose",
            "/process.Process/Start",
            "/filesystem.Filesystem/WatchDir",
            "/initial",
            "/x/init",
            "/files/init",
        ] {
            assert!(!is_internal(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_classified(path in ".*") {
            let _ = is_internal(&path);
        }

        /// Each character of an internal path is written plainly or encoded once or twice, with
        /// empty segments in between.
        #[test]
        fn no_encoding_hides_an_internal_call(
            name in prop::sample::select(&INTERNAL[..]),
            ways in prop::collection::vec(0_u8..3, 12),
            before in prop::sample::select(&["/", "//", "/./", "/a/../", "/%2e/", "/a/%2e%2e/", "/%2f"][..]),
            after in prop::sample::select(&["", "/", "//", "/.", "/x"][..]),
        ) {
            let mut path = before.to_owned();
            for (sign, way) in name.bytes().zip(ways) {
                path.push_str(&match way {
                    0 => char::from(sign).to_string(),
                    1 => format!("%{sign:02x}"),
                    _ => format!("%25{sign:02X}"),
                });
            }
            path.push_str(after);
            prop_assert!(is_internal(&path), "{}", path);
        }
    }
}
