//! The agent's end of a supervisor: start it, hear when it is gone, ask it, end it.
//!
//! A supervisor outlives the agent, so nothing here ties it to this process: it leads a session of its own, and a
//! [`Supervisor`] that is dropped leaves it running. What holds them together is a connection, the lifeline: it ends
//! when the supervisor's process does, however that ended.

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
    FrozenMachine, MAX_MESSAGE_BYTES, MachineStatus, Reply, Request, files,
};

use crate::folder::Folder;

/// How long it may take to answer a question.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// How long it may take to end a freeze that is under way: longer than anybody waits for one, for the disk's sake.
const SETTLE_DEADLINE: Duration = Duration::from_secs(600);

/// Between two questions whether it has ended.
const SETTLE_POLL: Duration = Duration::from_millis(50);

/// How long a machine may take to go on.
const THAW_DEADLINE: Duration = Duration::from_secs(30);

/// Room for the descriptor beside an answer, bytes.
const ANCILLARY_BYTES: usize = 128;

/// How long a killed process may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What a user is told when a supervisor left no word.
const KILLED: &str = "its supervisor process ended unexpectedly: it was killed, the host ran out of memory, or was restarted";

/// What a user is told when somebody else than the agent asked a supervisor to end.
const STOPPED: &str =
    "its virtual machine was stopped on the host, and not by a request to destroy it";

/// Why a supervisor could not be started or talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SupervisorError {
    /// A system call failed.
    #[error("could not {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// It ended before its machine ran.
    #[error("{0}")]
    Ended(String),
    /// It did not say that its machine runs.
    #[error("the virtual machine did not start within {0:?}")]
    NotReady(Duration),
    /// It did not answer.
    #[error("the supervisor did not answer within {0:?}")]
    Silent(Duration),
    /// Its answer is not one.
    #[error("the supervisor's answer makes no sense")]
    Malformed,
    /// It could not do what was asked; the text is its own.
    #[error("{0}")]
    Refused(String),
    /// It could not be ended.
    #[error("the supervisor (pid {pid}) is still there {KILL_DEADLINE:?} after SIGKILL")]
    Unkillable { pid: i32 },
}

impl SupervisorError {
    /// Whether the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => crate::host::is_out_of_space(source),
            // Another process's error has no number that could be read.
            Self::Refused(text) => text.contains("No space left on device"),
            _ => false,
        }
    }
}

/// A supervisor that lives, as far as is known.
#[derive(Debug)]
pub(crate) struct Supervisor {
    folder: PathBuf,
    lifeline: UnixSeqpacket,
    pid: Pid,
}

impl Supervisor {
    /// Starts the supervisor of a folder that has its `spec.json`, and waits until its machine runs. `memory` is that of the
    /// image, for a machine that is restored.
    ///
    /// When this fails, or its future is dropped, the supervisor is killed.
    pub(crate) async fn start(
        exe: &Path,
        folder: &Folder,
        memory: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<Self, SupervisorError> {
        let mut child = spawn(exe, folder.path(), memory)?;
        let started = async {
            wait_until_ready(&mut child).await?;
            Self::attach(folder.path())
                .await
                .map_err(failed("connect to the supervisor"))
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
                // Waits too: when this returns, the VMM (which dies with the supervisor) has been told.
                let _ = child.kill().await;
                if ended {
                    return Err(SupervisorError::Ended(final_reason(folder)));
                }
                Err(error)
            }
        }
    }

    /// Connects to the supervisor of a folder.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` where none lives.
    pub(crate) async fn attach(folder: &Path) -> io::Result<Self> {
        let lifeline = connect(folder).await?;
        let pid = lifeline
            .peer_cred()?
            .pid()
            .ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self {
            folder: folder.to_owned(),
            lifeline,
            pid: Pid::from_raw(pid),
        })
    }

    /// Waits until the supervisor's process is gone. Cancel safe.
    pub(crate) async fn gone(&self) {
        let mut buffer = [0; 64];
        // Nobody sends on the lifeline; whatever comes that is not the end is ignored.
        while let Ok(info) = self.lifeline.recv(&mut buffer).await {
            if info.bytes_read() == 0 {
                return;
            }
        }
    }

    /// Asks how the machine is.
    pub(crate) async fn status(&self) -> Result<MachineStatus, SupervisorError> {
        match self.ask(Request::Status, STATUS_DEADLINE).await? {
            Reply::Status(status) => Ok(status),
            _ => Err(SupervisorError::Malformed),
        }
    }

    /// How the machine is once no freeze is under way. One that is silent is asked again: it may be busy, and who is gone does not
    /// take a connection.
    pub(crate) async fn settled(&self) -> Result<MachineStatus, SupervisorError> {
        let settled = async {
            loop {
                match self.status().await {
                    Ok(status) if !status.freezing => return Ok(status),
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

    /// Stops the machine's virtual CPUs and has it written to `staging`. If that fails, it runs on.
    pub(crate) async fn freeze(
        &self,
        staging: &Path,
        build: &str,
        next_disk: Option<&Path>,
        deadline: Duration,
    ) -> Result<FrozenMachine, SupervisorError> {
        let request = Request::Freeze {
            staging: staging.to_owned(),
            build: build.to_owned(),
            next_disk: next_disk.map(Path::to_owned),
        };
        match self.ask(request, deadline).await? {
            Reply::Frozen(machine) => Ok(machine),
            other => Err(unexpected(other)),
        }
    }

    /// Lets a frozen machine go on. Fine if it runs.
    pub(crate) async fn thaw(&self) -> Result<(), SupervisorError> {
        match self.ask(Request::Thaw, THAW_DEADLINE).await? {
            Reply::Thawed => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Tells it what became of what it froze last.
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

    /// The memory of the image that its machine was restored from; `None` if it was booted.
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

    /// Ends the machine and the supervisor, by asking and, if that does not help, by killing. Fine if it is gone already.
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
        tracing::warn!(pid = %self.pid, "supervisor does not stop when asked; killing it");
        // While the lifeline holds, the process lives, so its number is still its own.
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

    /// One question on a connection of its own, so that no answer to an earlier one can be taken for its.
    async fn exchange(
        &self,
        request: &Request,
    ) -> Result<(Reply, Option<OwnedFd>), SupervisorError> {
        let io = failed("ask the supervisor");
        let request = serde_json::to_vec(request).map_err(|_| SupervisorError::Malformed)?;
        let exchange = async {
            let connection = connect(&self.folder).await?;
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

fn unexpected(reply: Reply) -> SupervisorError {
    match reply {
        Reply::Refused { reason } => SupervisorError::Refused(reason),
        _ => SupervisorError::Malformed,
    }
}

/// For a user: why the supervisor of this folder is gone.
pub(crate) fn final_reason(folder: &Folder) -> String {
    match folder.read_final_status() {
        Some(status) if status.requested => STOPPED.to_owned(),
        Some(status) if !status.reason.is_empty() => status.reason,
        _ => KILLED.to_owned(),
    }
}

/// A socket's address has 108 bytes and a folder's path may be longer, so the folder is named by descriptor.
async fn connect(folder: &Path) -> io::Result<UnixSeqpacket> {
    let directory = fs::File::open(folder)?;
    let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), files::SOCKET);
    UnixSeqpacket::connect(path).await
}

fn spawn(
    exe: &Path,
    folder: &Path,
    memory: Option<BorrowedFd<'_>>,
) -> Result<Child, SupervisorError> {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(folder.join(files::LOG))
        .map_err(failed("open the supervisor's log"))?;
    let mut command = Command::new(exe);
    command
        .arg("supervise")
        .arg("--dir")
        .arg(folder)
        // The agent's environment holds keys that are none of a supervisor's business.
        .env_clear()
        .envs(
            ["PATH", "RUST_LOG", wrenn_sys::fault::VARIABLE]
                .iter()
                .filter_map(|k| Some((k, std::env::var_os(k)?))),
        )
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        // Until it is known to run; see `reap`.
        .kill_on_drop(true);
    wrenn_sys::session::in_new_session(command.as_std_mut());
    if let Some(memory) = memory {
        let memory = memory
            .try_clone_to_owned()
            .map_err(failed("pass on the image's memory"))?;
        let number = wrenn_sys::session::inherit(command.as_std_mut(), memory);
        command.arg("--memory-fd").arg(number.to_string());
    }
    command.spawn().map_err(failed("start the supervisor"))
}

/// Waits for the line that says so.
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

/// Takes the dead supervisor's entry out of the process table. The end of the agent must not be the supervisor's, so the
/// child, which would be killed when it is dropped, never is.
async fn reap(mut child: ManuallyDrop<Child>) {
    let _ = child.wait().await;
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> SupervisorError {
    move |source| SupervisorError::Io { step, source }
}
