//! Merges several read-only layers of a disk into one.
//!
//! `qemu-storage-daemon` (QEMU's block layer without a machine; QEMU itself depends on it) copies
//! the content of the layers into a new layer (`block-stream`). It is controlled with QMP over
//! standard input and output.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{ChildStdin, ChildStdout, Command},
};

use super::{BASE_INSIDE_JAIL, DiskError, create_at};

const PROGRAM: &str = "qemu-storage-daemon";

/// Node name of the topmost layer that is not copied.
const KEPT: &str = "kept";
/// Node name of the new layer.
const NEW: &str = "new";

/// Maximum duration of the copy: a few GB at the speed of a slow disk.
const DEADLINE: Duration = Duration::from_secs(600);

/// Maximum length of a QMP line, in bytes.
const MAX_LINE_BYTES: u64 = 1 << 20;

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
    let frozen = |below: Value, layer: &PathBuf| json!({ "driver": "qcow2", "read-only": true, "file": file(layer), "backing": below });
    let base = json!({ "driver": "raw", "read-only": true, "file": file(base) });
    let mut below = kept.iter().fold(base, frozen);
    below["node-name"] = json!(KEPT);
    let below = merged.iter().fold(below, frozen);
    json!({ "driver": "qcow2", "node-name": NEW, "file": file(path), "backing": below })
}

async fn stream(tree: &Value) -> Result<(), DiskError> {
    let mut child = Command::new(PROGRAM)
        .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
        .arg("--blockdev")
        .arg(tree.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| DiskError::Run {
            program: PROGRAM,
            package: "qemu-system-common",
            source,
        })?;
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(DiskError::Failed(
            PROGRAM,
            "its standard streams are missing".into(),
        ));
    };
    let mut qmp = Qmp {
        stdin,
        lines: BufReader::new(stdout.take(MAX_LINE_BYTES)).lines(),
    };
    let done = qmp.stream().await;
    let mut said = String::new();
    let mut stderr = stderr.take(1000);
    let (ended, _) = tokio::join!(child.wait(), stderr.read_to_string(&mut said));
    match (done, ended) {
        (Ok(()), Ok(status)) if status.success() => Ok(()),
        (Err(reason), _) => Err(DiskError::Failed(
            PROGRAM,
            format!("{reason} {}", said.trim()),
        )),
        _ => Err(DiskError::Failed(PROGRAM, said.trim().to_owned())),
    }
}

struct Qmp {
    stdin: ChildStdin,
    lines: Lines<BufReader<tokio::io::Take<ChildStdout>>>,
}

impl Qmp {
    async fn stream(&mut self) -> Result<(), String> {
        self.say(json!({ "execute": "qmp_capabilities" })).await?;
        let job = json!({ "job-id": "merge", "device": NEW, "base-node": KEPT, "backing-file": BASE_INSIDE_JAIL });
        self.say(json!({ "execute": "block-stream", "arguments": job }))
            .await?;
        self.completed().await?;
        self.say(json!({ "execute": "quit" })).await
    }

    async fn say(&mut self, command: Value) -> Result<(), String> {
        let text = format!("{command}\n");
        let said = self.stdin.write_all(text.as_bytes()).await;
        said.map_err(|error| error.to_string())
    }

    /// Reads events until the job has completed.
    async fn completed(&mut self) -> Result<(), String> {
        loop {
            let line = self.lines.next_line().await;
            let line = line.map_err(|error| error.to_string())?;
            let line = line.ok_or("it exited before the job completed.")?;
            let Ok(said) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            if let Some(reason) = failure(&said) {
                return Err(reason);
            }
            if said["event"] == "BLOCK_JOB_COMPLETED" {
                return Ok(());
            }
        }
    }
}

/// Returns the reason why the job failed, if this response or event reports one.
fn failure(said: &Value) -> Option<String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match said["event"].as_str() {
        Some("BLOCK_JOB_COMPLETED") => text(&said["data"]["error"]),
        Some("BLOCK_JOB_ERROR") => Some(format!("{} failed", said["data"]["operation"])),
        _ => text(&said["error"]["desc"]),
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
    async fn a_merged_disk_reads_as_before_and_its_layers_are_as_they_were() {
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
    async fn a_layer_that_is_none_is_named_and_leaves_no_file() {
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
}
