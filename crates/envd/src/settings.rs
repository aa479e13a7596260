//! What the host told by `POST /init`: who may call, and what processes start with.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use crate::http::snapshot::Recover;

/// Body of `POST /init`. All fields may be absent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Init {
    /// Environment of every process.
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Token that clients must show from now on.
    pub access_token: Option<String>,
    /// When the host said this (RFC 3339): what is older than the last is ignored.
    pub timestamp: Option<Timestamp>,
    /// User of calls that name none.
    pub default_user: Option<String>,
    /// Working directory of processes that name none.
    pub default_workdir: Option<String>,
}

/// The caller may not change the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("access token validation failed")]
pub struct InitRefused;

/// The settings in force.
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
    /// Applies what the host told. While there is no token, anyone may set one; afterwards the token must be shown, in
    /// the header or as the body's own, and a body without one leaves it as it is.
    ///
    /// # Errors
    /// If the token is neither shown nor repeated: nothing is changed.
    pub fn apply(&self, init: Init, shown: Option<&str>) -> Result<(), InitRefused> {
        let mut current = self.lock();
        if let Some(token) = &current.token {
            let knows = |word: Option<&str>| word.is_some_and(|word| same(word, token));
            if !knows(shown) && !knows(init.access_token.as_deref()) {
                return Err(InitRefused);
            }
        }
        if let (Some(told), Some(known)) = (init.timestamp, current.as_of)
            && told <= known
        {
            return Ok(());
        }
        current.as_of = init.timestamp.or(current.as_of);
        if let Some(token) = init.access_token.filter(|token| !token.is_empty()) {
            current.token = Some(token);
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
        Ok(())
    }

    /// This machine is another sandbox from now on: what the one before was told is forgotten.
    pub fn become_sandbox(&self, recover: Recover) {
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
        let ids = [
            ("WRENN_SANDBOX", Some("true".to_owned())),
            ("WRENN_SANDBOX_ID", recover.sandbox_id.clone()),
            ("WRENN_TEMPLATE_ID", recover.template_id.clone()),
            ("E2B_SANDBOX", Some("true".to_owned())),
            ("E2B_SANDBOX_ID", recover.sandbox_id),
            ("E2B_TEMPLATE_ID", recover.template_id),
        ];
        for (name, value) in ids {
            if let Some(value) = value {
                current.envs.insert(name.to_owned(), value);
            }
        }
    }

    /// Whether a caller who shows `token` may go on: anyone may while none is set.
    #[must_use]
    pub fn admits(&self, token: Option<&str>) -> bool {
        match &self.lock().token {
            None => true,
            Some(right) => token.is_some_and(|token| same(token, right)),
        }
    }

    /// The token, for signatures.
    #[must_use]
    pub fn token(&self) -> Option<String> {
        self.lock().token.clone()
    }

    /// Environment of every process.
    #[must_use]
    pub fn envs(&self) -> BTreeMap<String, String> {
        self.lock().envs.clone()
    }

    /// User of calls that name none.
    #[must_use]
    pub fn default_user(&self) -> String {
        let user = self.lock().default_user.clone();
        user.unwrap_or_else(|| "root".to_owned())
    }

    /// Working directory of processes that name none; `None`: the user's home.
    #[must_use]
    pub fn default_workdir(&self) -> Option<String> {
        self.lock().default_workdir.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        // Each change is one assignment: a panic in between leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compares secrets in a time that does not tell where they differ.
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
    fn a_token_once_set_must_be_shown_to_change_anything() {
        let settings = Settings::default();
        assert!(settings.admits(None));
        settings
            .apply(init(r#"{"accessToken":"a"}"#), None)
            .expect("first");
        assert!(
            !settings.admits(None) && !settings.admits(Some("b")) && settings.admits(Some("a"))
        );
        assert_eq!(
            settings.apply(init(r#"{"accessToken":"b"}"#), None),
            Err(InitRefused)
        );
        assert_eq!(settings.apply(init("{}"), Some("b")), Err(InitRefused));
        settings
            .apply(init(r#"{"accessToken":"b"}"#), Some("a"))
            .expect("shown");
        assert!(settings.admits(Some("b")));
        settings
            .apply(init(r#"{"accessToken":"b"}"#), None)
            .expect("repeated");
    }

    #[test]
    fn what_is_older_than_the_last_is_ignored() {
        let settings = Settings::default();
        let at = |second: u8, user: &str| {
            init(&format!(
                r#"{{"timestamp":"2026-01-01T00:00:{second:02}.5+00:00","defaultUser":"{user}"}}"#
            ))
        };
        settings.apply(at(10, "ten"), None).expect("applied");
        settings.apply(at(9, "nine"), None).expect("ignored");
        assert_eq!(settings.default_user(), "ten");
        settings.apply(at(11, "eleven"), None).expect("applied");
        assert_eq!(settings.default_user(), "eleven");
    }

    #[test]
    fn defaults_hold_until_told_otherwise() {
        let settings = Settings::default();
        assert_eq!(settings.default_user(), "root");
        assert_eq!(settings.default_workdir(), None);
        settings
            .apply(init(r#"{"envVars":{"A":"1"},"defaultWorkdir":"/w"}"#), None)
            .expect("applied");
        assert_eq!(settings.envs()["A"], "1");
        assert_eq!(settings.default_workdir().as_deref(), Some("/w"));
    }
}
