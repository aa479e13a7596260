//! Routes `/snapshot/prepare` and `/snapshot/recover`, which the host calls before and after a
//! snapshot.
//!
//! `prepare` makes the snapshot small and consistent. It writes the page cache to the disk, drops
//! the cache if it has grown ([`crate::page_cache`]), and returns unused memory of envd to the
//! kernel. Unless the guest keeps running afterwards, it also closes idle connections, closes
//! forwarded ports and their connections, and stops background work. A preparation belongs to one
//! snapshot. Only `/snapshot/recover` ends it.
//!
//! `recover` has two forms. Without `sandboxId`, the guest continues as the same sandbox: the vCPUs
//! were resumed after the snapshot, or no snapshot was taken. The guest gets fresh randomness,
//! because another sandbox may be restored from the same snapshot. With `sandboxId`, the guest was
//! restored, perhaps as another sandbox. Before the response, the guest gets its own randomness,
//! names, environment and token, the connections from before the snapshot are cut, and the
//! generation ID changes, by which programs notice that they may run in a copy (`docs/copies.md`).
//! Both forms start port forwarding again.

use std::{fs, io, path::Path, time::Duration};

use axum::{Json, extract::State};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::StatusCode;
use serde::Deserialize;

use crate::{
    app::App,
    clock,
    http_error::HttpError,
    identity::{is_word, write_if_other},
    settings::Recover,
};

/// Delay of the first metadata request of a restored guest. `/snapshot/recover` has provided the
/// same values already.
const METADATA_DELAY: Duration = Duration::from_secs(2);

/// File with the generation ID, relative to the root: one line, another one after each restore.
const GENERATION_ID: &str = "run/wrenn/generation-id";

/// Body of `/snapshot/prepare`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prepare {
    /// Id of the snapshot that will be taken.
    pub snapshot_id: String,
    /// Keeps the page cache. The snapshot becomes larger, and sandboxes restored from it start
    /// faster.
    #[serde(default)]
    pub keep_cache: bool,
    /// The guest keeps running after the snapshot, so its connections must stay.
    #[serde(default)]
    pub keeps_running: bool,
}

/// `POST /snapshot/prepare`. May be called twice.
///
/// # Errors
/// 400 without a snapshot id, 500 if the kernel rejects an operation.
pub async fn prepare(
    State(app): State<App>,
    Json(request): Json<Prepare>,
) -> Result<StatusCode, HttpError> {
    if request.snapshot_id.is_empty() {
        return Err(HttpError::bad_request("`snapshotId` must not be empty"));
    }
    tracing::info!(
        snapshot_id = request.snapshot_id,
        "preparing for a snapshot"
    );
    if request.keeps_running {
        // A guest that is restored from the snapshot cuts them.
        app.connections.freeze();
    } else {
        app.connections.drain();
        // The host has drained its calls before this. Connections that are still open would be dead
        // after the snapshot.
        app.ports.stop().await;
        app.mmds.stop();
    }
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
/// 400 if a field is invalid, 500 if the kernel rejects the random bytes or a file cannot be
/// written.
pub async fn recover(
    State(app): State<App>,
    Json(request): Json<Recover>,
) -> Result<StatusCode, HttpError> {
    let entropy = entropy(request.entropy.as_deref())?;
    let restored = request.sandbox_id.is_some();
    check(&request)?;
    if restored {
        app.mmds.forget();
        // Needed if the sandbox kept running after the snapshot, or was not prepared: the forwarded
        // ports belong to the past.
        app.ports.stop().await;
    }
    // Not on a separate thread, although some steps may block. The host waits for this call only,
    // other clients do not know the sandbox yet, and starting a thread takes time, too.
    if let Some(entropy) = entropy {
        wrenn_sys::random::reseed(&entropy).map_err(failed)?;
    }
    if restored {
        renew_generation(Path::new("/")).map_err(failed)?;
    }
    if restored && let Err(error) = clock::step_to_gateway() {
        tracing::info!(%error, "failed to step the clock, leaving it to chronyd");
    }
    write_identity(Path::new("/"), &request).map_err(failed)?;
    if let Some(mtu) = request.mtu
        && let Err(error) = set_mtu(Path::new(MTU), mtu)
    {
        tracing::warn!(%error, mtu, "failed to set the MTU of the guest's link");
    }
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
        .map_err(|e| HttpError::bad_request(format!("invalid `entropy`: {e}")))?;
    let most = wrenn_sys::random::MAX_ENTROPY_BYTES;
    if bytes.is_empty() || bytes.len() > most {
        let got = bytes.len();
        return Err(HttpError::bad_request(format!(
            "`entropy` has {got} bytes, expected 1 to {most}"
        )));
    }
    Ok(Some(bytes))
}

/// Writes a new generation ID. `root` is `/`, except in tests.
///
/// The kernel chooses the ID. Its generator must have been reseeded, because copies that draw from
/// the same state would get the same ID. The file is overwritten in place, so that programs may
/// keep it open or mapped.
fn renew_generation(root: &Path) -> io::Result<()> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let path = root.join(GENERATION_ID);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    write_if_other(&path, &id)
}

/// Checks that the names can be lines of files.
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
                "invalid `{field}`: expected at most 64 letters, digits, `-`, `.` and `_`"
            )));
        }
    }
    Ok(())
}

/// Writes the guest's identity to the files where programs look for it. `root` is `/`, except in
/// tests.
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

/// MTU of the guest's only link.
const MTU: &str = "/sys/class/net/eth0/mtu";

/// Comment that marks the line of `/etc/hosts` that envd owns.
const HOSTS_MARK: &str = "# this machine";

/// Adds the guest's own name to a hosts file, so that `sudo` and other programs resolve the name
/// without a nameserver.
fn name_in_hosts(path: &Path, name: &str) -> io::Result<()> {
    let old = fs::read_to_string(path).unwrap_or_default();
    let others = old.lines().filter(|line| !line.ends_with(HOSTS_MARK));
    let mut new: String = others.flat_map(|line| [line, "\n"]).collect();
    new.push_str(&format!("127.0.1.1 {name} {HOSTS_MARK}\n"));
    write_if_other(path, &new)
}

/// Sets the MTU of the guest's link, unless it has this value. Packets that are too large for the
/// host's network would be rejected one by one, and lost if a firewall blocks the rejections.
fn set_mtu(setting: &Path, mtu: u32) -> io::Result<()> {
    let current = fs::read_to_string(setting)?;
    if current.trim() == mtu.to_string() {
        return Ok(());
    }
    fs::write(setting, mtu.to_string())
}

/// Runs work on a separate thread, because flushing blocks for as long as the disk takes.
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
    fn the_mtu_is_written_if_it_differs() {
        let root = tempfile::tempdir().expect("a directory");
        let setting = root.path().join("mtu");
        assert!(set_mtu(&setting, 1400).is_err(), "no such link");
        fs::write(&setting, "1500\n").expect("room");
        set_mtu(&setting, 1500).expect("nothing to write");
        assert_eq!(fs::read_to_string(&setting).expect("read"), "1500\n");
        set_mtu(&setting, 1400).expect("written");
        assert_eq!(fs::read_to_string(&setting).expect("read"), "1400");
    }

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
    fn each_generation_has_another_id_in_the_same_file() {
        use std::os::unix::fs::MetadataExt as _;
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join(GENERATION_ID);
        let mut seen = Vec::new();
        for _ in 0..3 {
            renew_generation(root.path()).expect("room");
            let id = fs::read_to_string(&path).expect("written");
            assert_eq!((id.len(), id.lines().count()), (37, 1), "{id}");
            seen.push((id, fs::metadata(&path).expect("there").ino()));
        }
        assert!(seen[0].0 != seen[1].0 && seen[1].0 != seen[2].0);
        assert!(seen.iter().all(|(_, inode)| *inode == seen[0].1));
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
