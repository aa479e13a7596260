//! Merges several read-only layers of a disk into one.
//!
//! `qemu-storage-daemon` (QEMU's block layer without a machine; QEMU itself depends on it) copies
//! the content of the layers into a new layer (`block-stream`). It is controlled with QMP over a
//! socket, its standard input.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use thiserror_ext::AsReport as _;
use tokio::{io::AsyncReadExt as _, net::UnixStream, process::Command};
use wrenn_jail::BASE_DISK;
use wrenn_qmp::{Qmp, QmpError, Subscriber};

use super::{DiskError, create_at};

const PROGRAM: &str = "qemu-storage-daemon";

/// Node name of the topmost layer that is not copied.
const KEPT: &str = "kept";
/// Node name of the new layer.
const NEW: &str = "new";

/// Maximum duration of the copy: a few GB at the speed of a slow disk.
const DEADLINE: Duration = Duration::from_secs(600);

/// Creates a layer at `path` on top of `kept` with the content of all layers in `merged`.
///
/// `kept` is based on `base`; both lists start with the lowest layer. No input file is changed. On
/// failure, no file is left.
pub(crate) async fn merge(
    base: &Path,
    kept: &[PathBuf],
    merged: &[PathBuf],
    size_mib: u32,
    path: &Path,
) -> Result<(), DiskError> {
    create_at(path, size_mib, 0).await?;
    let tree = tree(base, kept, merged, path);
    let streamed = tokio::time::timeout(DEADLINE, stream(&tree)).await;
    let streamed = streamed.unwrap_or(Err(DiskError::Deadline {
        program: PROGRAM,
        deadline: DEADLINE,
    }));
    if streamed.is_err() {
        // Best effort: the caller removes the directory as well.
        let _ = std::fs::remove_file(path);
    }
    streamed
}

/// Returns the disk as a tree of block nodes. The tree overrides the backing files named in the
/// qcow2 headers.
fn tree(base: &Path, kept: &[PathBuf], merged: &[PathBuf], path: &Path) -> Value {
    let file = |path: &Path| json!({ "driver": "file", "filename": path });
    let read_only = |below: Value, layer: &PathBuf| json!({ "driver": "qcow2", "read-only": true, "file": file(layer), "backing": below });
    let base = json!({ "driver": "raw", "read-only": true, "file": file(base) });
    let mut below = kept.iter().fold(base, read_only);
    below["node-name"] = json!(KEPT);
    let below = merged.iter().fold(below, read_only);
    json!({ "driver": "qcow2", "node-name": NEW, "file": file(path), "backing": below })
}

async fn stream(tree: &Value) -> Result<(), DiskError> {
    let run = |source| DiskError::Run {
        program: PROGRAM,
        package: "qemu-system-common",
        source,
    };
    let (qmp, inherited) = wrenn_qmp::socket_pair().map_err(run)?;
    let mut child = Command::new(PROGRAM)
        .args(["--chardev", "socket,id=qmp,fd=0"])
        .args(["--monitor", "chardev=qmp"])
        .arg("--blockdev")
        .arg(tree.to_string())
        .stdin(inherited)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(run)?;
    let Some(stderr) = child.stderr.take() else {
        return Err(DiskError::Failed(
            PROGRAM,
            "its standard error is missing".into(),
        ));
    };
    let done = run_job(qmp).await;
    if done.is_err() {
        // The program waits for more commands, unless it has exited.
        let _ = child.start_kill();
    }
    let mut output = String::new();
    let mut stderr = stderr.take(1000);
    let (ended, _) = tokio::join!(child.wait(), stderr.read_to_string(&mut output));
    match (done, ended) {
        (Ok(()), Ok(status)) if status.success() => Ok(()),
        (Err(reason), _) => Err(DiskError::Failed(
            PROGRAM,
            format!("{reason} {}", output.trim()),
        )),
        _ => Err(DiskError::Failed(PROGRAM, output.trim().to_owned())),
    }
}

/// Copies the layers and has the program exit.
async fn run_job(stream: UnixStream) -> Result<(), String> {
    let mut qmp = Qmp::negotiate(stream, Job::default(), DEADLINE)
        .await
        .map_err(reason)?;
    let job =
        json!({ "job-id": "merge", "device": NEW, "base-node": KEPT, "backing-file": BASE_DISK });
    let mut session = qmp.within("merge disk layers", DEADLINE);
    session.command("block-stream", job).await.map_err(reason)?;
    session
        .wait_for(|job| job.outcome.clone())
        .await
        .map_err(reason)??;
    // The program may exit before its reply is sent. Its exit status counts.
    let _ = session.command("quit", Value::Null).await;
    Ok(())
}

fn reason(error: QmpError) -> String {
    match error {
        QmpError::Command { desc, .. } => desc,
        QmpError::Closed => "it exited before the job completed.".to_owned(),
        error => error.to_report_string(),
    }
}

/// State of the job, as reported by its events.
#[derive(Debug, Default)]
struct Job {
    /// `None` while the job runs; otherwise its success, or the reason for its failure.
    outcome: Option<Result<(), String>>,
}

impl Subscriber for Job {
    fn on_event(&mut self, name: &str, data: &Value) {
        // Follows every `BLOCK_JOB_ERROR`, which does not contain the reason.
        if name == "BLOCK_JOB_COMPLETED" {
            let failure = data["error"].as_str();
            self.outcome = Some(failure.map_or(Ok(()), |reason| Err(reason.to_owned())));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Runs `qemu-io` commands on a disk made of the base and `layers`.
    async fn io(dir: &Path, layers: &[PathBuf], commands: &[&str]) -> String {
        let file = |path: &Path| json!({ "driver": "file", "filename": path });
        let mut tree =
            json!({ "driver": "raw", "read-only": true, "file": file(&dir.join("base")) });
        for layer in layers {
            tree = json!({ "driver": "qcow2", "file": file(layer), "backing": tree });
        }
        let mut command = Command::new("qemu-io");
        for text in commands {
            command.args(["-c", text]);
        }
        let done = command.arg(format!("json:{tree}")).output().await.unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// Creates three layers: data of their own, data that hides a lower layer's, and zeros over the
    /// base.
    async fn layers(dir: &Path) -> Vec<PathBuf> {
        std::fs::write(dir.join("base"), vec![1; 8 * MIB]).unwrap();
        let mut layers = Vec::new();
        for (name, writes) in [
            ("first", vec!["write -P 2 0 1M", "write -P 2 1M 1M"]),
            ("second", vec!["write -P 3 1M 1M", "write -z 2M 1M"]),
            ("third", vec!["write -P 4 3M 64k"]),
        ] {
            let path = dir.join(name);
            create_at(&path, 8, 0).await.unwrap();
            layers.push(path);
            io(dir, &layers, &writes).await;
        }
        layers
    }

    const CONTENT: [&str; 6] = [
        "read -P 2 0 1M",
        "read -P 3 1M 1M",
        "read -P 0 2M 1M",
        "read -P 4 3M 64k",
        "read -P 1 3136k 960k",
        "read -P 1 4M 4M",
    ];

    #[tokio::test]
    async fn merged_disk_has_the_same_content_and_keeps_its_layers() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let layers = layers(dir).await;
        let before: Vec<_> = layers.iter().map(|l| std::fs::read(l).unwrap()).collect();
        for keep in [0, 1] {
            let new = dir.join(format!("keeps-{keep}"));
            let (kept, merged) = layers.split_at(keep);
            merge(&dir.join("base"), kept, merged, 8, &new)
                .await
                .unwrap();
            let mut now = kept.to_vec();
            now.push(new);
            let read = io(dir, &now, &CONTENT).await;
            assert!(!read.contains("verification failed"), "{keep}: {read}");
        }
        let after: Vec<_> = layers.iter().map(|l| std::fs::read(l).unwrap()).collect();
        assert!(before == after);
    }

    #[tokio::test]
    async fn invalid_layer_is_named_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let layers = layers(dir).await;
        std::fs::write(&layers[1], "no layer").unwrap();
        let new = dir.join("new");
        let error = merge(&dir.join("base"), &[], &layers, 8, &new).await;
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("second") || error.contains("qcow2"),
            "{error}"
        );
        assert!(!new.exists());
    }

    #[tokio::test]
    async fn a_copy_to_a_full_disk_fails_at_once_with_the_reason() {
        crate::private_host::enter();
        let dir = tempfile::tempdir().unwrap();
        let layers = layers(dir.path()).await;
        let small = dir.path().join("small");
        std::fs::create_dir(&small).unwrap();
        nix::mount::mount(
            Some("tmpfs"),
            &small,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=1m"),
        )
        .unwrap();
        let new = small.join("new");
        let base = dir.path().join("base");
        let merged = merge(&base, &[], &layers, 8, &new);
        let merged = tokio::time::timeout(Duration::from_secs(30), merged).await;
        let error = merged.unwrap().unwrap_err();
        assert!(error.is_out_of_space(), "{error:?}");
        assert!(!new.exists());
    }
}
