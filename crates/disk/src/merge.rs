//! Merges several read-only layers of a disk into one, in a jail.
//!
//! `qemu-storage-daemon` (QEMU's block layer without a machine; QEMU itself depends on it) copies
//! the content of the layers into a new layer (`block-stream`). It is controlled with QMP over a
//! socket, its standard input.
//!
//! | step                                        | failure                     | left behind    |
//! |---------------------------------------------|-----------------------------|----------------|
//! | 1. the headers of all layers are checked    | `Layer`, names the file     | nothing        |
//! | 2. an empty file is created                 | disk full                   | nothing        |
//! | 3. the program starts in its jail           | `Run`, `Failed`             | nothing        |
//! | 4. the layers are copied                    | bad layer, disk full, time  | nothing        |
//!
//! The program runs under a user ID of its own, without a network. It sees the base image, the
//! layers and the new file, so a layer that exploits a defect of QEMU gains what its own disk
//! holds. If this process dies, the program is killed, and the file is garbage of the caller's
//! directory.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use thiserror_ext::AsReport as _;
use tokio::net::UnixStream;
use wrenn_jail::{BASE_DISK, DISK};
use wrenn_qmp::{Qmp, QmpError, Subscriber};

use crate::{
    DiskError, create,
    tool::{self, STORAGE_DAEMON as PROGRAM, ToolJail, ToolJails, Work},
};

/// Node name of the topmost layer that is not copied.
const KEPT: &str = "kept";
/// Node name of the new layer.
const NEW: &str = "new";

/// Maximum duration of the copy: a few GB at the speed of a slow disk.
const DEADLINE: Duration = Duration::from_secs(600);

/// Layers of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// Raw image below all layers.
    pub base: &'a Path,
    /// Layers that stay, lowest first.
    pub kept: &'a [PathBuf],
    /// Layers on top of these that are merged, lowest first.
    pub merged: &'a [PathBuf],
    /// Size of the disk, in MiB.
    pub size_mib: u32,
}

impl<'a> Layers<'a> {
    /// Returns all layers, lowest first.
    fn all(self) -> impl Iterator<Item = &'a Path> {
        let all = self.kept.iter().chain(self.merged);
        all.map(PathBuf::as_path)
    }
}

/// Creates a layer at `path` on top of `layers.kept` with the content of all layers in
/// `layers.merged`. No input file is changed. On failure, no file is left.
///
/// # Errors
/// See [`DiskError`].
pub async fn merge(jails: &ToolJails, layers: Layers<'_>, path: &Path) -> Result<(), DiskError> {
    tool::check(layers.all(), layers.size_mib)?;
    let jail = jails.claim().await;
    create(path, layers.size_mib, jail.uid()).await?;
    let streamed = tokio::time::timeout(DEADLINE, stream(&jail, layers, path)).await;
    let streamed = streamed.unwrap_or(Err(DiskError::Deadline {
        program: PROGRAM.name,
        deadline: DEADLINE,
    }));
    if streamed.is_err() {
        // Best effort: the caller removes the directory as well.
        let _ = std::fs::remove_file(path);
    }
    streamed
}

/// Returns the disk as a tree of block nodes, with the paths in the jail. The tree overrides the
/// backing files named in the qcow2 headers.
fn tree(layers: Layers<'_>) -> Value {
    // As in a VM, files that never change are not locked.
    let file = |path: &str| json!({ "driver": "file", "filename": path, "locking": "off" });
    let base = json!({ "driver": "raw", "read-only": true, "file": file(BASE_DISK) });
    let read_only = |below: Value, number: usize| {
        let path = tool::layer_path(number);
        json!({ "driver": "qcow2", "read-only": true, "file": file(&path), "backing": below })
    };
    let kept = layers.kept.len();
    let mut below = (0..kept).fold(base, read_only);
    below["node-name"] = json!(KEPT);
    let below = (kept..kept + layers.merged.len()).fold(below, read_only);
    json!({ "driver": "qcow2", "node-name": NEW, "file": file(DISK), "backing": below })
}

async fn stream(jail: &ToolJail<'_>, layers: Layers<'_>, path: &Path) -> Result<(), DiskError> {
    let (qmp, monitor) = wrenn_qmp::socket_pair().map_err(PROGRAM.not_run())?;
    let mut args = tool::MONITOR_ARGS.map(str::to_owned).to_vec();
    args.extend(["--blockdev".to_owned(), tree(layers).to_string()]);
    let work = Work {
        args,
        files: vec![
            tool::file(layers.base, BASE_DISK, false),
            tool::file(path, DISK, true),
        ],
        layers: layers.all().collect(),
        fds: Vec::new(),
        size_mib: layers.size_mib,
        stdin: monitor.into(),
        stdout: Stdio::null(),
    };
    let mut running = PROGRAM.start(jail, work)?;
    let done = run_job(qmp).await;
    if done.is_err() {
        // The program waits for more commands, unless it has exited.
        running.kill();
    }
    let (_, ended) = running.output().await?;
    match (done, ended) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(reason), ended) => {
            let printed = ended.err().unwrap_or_default();
            Err(DiskError::Failed(
                PROGRAM.name,
                format!("{reason} {printed}"),
            ))
        }
        (Ok(()), Err(printed)) => Err(DiskError::Failed(PROGRAM.name, printed)),
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
