//! `/snapshot/prepare` and `/snapshot/recover`: before the machine is frozen, and after.
//!
//! Preparing makes a frozen moment small and whole: what is in the page cache is written, the cache is given back if it has
//! grown ([`crate::page_cache`]), idle connections are closed, forwarded ports and their connections too, nothing goes on in
//! the background, and memory that the agent does not use is given back. It is tied to the snapshot that it is for; nothing but `/snapshot/recover` ends it.
//!
//! Recovering has two forms. Without `sandboxId` the machine goes on as the one it was (it was frozen and thawed, or not
//! frozen after all): it gets fresh randomness, as the frozen moment may become another's past. With it, the machine was
//! restored, perhaps as another sandbox: before this is answered it has its own randomness, names, environment and token, and
//! the connections of its past are cut. Either form forwards ports again.

use std::{collections::BTreeMap, fs, io, net::Ipv4Addr, path::Path, time::Duration};

use axum::{Json, extract::State};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::StatusCode;
use serde::Deserialize;

use super::error::HttpError;
use crate::{
    clock,
    identity::{Identity, is_word, write_if_other},
    server::App,
};

/// How long a restored machine leaves its metadata alone: the recover has told it what is there.
const METADATA_DELAY: Duration = Duration::from_secs(2);

/// Body of `/snapshot/prepare`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prepare {
    /// The snapshot that is to be taken.
    pub snapshot_id: String,
    /// Leave the page cache as it is: the moment becomes larger, and what comes from it starts faster.
    #[serde(default)]
    pub keep_cache: bool,
}

/// Body of `/snapshot/recover`. What is absent stays.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Recover {
    /// Random bytes, base64.
    pub entropy: Option<String>,
    /// The sandbox that this machine is now.
    pub sandbox_id: Option<String>,
    /// The template that it was made from.
    pub template_id: Option<String>,
    /// Name of the machine.
    pub hostname: Option<String>,
    /// Content of `/etc/machine-id`.
    pub machine_id: Option<String>,
    /// Environment of every process from now on, instead of what was.
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Token that clients must show from now on.
    pub access_token: Option<String>,
    /// User of calls that name none.
    pub default_user: Option<String>,
    /// Nameservers of the machine; an empty list: none.
    pub nameservers: Option<Vec<Ipv4Addr>>,
}

impl Recover {
    /// Who the machine is now, if it is told.
    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        Some(Identity {
            sandbox_id: self.sandbox_id.clone()?,
            template_id: self.template_id.clone().unwrap_or_default(),
        })
    }
}

/// `POST /snapshot/prepare`. Doing it twice is fine.
///
/// # Errors
/// 400 without a snapshot, 500 if the kernel does not do as it is told.
pub async fn prepare(
    State(app): State<App>,
    Json(request): Json<Prepare>,
) -> Result<StatusCode, HttpError> {
    if request.snapshot_id.is_empty() {
        return Err(HttpError::bad_request("snapshotId: must not be empty"));
    }
    tracing::info!(
        snapshot_id = request.snapshot_id,
        "getting ready to be frozen"
    );
    app.connections.drain();
    // The host has let its calls end by now: what is still open would only be dead after the freeze.
    app.ports.stop().await;
    app.mmds.stop();
    let page_cache = app.page_cache.clone();
    blocking(move || {
        wrenn_sys::heap::give_back();
        rustix::fs::sync();
        page_cache.freeze(request.keep_cache)
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /snapshot/recover`.
///
/// # Errors
/// 400 if a field is wrong, 500 if the kernel refuses randomness or a file cannot be written.
pub async fn recover(
    State(app): State<App>,
    Json(request): Json<Recover>,
) -> Result<StatusCode, HttpError> {
    let entropy = entropy(request.entropy.as_deref())?;
    let restored = request.sandbox_id.is_some();
    check(&request)?;
    if restored {
        app.mmds.forget();
        // If it was frozen without being asked first: what is forwarded belongs to the past.
        app.ports.stop().await;
    }
    // Not aside, in a thread, though some of it may block: whoever restored this machine waits for nothing else, nobody else knows
    // of it yet, and a thread's start is time, too.
    if let Some(entropy) = entropy {
        wrenn_sys::random::reseed(&entropy).map_err(failed)?;
    }
    if restored && let Err(error) = clock::step_to_gateway() {
        tracing::info!(%error, "the clock is left to chronyd");
    }
    write_identity(Path::new("/"), &request).map_err(failed)?;
    if restored {
        app.settings.become_sandbox(request);
        app.connections.cut();
        app.mmds.ask_after(METADATA_DELAY);
    } else {
        app.connections.keep();
    }
    app.ports.start().await;
    Ok(StatusCode::NO_CONTENT)
}

fn entropy(text: Option<&str>) -> Result<Option<Vec<u8>>, HttpError> {
    let Some(text) = text else {
        return Ok(None);
    };
    let bytes = BASE64_STANDARD
        .decode(text)
        .map_err(|e| HttpError::bad_request(format!("entropy: {e}")))?;
    let most = wrenn_sys::random::MAX_ENTROPY_BYTES;
    if bytes.is_empty() || bytes.len() > most {
        let got = bytes.len();
        return Err(HttpError::bad_request(format!(
            "entropy: {got} bytes; must be 1 to {most}"
        )));
    }
    Ok(Some(bytes))
}

/// Names become lines of files.
fn check(request: &Recover) -> Result<(), HttpError> {
    let words = [
        ("sandboxId", &request.sandbox_id),
        ("templateId", &request.template_id),
        ("hostname", &request.hostname),
        ("machineId", &request.machine_id),
    ];
    for (field, word) in words {
        if !word.as_deref().is_none_or(is_word) {
            return Err(HttpError::bad_request(format!(
                "{field}: letters, digits, `-`, `.` and `_` only, 64 at most"
            )));
        }
    }
    Ok(())
}

/// Writes who this machine is to the places where programs look. `root` is `/`, but for tests.
fn write_identity(root: &Path, request: &Recover) -> io::Result<()> {
    if let Some(id) = &request.machine_id {
        write_if_other(&root.join("etc/machine-id"), &format!("{id}\n"))?;
    }
    if let Some(name) = &request.hostname {
        if root == Path::new("/") {
            rustix::system::sethostname(name.as_bytes())?;
        }
        write_if_other(&root.join("etc/hostname"), &format!("{name}\n"))?;
        name_in_hosts(&root.join("etc/hosts"), name)?;
    }
    if let Some(servers) = &request.nameservers {
        let lines: String = servers
            .iter()
            .map(|s| format!("nameserver {s}\n"))
            .collect();
        write_if_other(&root.join("etc/resolv.conf"), &lines)?;
    }
    match request.identity() {
        Some(identity) => identity.write(root),
        None => Ok(()),
    }
}

/// Comment behind the line that is ours.
const HOSTS_MARK: &str = "# this machine";

/// So that `sudo` and others find the machine's own name without asking a server.
fn name_in_hosts(path: &Path, name: &str) -> io::Result<()> {
    let old = fs::read_to_string(path).unwrap_or_default();
    let others = old.lines().filter(|line| !line.ends_with(HOSTS_MARK));
    let mut new: String = others.flat_map(|line| [line, "\n"]).collect();
    new.push_str(&format!("127.0.1.1 {name} {HOSTS_MARK}\n"));
    write_if_other(path, &new)
}

/// Flushing blocks for as long as the disk takes.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, HttpError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|lost| Err(io::Error::other(lost)))
        .map_err(failed)
}

fn failed(error: io::Error) -> HttpError {
    HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_over_the_one_before() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir(root.path().join("etc")).expect("a directory");
        fs::write(root.path().join("etc/hosts"), "127.0.0.1 localhost\n").expect("room");
        for id in ["sb-1", "sb-2"] {
            let request = Recover {
                sandbox_id: Some(id.into()),
                template_id: Some("mine".into()),
                hostname: Some(id.into()),
                machine_id: Some("0123".into()),
                nameservers: Some(vec![[10, 0, 0, 1].into()]),
                ..Recover::default()
            };
            write_identity(root.path(), &request).expect("room");
        }
        let read = |path: &str| fs::read_to_string(root.path().join(path)).expect("written");
        assert_eq!(read("run/wrenn/.WRENN_SANDBOX_ID"), "sb-2");
        assert_eq!(read("run/e2b/.E2B_TEMPLATE_ID"), "mine");
        assert_eq!(read("etc/resolv.conf"), "nameserver 10.0.0.1\n");
        assert_eq!(
            read("etc/hosts"),
            format!("127.0.0.1 localhost\n127.0.1.1 sb-2 {HOSTS_MARK}\n")
        );
    }

    #[test]
    fn a_name_with_a_line_break_is_refused() {
        let request = Recover {
            hostname: Some("a\nb".into()),
            ..Recover::default()
        };
        assert!(check(&request).is_err());
        assert!(entropy(Some("!")).is_err() && entropy(Some("")).is_err());
    }
}
