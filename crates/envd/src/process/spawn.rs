//! Starts processes and sees them to their end.

use std::{
    collections::BTreeMap,
    io,
    os::{fd::OwnedFd, unix::process::ExitStatusExt as _},
    path::PathBuf,
    process::{Command as StdCommand, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use connectrpc::ConnectError;
use nix::sys::signal::Signal;
use rustix::{
    fs::{Mode, fchmod, fchown},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::tcsetwinsize,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, Interest, unix::AsyncFd},
    process::{Child, Command},
    sync::{Mutex, Notify},
    task::JoinSet,
    time::{sleep, timeout},
};
use wrenn_proto::rpc::process::{ProcessConfig, StartRequest};
use wrenn_sys::spawn::{Credentials, as_user};

use super::{
    input::{InputSink, Terminal, window_size},
    output::{Kind, Subscription},
    registry::Running,
    signals::end_event,
};
use crate::{paths, server::App, users::User};

/// Largest piece of output of a pipe, bytes.
const PIPE_PIECE_BYTES: usize = 32 * 1024;
/// Largest piece of output of a terminal, bytes.
const TERMINAL_PIECE_BYTES: usize = 16 * 1024;
/// After a signal: how long what is left in the pipes is read. A grandchild may hold them open for ever.
const LAST_OUTPUT: Duration = Duration::from_millis(500);
/// Processes are killed before the agent when memory runs out.
const OOM_SCORE_ADJ: i16 = 100;

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The program cannot be executed.
    #[error("error starting process: {program}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
}

impl From<StartError> for ConnectError {
    fn from(error: StartError) -> Self {
        let text = error.to_string();
        match error {
            StartError::Spawn { source, .. } if source.kind() == io::ErrorKind::OutOfMemory => {
                Self::resource_exhausted(text)
            }
            _ => Self::invalid_argument(text),
        }
    }
}

/// Starts a process and returns it and its whole output. `limit` is how long it may run.
///
/// # Errors
/// See [`StartError`].
pub fn start(
    app: &App,
    user: &User,
    request: StartRequest,
    limit: Option<Duration>,
) -> Result<(Arc<Running>, Subscription), StartError> {
    let config = request
        .process
        .as_option()
        .cloned()
        .ok_or_else(|| StartError::Invalid("process: is missing".to_owned()))?;
    let mut command = command(app, user, &config)?;
    let plumbing = match request.pty.as_option() {
        Some(pty) => {
            let size = pty
                .size
                .as_option()
                .map_or((80, 24), |size| (size.cols, size.rows));
            terminal(&mut command, user, size)?
        }
        None => pipes(&mut command, request.stdin.unwrap_or(true)),
    };
    let credentials = Credentials {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
        oom_score_adj: OOM_SCORE_ADJ,
        controlling_terminal: plumbing.is_some(),
    };
    as_user(&mut command, credentials);
    let mut child = Command::from(command)
        .spawn()
        .map_err(|source| StartError::Spawn {
            program: config.cmd.clone(),
            source,
        })?;
    let (process, readers) = assemble(&mut child, config, request.tag, plumbing);
    // Before anything is read: the first byte must find its listener.
    let subscription = process.output.subscribe();
    app.processes.add(process.clone());
    let registry = app.processes.clone();
    let started = process.clone();
    tokio::spawn(async move {
        let status = attend(child, &process, readers, limit).await;
        registry.end(&process);
        process.output.finish(end_event(status)).await;
    });
    Ok((started, subscription))
}

fn command(app: &App, user: &User, config: &ProcessConfig) -> Result<StdCommand, StartError> {
    if config.cmd.is_empty() {
        return Err(StartError::Invalid("process.cmd: is empty".to_owned()));
    }
    let mut command = StdCommand::new(&config.cmd);
    command
        .args(&config.args)
        .env_clear()
        .envs(environment(app, user, config))
        .current_dir(directory(app, user, config)?);
    Ok(command)
}

/// PATH of the agent, the user's variables, the host's, the request's: the last wins.
fn environment(app: &App, user: &User, config: &ProcessConfig) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
    let mut all: BTreeMap<_, _> = [
        ("PATH", path.as_str()),
        ("HOME", user.home.as_str()),
        ("USER", user.name.as_str()),
        ("LOGNAME", user.name.as_str()),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    all.extend(app.settings.envs());
    all.extend(
        config
            .envs
            .iter()
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    // No process can have these: the kernel's form of an environment has no way to write them.
    all.retain(|name, value| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    });
    all
}

fn directory(app: &App, user: &User, config: &ProcessConfig) -> Result<PathBuf, StartError> {
    let default = app.settings.default_workdir();
    let wanted = config.cwd.clone().unwrap_or_default();
    let path = paths::resolve(&wanted, user, default.as_deref())
        .map_err(|e| StartError::Invalid(format!("process.cwd: {e}")))?;
    if path.is_dir() {
        Ok(path)
    } else {
        Err(StartError::Invalid(format!(
            "cwd '{}' does not exist",
            path.display()
        )))
    }
}

fn pipes(command: &mut StdCommand, stdin: bool) -> Option<Arc<AsyncFd<OwnedFd>>> {
    command
        .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    None
}

/// Gives the command a new terminal; returns its master side.
fn terminal(
    command: &mut StdCommand,
    user: &User,
    size: (u32, u32),
) -> Result<Option<Arc<AsyncFd<OwnedFd>>>, StartError> {
    let size = window_size(size.0, size.1)
        .map_err(|e| StartError::Invalid(e.message.unwrap_or_default()))?;
    let mut open = || -> io::Result<_> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
        fchmod(&slave, Mode::RUSR | Mode::WUSR | Mode::WGRP)?;
        tcsetwinsize(&master, size)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        #[expect(
            deprecated,
            reason = "sound for a type that owns its descriptor, as this one does"
        )]
        AsyncFd::new(master)
    };
    let master = open().map_err(|source| StartError::Spawn {
        program: "a terminal".to_owned(),
        source,
    })?;
    Ok(Some(Arc::new(master)))
}

/// What output is read from.
enum Source {
    Pipe(Kind, Box<dyn AsyncRead + Send + Unpin>),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

fn assemble(
    child: &mut Child,
    config: ProcessConfig,
    tag: Option<String>,
    master: Option<Arc<AsyncFd<OwnedFd>>>,
) -> (Arc<Running>, Vec<Source>) {
    let mut sources = Vec::new();
    let input = match (master, child.stdin.take()) {
        (Some(master), _) => {
            sources.push(Source::Terminal(master.clone()));
            InputSink::Terminal(Terminal::new(master))
        }
        (None, Some(stdin)) => InputSink::Pipe(Mutex::new(Some(stdin))),
        (None, None) => InputSink::Null,
    };
    if let Some(stdout) = child.stdout.take() {
        sources.push(Source::Pipe(Kind::Stdout, Box::new(stdout)));
    }
    if let Some(stderr) = child.stderr.take() {
        sources.push(Source::Pipe(Kind::Stderr, Box::new(stderr)));
    }
    let process = Running {
        // A child that was not waited for has an id.
        pid: child.id().unwrap_or_default(),
        tag,
        config,
        input,
        output: Arc::default(),
        signalled: Notify::new(),
        reaped: AtomicBool::new(false),
        expired: AtomicBool::new(false),
    };
    (Arc::new(process), sources)
}

/// Reads all output and waits for the end. The end is told after the last output, or, once a signal was asked for, soon
/// after it: a grandchild may keep the pipes open.
async fn attend(
    mut child: Child,
    process: &Arc<Running>,
    sources: Vec<Source>,
    limit: Option<Duration>,
) -> ExitStatus {
    let mut readers = JoinSet::new();
    for source in sources {
        readers.spawn(read(source, process.clone()));
    }
    let deadline = sleep(limit.unwrap_or_default());
    tokio::pin!(deadline);
    let mut limited = limit.is_some();
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut deadline, if limited => {
                limited = false;
                // It may have ended this moment.
                let _ = process.signal(Signal::SIGKILL);
            }
        }
    };
    process.reaped.store(true, Ordering::SeqCst);
    let was_killed = status
        .as_ref()
        .is_ok_and(|status| status.signal() == Some(Signal::SIGKILL as i32));
    let ran_out = limit.is_some() && !limited && was_killed;
    process.expired.store(ran_out, Ordering::SeqCst);
    let all_read = async { while readers.join_next().await.is_some() {} };
    tokio::pin!(all_read);
    tokio::select! {
        () = &mut all_read => {}
        () = process.signalled.notified() => {
            let mut seen = process.output.activity();
            while timeout(LAST_OUTPUT, &mut all_read).await.is_err() {
                let now = process.output.activity();
                if now == seen && !now.is_busy() {
                    break;
                }
                // Something still comes, or a slow listener is waited for: neither is lost.
                seen = now;
            }
        }
    }
    status.unwrap_or_else(|error| {
        tracing::error!(%error, pid = process.pid, "could not wait for a process");
        ExitStatus::from_raw(255 << 8)
    })
}

async fn read(source: Source, process: Arc<Running>) {
    match source {
        Source::Pipe(kind, mut pipe) => {
            let mut buffer = BytesMut::with_capacity(PIPE_PIECE_BYTES);
            while let Ok(1..) = pipe.read_buf(&mut buffer).await {
                process.output.publish(kind, buffer.split().freeze()).await;
                buffer.reserve(PIPE_PIECE_BYTES);
            }
        }
        Source::Terminal(master) => {
            let mut buffer = vec![0; TERMINAL_PIECE_BYTES];
            // EIO is a terminal's end of file: nobody has its other side open.
            while let Ok(length @ 1..) = master
                .async_io(Interest::READABLE, |fd| {
                    Ok(rustix::io::read(fd, &mut buffer)?)
                })
                .await
            {
                let piece = Bytes::copy_from_slice(&buffer[..length]);
                process.output.publish(Kind::Terminal, piece).await;
            }
        }
    }
}
