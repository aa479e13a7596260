//! Settings that the host provides by `POST /init` and `POST /snapshot/recover`: access control and
//! defaults of processes.
//!
//! The settings do not include the guest's clock. The host does not push the time; `chronyd` in the
//! guest reads it. The timestamp of `/init` only orders the host's requests.

use std::{collections::BTreeMap, net::Ipv4Addr};

use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use crate::identity::Identity;

/// Body of `POST /init`. All fields are optional.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Init {
    /// Environment of every process.
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Token that clients must present from now on.
    pub access_token: Option<String>,
    /// Time of the host's request (RFC 3339). Requests that are not newer than the last one are
    /// ignored.
    pub timestamp: Option<Timestamp>,
    /// User of calls that name no user.
    pub default_user: Option<String>,
    /// Working directory of processes that name no directory.
    pub default_workdir: Option<String>,
    /// Network file systems to mount.
    pub volume_mounts: Option<serde_json::Value>,
    /// Address of a service for events.
    #[serde(rename = "hyperloopIP")]
    pub hyperloop_ip: Option<String>,
    /// Certificates to trust.
    pub ca_bundle: Option<String>,
}

impl Init {
    /// Returns the token to set, if the request contains one.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.access_token
            .as_deref()
            .filter(|token| !token.is_empty())
    }

    /// Returns the first field that requests a feature that envd does not support.
    #[must_use]
    pub fn unsupported(&self) -> Option<&'static str> {
        let is_empty = |value: &serde_json::Value| match value {
            serde_json::Value::Null => true,
            serde_json::Value::Array(list) => list.is_empty(),
            _ => false,
        };
        let is_named = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
        if !self.volume_mounts.as_ref().is_none_or(is_empty) {
            return Some("volumeMounts");
        }
        if is_named(&self.hyperloop_ip) {
            return Some("hyperloopIP");
        }
        is_named(&self.ca_bundle).then_some("caBundle")
    }
}

/// Body of `/snapshot/recover`. Absent fields leave the current values.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Recover {
    /// Random bytes, in base64.
    pub entropy: Option<String>,
    /// Id of the sandbox that the guest is now.
    pub sandbox_id: Option<String>,
    /// Id of the sandbox's template.
    pub template_id: Option<String>,
    /// Host name of the guest.
    pub hostname: Option<String>,
    /// Content of `/etc/machine-id`.
    pub machine_id: Option<String>,
    /// Environment of every process from now on. Replaces the current environment.
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Token that clients must present from now on.
    pub access_token: Option<String>,
    /// User of calls that name no user.
    pub default_user: Option<String>,
    /// Nameservers of the guest. An empty list means no nameservers.
    pub nameservers: Option<Vec<Ipv4Addr>>,
    /// MTU of the guest's link.
    pub mtu: Option<u32>,
}

impl Recover {
    /// Returns the guest's new identity, if the request contains one.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        Some(Identity {
            sandbox_id: self.sandbox_id.clone()?,
            template_id: self.template_id.clone().unwrap_or_default(),
        })
    }
}

/// Relation of a caller to the current token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// There is no token.
    Free,
    /// The caller knows the token.
    Known,
    /// The caller does not know the token.
    Stranger,
}

/// Effect of an `/init` without a token on the current token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    /// The current token stays.
    Keep,
    /// The token is removed, because the metadata service reports that there is none.
    Clear,
}

/// Current settings.
#[derive(Debug, Default)]
pub struct Settings(Mutex<Current>);

#[derive(Debug, Default)]
struct Current {
    token: Option<String>,
    envs: BTreeMap<String, String>,
    default_user: Option<String>,
    default_workdir: Option<String>,
    as_of: Option<Timestamp>,
}

impl Settings {
    /// Returns the relation of a caller to the current token. The caller may present the token in
    /// the header (`shown`) or repeat it as the token to set (`told`).
    #[must_use]
    pub fn standing(&self, shown: Option<&str>, told: Option<&str>) -> Standing {
        let current = self.lock();
        let Some(token) = &current.token else {
            return Standing::Free;
        };
        let knows = |word: Option<&str>| word.is_some_and(|word| same(word, token));
        if knows(shown) || knows(told) {
            Standing::Known
        } else {
            Standing::Stranger
        }
    }

    /// Applies settings of the host. Ignores settings whose timestamp is not newer than the last
    /// one. Does not check the caller's authorization.
    pub fn apply(&self, init: Init, unnamed: Unnamed) {
        let mut current = self.lock();
        if let (Some(told), Some(known)) = (init.timestamp, current.as_of)
            && told <= known
        {
            return;
        }
        current.as_of = init.timestamp.or(current.as_of);
        match init.access_token.filter(|token| !token.is_empty()) {
            Some(token) => current.token = Some(token),
            None if unnamed == Unnamed::Clear => current.token = None,
            None => {}
        }
        if let Some(envs) = init.env_vars {
            current.envs.extend(envs);
        }
        let named = |name: &String| !name.is_empty();
        if let Some(user) = init.default_user.filter(named) {
            current.default_user = Some(user);
        }
        if let Some(workdir) = init.default_workdir.filter(named) {
            current.default_workdir = Some(workdir);
        }
    }

    /// Applies the settings of a restore, after which the guest is another sandbox. They replace
    /// the settings of the previous sandbox.
    pub fn become_sandbox(&self, recover: Recover) {
        let identity = recover.identity();
        let mut current = self.lock();
        if let Some(token) = recover.access_token.filter(|token| !token.is_empty()) {
            current.token = Some(token);
        }
        if let Some(envs) = recover.env_vars {
            current.envs = envs;
        }
        if let Some(user) = recover.default_user.filter(|name| !name.is_empty()) {
            current.default_user = Some(user);
        }
        if let Some(identity) = identity {
            current.envs.extend(identity.variables());
        }
    }

    /// Adds the guest's identity to the environment of processes.
    pub fn identify(&self, identity: &Identity) {
        self.lock().envs.extend(identity.variables());
    }

    /// True if a caller with `token` is authorized. Any caller is authorized while no token is set.
    #[must_use]
    pub fn admits(&self, token: Option<&str>) -> bool {
        match &self.lock().token {
            None => true,
            Some(right) => token.is_some_and(|token| same(token, right)),
        }
    }

    /// Returns the token, for signatures.
    #[must_use]
    pub fn token(&self) -> Option<String> {
        self.lock().token.clone()
    }

    /// Returns the environment of every process.
    #[must_use]
    pub fn envs(&self) -> BTreeMap<String, String> {
        self.lock().envs.clone()
    }

    /// Returns the user of calls that name no user.
    #[must_use]
    pub fn default_user(&self) -> String {
        let user = self.lock().default_user.clone();
        user.unwrap_or_else(|| "root".to_owned())
    }

    /// Returns the working directory of processes that name no directory. `None` means the user's
    /// home directory.
    #[must_use]
    pub fn default_workdir(&self) -> Option<String> {
        self.lock().default_workdir.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // Each change is one assignment, so a panic in between leaves a consistent state.
        self.0.lock()
    }
}

/// Compares secrets in constant time, so that the time does not reveal where they differ.
#[must_use]
pub fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(json: &str) -> Init {
        serde_json::from_str(json).expect("a body")
    }

    #[test]
    fn a_token_once_set_is_known_or_not() {
        let settings = Settings::default();
        assert!(settings.admits(None));
        assert_eq!(settings.standing(None, Some("a")), Standing::Free);
        settings.apply(init(r#"{"accessToken":"a"}"#), Unnamed::Keep);
        assert!(
            !settings.admits(None) && !settings.admits(Some("b")) && settings.admits(Some("a"))
        );
        assert_eq!(settings.standing(None, Some("b")), Standing::Stranger);
        assert_eq!(settings.standing(Some("b"), None), Standing::Stranger);
        assert_eq!(settings.standing(Some("a"), Some("b")), Standing::Known);
        assert_eq!(settings.standing(None, Some("a")), Standing::Known);
        settings.apply(init(r#"{"accessToken":"b"}"#), Unnamed::Keep);
        settings.apply(init(r#"{"accessToken":""}"#), Unnamed::Keep);
        assert!(settings.admits(Some("b")) && !settings.admits(Some("a")));
        settings.apply(init("{}"), Unnamed::Clear);
        assert!(settings.admits(None));
    }

    #[test]
    fn what_is_not_done_here_is_named() {
        let unsupported = |json: &str| init(json).unsupported();
        assert_eq!(unsupported(r#"{"volumeMounts":[],"caBundle":""}"#), None);
        assert_eq!(
            unsupported(r#"{"volumeMounts":null,"lifecycleID":"x"}"#),
            None
        );
        let mounts = r#"{"volumeMounts":[{"nfs_target":"a:/b","path":"/c"}]}"#;
        assert_eq!(unsupported(mounts), Some("volumeMounts"));
        assert_eq!(
            unsupported(r#"{"hyperloopIP":"10.0.0.1"}"#),
            Some("hyperloopIP")
        );
        assert_eq!(unsupported(r#"{"caBundle":"-----"}"#), Some("caBundle"));
    }

    #[test]
    fn what_is_older_than_the_last_is_ignored() {
        let settings = Settings::default();
        let at = |second: u8, user: &str| {
            init(&format!(
                r#"{{"timestamp":"2026-01-01T00:00:{second:02}.5+00:00","defaultUser":"{user}"}}"#
            ))
        };
        settings.apply(at(10, "ten"), Unnamed::Keep);
        settings.apply(at(9, "nine"), Unnamed::Keep);
        assert_eq!(settings.default_user(), "ten");
        settings.apply(at(11, "eleven"), Unnamed::Keep);
        assert_eq!(settings.default_user(), "eleven");
    }

    #[test]
    fn defaults_hold_until_told_otherwise() {
        let settings = Settings::default();
        assert_eq!(settings.default_user(), "root");
        assert_eq!(settings.default_workdir(), None);
        let told = init(r#"{"envVars":{"A":"1"},"defaultWorkdir":"/w"}"#);
        settings.apply(told, Unnamed::Keep);
        assert_eq!(settings.envs()["A"], "1");
        assert_eq!(settings.default_workdir().as_deref(), Some("/w"));
    }
}
