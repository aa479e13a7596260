//! Process of an export: start in the jail, QMP, exit.

use std::{os::fd::OwnedFd, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::Value;
use thiserror_ext::AsReport as _;
use tokio::{io::AsyncReadExt as _, process::ChildStderr, task::JoinHandle, time::timeout};
use wrenn_jail::JailFile;
use wrenn_qmp::{Qmp, QmpError, Subscriber};

use super::nodes::Call;
use crate::{
    DiskError,
    tool::{Identity, MAX_ERRORS, Running, STORAGE_DAEMON as PROGRAM, Work},
};

/// Deadline for the start, and for a command. Opening a chain reads the tables of each layer, and a
/// flush may write much.
const DEADLINE: Duration = Duration::from_secs(60);

/// Grace period for the exit of a program that was killed or has closed its connection.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);

/// Grace period for the last message of a program that has ended.
const MESSAGE_DEADLINE: Duration = Duration::from_millis(500);

/// Exporter. It is killed on drop.
pub(super) struct Daemon {
    running: Running,
    qmp: Qmp<NoEvents>,
    messages: Messages,
}

/// Files, arguments and descriptor of an exporter. Its connection is set at the start.
pub(super) struct Exporter<'a> {
    pub(super) args: Vec<String>,
    pub(super) files: Vec<JailFile>,
    pub(super) layers: &'a [PathBuf],
    /// FUSE connection.
    pub(super) fuse: OwnedFd,
    pub(super) size_mib: u32,
}

impl Daemon {
    /// Starts the exporter and waits until it answers.
    pub(super) async fn start(
        identity: Identity<'_>,
        exporter: Exporter<'_>,
    ) -> Result<Self, DiskError> {
        let (qmp, monitor) = wrenn_qmp::socket_pair().map_err(PROGRAM.not_run())?;
        let work = Work {
            args: exporter.args,
            files: exporter.files,
            layers: exporter.layers.iter().map(PathBuf::as_path).collect(),
            fds: vec![exporter.fuse],
            size_mib: exporter.size_mib,
            stdin: monitor.into(),
            stdout: Stdio::null(),
        };
        let mut running = PROGRAM.start_as(identity, work)?;
        let mut messages = Messages::read(running.take_errors());
        // The reply follows the export, which is among the arguments.
        match Qmp::negotiate(qmp, NoEvents, DEADLINE).await {
            Ok(qmp) => Ok(Self {
                running,
                qmp,
                messages,
            }),
            Err(error) => Err(explain(error, &mut running, &mut messages).await),
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.running.pid()
    }

    /// Executes a QMP command.
    pub(super) async fn call(&mut self, (command, arguments): Call) -> Result<(), DiskError> {
        let mut session = self.qmp.within(command, DEADLINE);
        match session.command(command, arguments).await {
            Ok(_) => Ok(()),
            Err(error) => Err(explain(error, &mut self.running, &mut self.messages).await),
        }
    }

    /// Waits until the exporter ends by itself, and returns how it ended. Cancel safe.
    pub(super) async fn wait(&mut self) -> DiskError {
        ended(&mut self.running, &mut self.messages).await
    }

    /// Executes a last command and ends the exporter: by request, or by force if it takes longer
    /// than `deadline`.
    pub(super) async fn stop(&mut self, last: Call, deadline: Duration) -> Result<(), DiskError> {
        let asked = timeout(deadline, self.end(last)).await;
        let asked = asked.unwrap_or(Err(DiskError::Deadline {
            program: PROGRAM.name,
            deadline,
        }));
        if asked.is_err() {
            kill(&mut self.running).await?;
        }
        asked
    }

    async fn end(&mut self, last: Call) -> Result<(), DiskError> {
        self.call(last).await?;
        // The exporter may exit before its reply is sent. Its exit status counts.
        let _ = self.qmp.command("quit", Value::Null).await;
        let status = self.running.wait().await?;
        match status.success() {
            true => Ok(()),
            false => Err(self.wait().await),
        }
    }
}

/// Ends a program by force. Fails if the program does not end, which is a defect of the kernel.
async fn kill(running: &mut Running) -> Result<(), DiskError> {
    running.kill();
    match timeout(EXIT_DEADLINE, running.wait()).await {
        Ok(ended) => ended.map(drop),
        Err(_) => Err(failure("it was killed, but does not end".to_owned())),
    }
}

/// Converts the error of a call. A closed connection is explained by the end of the program.
async fn explain(error: QmpError, running: &mut Running, messages: &mut Messages) -> DiskError {
    match error {
        QmpError::Command { desc, .. } => failure(desc),
        QmpError::Deadline { deadline, .. } => DiskError::Deadline {
            program: PROGRAM.name,
            deadline,
        },
        QmpError::Closed | QmpError::Io(_) => {
            let ended = timeout(EXIT_DEADLINE, ended(running, messages)).await;
            ended.unwrap_or_else(|_| failure(error.to_report_string()))
        }
        error => failure(error.to_report_string()),
    }
}

/// Waits for the end of a program, and returns how it ended. Cancel safe.
async fn ended(running: &mut Running, messages: &mut Messages) -> DiskError {
    match running.wait().await {
        Ok(status) => failure(format!("it ended ({status}) {}", messages.text().await)),
        Err(error) => error,
    }
}

fn failure(reason: String) -> DiskError {
    DiskError::Failed(PROGRAM.name, reason)
}

/// Messages that a program writes to its standard error. They are read until it ends, so that the
/// pipe never fills up; the first part is kept.
struct Messages {
    kept: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Messages {
    fn read(errors: Option<ChildStderr>) -> Self {
        let kept = Arc::default();
        let reader = tokio::spawn(keep(errors, Arc::clone(&kept)));
        Self { kept, reader }
    }

    /// Returns the messages of a program that has ended.
    async fn text(&mut self) -> String {
        // A finished task must not be awaited again.
        if !self.reader.is_finished() {
            let _ = timeout(MESSAGE_DEADLINE, &mut self.reader).await;
        }
        String::from_utf8_lossy(&self.kept.lock()).trim().to_owned()
    }
}

async fn keep(errors: Option<ChildStderr>, kept: Arc<Mutex<Vec<u8>>>) {
    let Some(mut errors) = errors else {
        return;
    };
    let mut buffer = [0; 256];
    while let Ok(read @ 1..) = errors.read(&mut buffer).await {
        let mut kept = kept.lock();
        let room = MAX_ERRORS.saturating_sub(kept.len()).min(read);
        kept.extend_from_slice(&buffer[..room]);
    }
}

/// Subscriber that needs no events.
struct NoEvents;

impl Subscriber for NoEvents {
    fn on_event(&mut self, _name: &str, _data: &Value) {}
}
