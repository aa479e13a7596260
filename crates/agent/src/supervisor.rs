//! Agent's side of a supervisor: starts it, observes its exit, sends requests, ends it.
//!
//! A supervisor outlives the agent, so nothing here ties it to this process. It leads its own
//! session, and dropping a [`Supervisor`] leaves it running. The agent holds one connection to it,
//! the lifeline, which ends when the supervisor's process ends, for any reason.

use std::{
    fs,
    io::{self, IoSliceMut},
    mem::ManuallyDrop,
    os::{
        fd::{AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncBufReadExt as _,
    process::{Child, Command},
};
use tokio_seqpacket::{UnixSeqpacket, ancillary::OwnedAncillaryMessage};
use wrenn_proto::supervise::{
    MAX_MESSAGE_BYTES, MachineStatus, RejectionCode, Reply, Request, SnapshotReport, files,
};

use crate::sandbox_dir::SandboxDir;

/// Deadline of a request that does not pause or resume the VM.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum time for a snapshot in progress to end. Longer than any caller waits for a snapshot, to
/// allow for a slow disk.
const SETTLE_DEADLINE: Duration = Duration::from_secs(600);

/// Interval at which the end of a snapshot is checked.
const SETTLE_POLL: Duration = Duration::from_millis(50);

/// Maximum time for a VM to resume.
const RESUME_DEADLINE: Duration = Duration::from_secs(30);

/// Buffer size for the file descriptor that comes with an answer, in bytes.
const ANCILLARY_BYTES: usize = 128;

/// Maximum time to connect to a supervisor. A supervisor that hangs is connected to all the same,
/// unless very many connections wait already.
const ATTACH_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum time for a killed process to disappear.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Reason shown to the user if a supervisor left no final status.
const KILLED: &str =
    "the supervisor process ended unexpectedly (killed, host out of memory, or host restarted)";

/// Credentials of the object store, as AWS's own tools name them.
const OBJECT_STORE_VARIABLES: [&str; 9] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];

/// Reason shown to the user if a supervisor was stopped by someone other than the agent.
const STOPPED: &str =
    "the virtual machine was stopped on the host, not by a request to destroy the sandbox";

/// Failure to start a supervisor or to communicate with one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SupervisorError {
    /// A system call failed.
    #[error("failed to {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The supervisor ended before its VM ran.
    #[error("{0}")]
    Ended(String),
    /// The supervisor did not report a running VM in time.
    #[error("the virtual machine did not start within {0:?}")]
    NotReady(Duration),
    /// The supervisor did not answer.
    #[error("the supervisor did not answer within {0:?}")]
    Silent(Duration),
    /// The supervisor's answer is invalid.
    #[error("invalid answer from the supervisor")]
    Malformed,
    /// The supervisor rejected the request. The text is the supervisor's.
    #[error("{reason}")]
    Rejected { reason: String, code: RejectionCode },
    /// The supervisor cannot be killed.
    #[error("the supervisor (pid {pid}) still exists {KILL_DEADLINE:?} after SIGKILL")]
    Unkillable { pid: i32 },
}

impl SupervisorError {
    /// Returns the error for a supervisor that could not be connected to, and may be running.
    pub(crate) fn unreachable(source: io::Error) -> Self {
        let step = "determine whether the sandbox's supervisor is alive";
        Self::Io { step, source }
    }

    /// True if the supervisor exists, and does not take a connection or does not answer.
    pub(crate) fn is_silence(&self) -> bool {
        use io::ErrorKind::{TimedOut, WouldBlock};
        match self {
            Self::Silent(_) => true,
            Self::Io { source, .. } => matches!(source.kind(), TimedOut | WouldBlock),
            _ => false,
        }
    }

    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => crate::host::is_out_of_space(source),
            Self::Rejected { code, .. } => *code == RejectionCode::OutOfSpace,
            _ => false,
        }
    }
}

/// Supervisor that was running when it was last seen.
#[derive(Debug)]
pub(crate) struct Supervisor {
    sandbox_dir: PathBuf,
    lifeline: UnixSeqpacket,
    pid: Pid,
}

impl Supervisor {
    /// Starts the supervisor of a directory that has its `spec.json`, and waits until its VM runs.
    /// `memory` is the snapshot's memory file if the VM is restored. `is_remote` is true if a part of
    /// the snapshot is in an object store.
    ///
    /// If this fails, or if its future is dropped, the supervisor is killed.
    pub(crate) async fn start(
        exe: &Path,
        sandbox_dir: &SandboxDir,
        memory: Option<BorrowedFd<'_>>,
        is_remote: bool,
        deadline: Duration,
    ) -> Result<Self, SupervisorError> {
        let mut child = spawn(exe, sandbox_dir.path(), memory, is_remote)?;
        let started = async {
            wait_until_ready(&mut child).await?;
            Self::attach(sandbox_dir.path())
                .await
                .map_err(supervisor_failed("connect to the supervisor"))
        };
        let started = tokio::time::timeout(deadline, started)
            .await
            .unwrap_or(Err(SupervisorError::NotReady(deadline)));
        match started {
            Ok(supervisor) => {
                tokio::spawn(reap(ManuallyDrop::new(child)));
                Ok(supervisor)
            }
            Err(error) => {
                let ended = matches!(error, SupervisorError::Ended(_));
                // Waits as well: when this returns, the VMM has received its parent-death signal. A
                // process that does not end is found by its socket later.
                let _ = tokio::time::timeout(KILL_DEADLINE, child.kill()).await;
                if ended {
                    return Err(SupervisorError::Ended(final_reason(sandbox_dir)));
                }
                Err(error)
            }
        }
    }

    /// Connects to the supervisor of a directory.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` if no supervisor is running.
    pub(crate) async fn attach(sandbox_dir: &Path) -> io::Result<Self> {
        let lifeline = tokio::time::timeout(ATTACH_DEADLINE, connect(sandbox_dir)).await??;
        let pid = lifeline
            .peer_cred()?
            .pid()
            .ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self {
            sandbox_dir: sandbox_dir.to_owned(),
            lifeline,
            pid: Pid::from_raw(pid),
        })
    }

    /// Waits until the supervisor's process is gone. Cancel safe.
    pub(crate) async fn gone(&self) {
        let mut buffer = [0; 64];
        // The supervisor sends nothing on the lifeline. Anything but its end is ignored.
        while let Ok(info) = self.lifeline.recv(&mut buffer).await {
            if info.bytes_read() == 0 {
                return;
            }
        }
    }

    /// Returns the status of the VM.
    pub(crate) async fn status(&self) -> Result<MachineStatus, SupervisorError> {
        match self.ask(Request::Status, STATUS_DEADLINE).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(SupervisorError::Malformed),
        }
    }

    /// Returns the status of the VM once no snapshot is in progress. A supervisor that does not
    /// answer is asked again, because it may be busy. A supervisor that is gone does not accept a
    /// connection.
    pub(crate) async fn settled(&self) -> Result<MachineStatus, SupervisorError> {
        let settled = async {
            loop {
                match self.status().await {
                    Ok(status) if !status.snapshotting => return Ok(status),
                    Ok(_) | Err(SupervisorError::Silent(_)) => {}
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(SETTLE_POLL).await;
            }
        };
        tokio::time::timeout(SETTLE_DEADLINE, settled)
            .await
            .unwrap_or(Err(SupervisorError::Silent(SETTLE_DEADLINE)))
    }

    /// Pauses the virtual CPUs and has the VM written to `staging`. On failure, the VM keeps
    /// running.
    pub(crate) async fn snapshot(
        &self,
        staging: &Path,
        build: &str,
        next_disk: Option<&Path>,
        deadline: Duration,
    ) -> Result<SnapshotReport, SupervisorError> {
        let request = Request::Snapshot {
            staging: staging.to_owned(),
            build: build.to_owned(),
            next_disk: next_disk.map(Path::to_owned),
        };
        match self.ask(request, deadline).await? {
            Reply::SnapshotTaken(machine) => Ok(machine),
            other => Err(unexpected(other)),
        }
    }

    /// Resumes a paused VM. Succeeds if the VM is running.
    pub(crate) async fn resume(&self) -> Result<(), SupervisorError> {
        match self.ask(Request::Resume, RESUME_DEADLINE).await? {
            Reply::Resumed => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Reports to the supervisor whether its last snapshot was published.
    pub(crate) async fn note_published(
        &self,
        published: bool,
        memory: &Path,
    ) -> Result<(), SupervisorError> {
        let request = Request::Published {
            published,
            memory: memory.to_owned(),
        };
        match self.ask(request, STATUS_DEADLINE).await? {
            Reply::Noted => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Returns the memory file of the snapshot that the VM was restored from. `None` if the VM was
    /// booted.
    pub(crate) async fn image_memory(&self) -> Result<Option<OwnedFd>, SupervisorError> {
        let exchange = self.exchange(&Request::ImageMemory);
        let (reply, fd) = tokio::time::timeout(STATUS_DEADLINE, exchange)
            .await
            .map_err(|_| SupervisorError::Silent(STATUS_DEADLINE))??;
        match reply {
            Reply::ImageMemory => Ok(fd),
            _ => Ok(None),
        }
    }

    /// Ends the VM and the supervisor: first by a request, then by SIGKILL. Succeeds if they are
    /// gone already.
    pub(crate) async fn stop(&self, deadline: Duration) -> Result<(), SupervisorError> {
        let asked = async {
            self.ask(Request::Stop, deadline).await?;
            self.gone().await;
            Ok::<_, SupervisorError>(())
        };
        let stopped = tokio::select! {
            stopped = tokio::time::timeout(deadline, asked) => {
                stopped.is_ok_and(|asked| asked.is_ok())
            }
            () = self.gone() => true,
        };
        if stopped {
            return Ok(());
        }
        tracing::warn!(pid = %self.pid, "supervisor did not stop on request, killing it");
        // While the lifeline is open, the process exists, so its process ID was not reused.
        let _ = kill(self.pid, Signal::SIGKILL);
        tokio::time::timeout(KILL_DEADLINE, self.gone())
            .await
            .map_err(|_| SupervisorError::Unkillable {
                pid: self.pid.as_raw(),
            })
    }

    async fn ask(&self, request: Request, deadline: Duration) -> Result<Reply, SupervisorError> {
        let exchange = self.exchange(&request);
        let (reply, _) = tokio::time::timeout(deadline, exchange)
            .await
            .map_err(|_| SupervisorError::Silent(deadline))??;
        Ok(reply)
    }

    /// Sends one request on a separate connection, so that the answer to an earlier request cannot
    /// be mistaken for its answer.
    async fn exchange(
        &self,
        request: &Request,
    ) -> Result<(Reply, Option<OwnedFd>), SupervisorError> {
        let io = supervisor_failed("send a request to the supervisor");
        let request = serde_json::to_vec(request).map_err(|_| SupervisorError::Malformed)?;
        let exchange = async {
            let connection = connect(&self.sandbox_dir).await?;
            connection.send(&request).await?;
            let mut packet = vec![0; MAX_MESSAGE_BYTES];
            let mut control = [0; ANCILLARY_BYTES];
            let (info, ancillary) = connection
                .recv_vectored_with_ancillary(&mut [IoSliceMut::new(&mut packet)], &mut control)
                .await?;
            let length = info.bytes_read();
            let fd = ancillary.into_messages().find_map(|message| match message {
                OwnedAncillaryMessage::FileDescriptors(mut fds) => fds.next(),
                _ => None,
            });
            packet.truncate(length);
            Ok((packet, fd))
        };
        let (packet, fd) = exchange.await.map_err(io)?;
        let reply = serde_json::from_slice(&packet).map_err(|_| SupervisorError::Malformed)?;
        Ok((reply, fd))
    }
}

/// True if a connection failed because no supervisor is running, and not because this process lacks
/// a resource.
pub(crate) fn is_no_supervisor(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound | Kind::ConnectionRefused | Kind::ConnectionReset | Kind::NotConnected
    )
}

fn unexpected(reply: Reply) -> SupervisorError {
    match reply {
        Reply::Rejected { reason, code } => {
            let code = code.unwrap_or_else(|| code_of_text(&reason));
            SupervisorError::Rejected { reason, code }
        }
        _ => SupervisorError::Malformed,
    }
}

/// Returns the code for a reply that has a reason and no code. Supervisors that were started by
/// version 0.1.0 send no code. Their reasons contain the text of QEMU or of the C library.
fn code_of_text(reason: &str) -> RejectionCode {
    match wrenn_qmp::is_out_of_space(reason) {
        true => RejectionCode::OutOfSpace,
        false => RejectionCode::Other,
    }
}

/// Returns the reason, for the user, why the supervisor of this directory is gone.
pub(crate) fn final_reason(sandbox_dir: &SandboxDir) -> String {
    match sandbox_dir.read_final_status() {
        Some(status) if status.requested => STOPPED.to_owned(),
        Some(status) if !status.reason.is_empty() => status.reason,
        _ => KILLED.to_owned(),
    }
}

/// Connects to the socket in a directory. A socket address holds 108 bytes, and the path of the
/// directory may be longer, so the directory is addressed through a file descriptor.
async fn connect(sandbox_dir: &Path) -> io::Result<UnixSeqpacket> {
    let directory = fs::File::open(sandbox_dir)?;
    let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), files::SOCKET);
    UnixSeqpacket::connect(path).await
}

fn spawn(
    exe: &Path,
    sandbox_dir: &Path,
    memory: Option<BorrowedFd<'_>>,
    is_remote: bool,
) -> Result<Child, SupervisorError> {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(sandbox_dir.join(files::LOG))
        .map_err(supervisor_failed("open the supervisor's log"))?;
    let mut command = Command::new(exe);
    let mut passed = vec!["PATH", "RUST_LOG", wrenn_sys::failpoint::VARIABLE];
    if is_remote {
        passed.extend(OBJECT_STORE_VARIABLES);
    }
    command
        .arg("supervise")
        .arg("--dir")
        .arg(sandbox_dir)
        // The agent's environment holds keys that a supervisor must not see.
        .env_clear()
        .envs(
            passed
                .iter()
                .filter_map(|name| Some((name, std::env::var_os(name)?))),
        )
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        // Active until the supervisor is known to run. See `reap`.
        .kill_on_drop(true);
    wrenn_sys::session::in_new_session(command.as_std_mut());
    if let Some(memory) = memory {
        let memory = memory.try_clone_to_owned().map_err(supervisor_failed(
            "pass the snapshot's memory file to the supervisor",
        ))?;
        let number = wrenn_sys::session::inherit(command.as_std_mut(), memory);
        command.arg("--memory-fd").arg(number.to_string());
    }
    command
        .spawn()
        .map_err(supervisor_failed("start the supervisor"))
}

/// Waits for the supervisor's line `ready`.
async fn wait_until_ready(child: &mut Child) -> Result<(), SupervisorError> {
    let Some(stdout) = child.stdout.take() else {
        return Err(SupervisorError::Malformed);
    };
    let mut lines = tokio::io::BufReader::new(stdout).lines();
    let ready = async {
        while let Ok(Some(line)) = lines.next_line().await {
            if line == "ready" {
                return Ok(());
            }
        }
        Err(SupervisorError::Ended(String::new()))
    };
    tokio::select! {
        ready = ready => ready,
        _ = child.wait() => Err(SupervisorError::Ended(String::new())),
    }
}

/// Reaps the supervisor when it exits. The child is never dropped, because a drop would kill it,
/// and the supervisor must survive the end of the agent.
async fn reap(mut child: ManuallyDrop<Child>) {
    let _ = child.wait().await;
}

fn supervisor_failed(step: &'static str) -> impl FnOnce(io::Error) -> SupervisorError {
    move |source| SupervisorError::Io { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_rejection_counts_only_without_a_code() {
        let full = "failed to write /x: No space left on device (os error 28)";
        for (reason, code, expected) in [
            (full, None, true),
            ("no", None, false),
            (full, Some(RejectionCode::Other), false),
            ("no", Some(RejectionCode::OutOfSpace), true),
        ] {
            let reason = reason.to_owned();
            let error = unexpected(Reply::Rejected { reason, code });
            assert_eq!(error.is_out_of_space(), expected, "{error:?}");
        }
    }
}
