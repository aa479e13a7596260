//! Helpers shared by all calls that start or address processes.

use std::collections::BTreeMap;

use rand::RngExt;
use wrenn_proto::rpc::process;

use crate::{error::ApiError, validate};

/// Reference to a process, by process id or by tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selector {
    Pid(u32),
    Tag(String),
}

impl Selector {
    /// Parses `{process}` of a path. A number is a process id, anything else a tag.
    pub(super) fn parse(text: &str) -> Result<Self, ApiError> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return match text.parse() {
                Ok(pid) if pid > 0 => Ok(Self::Pid(pid)),
                _ => Err(ApiError::field("process", "is not a valid process id")),
            };
        }
        validate::check_tag("process", text)?;
        Ok(Self::Tag(text.to_owned()))
    }

    pub(super) fn to_rpc(&self) -> process::ProcessSelector {
        use process::process_selector::Selector as Rpc;
        let selector = match self {
            Self::Pid(pid) => Rpc::Pid(*pid),
            Self::Tag(tag) => Rpc::Tag(tag.clone()),
        };
        process::ProcessSelector {
            selector: Some(selector),
            ..Default::default()
        }
    }
}

/// Generates a tag: `proc-` or `pty-` and 24 hexadecimal digits.
pub(super) fn new_tag(kind: &str) -> String {
    let random = rand::rng().random::<[u8; 12]>();
    format!("{kind}-{}", hex::encode(random))
}

/// Builds a process configuration from program, arguments, environment and directory.
pub(super) fn config(
    cmd: String,
    args: Vec<String>,
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
) -> process::ProcessConfig {
    process::ProcessConfig {
        cmd,
        args,
        envs: envs.into_iter().collect(),
        cwd,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    #[test]
    fn selector_is_a_process_id_or_a_tag() {
        assert_eq!(Selector::parse("17").unwrap(), Selector::Pid(17));
        assert_eq!(
            Selector::parse("proc-1").unwrap(),
            Selector::Tag("proc-1".into())
        );
        for bad in ["", "0", "4294967296", "a b", "../x", "é", &"a".repeat(65)] {
            assert!(Selector::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn generated_tag_is_valid() {
        for _ in 0..100 {
            validate::check_tag("tag", &new_tag("proc")).unwrap();
        }
    }
}
