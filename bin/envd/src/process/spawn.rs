//! Start of processes, and supervision until their end.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    path::PathBuf,
    process::ExitStatus,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use rustix::{
    fs::{Mode, fchmod, fchown},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::tcsetwinsize,
};
use tokio::{
    io::unix::AsyncFd,
    net::unix::pipe,
    sync::Mutex,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use wrenn_proto::rpc::process::{ProcessConfig, StartRequest};
use wrenn_sys::spawn::{Credentials, Launch, SpawnError, Spawned};

use super::{
    child::Child,
    input::{InputSink, Terminal, window_size},
    output::{Kind, Output, Subscription},
    reader::Source,
    registry::{Registry, Running},
    signals::end_event,
    start_error::StartError,
};
use crate::{
    cgroups::{Cgroups, CommandGroup, Group},
    locale, paths,
    settings::Settings,
    users::User,
};

/// Silence which, after the end of a process, means that its output was read completely. A process
/// that the ended one has started may still be writing, for example `tee` at the end of its output,
/// or may hold the output open forever.
const SILENCE: Duration = Duration::from_millis(500);
/// Maximum time to wait for silence. A descendant may also write forever.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// OOM score adjustment of processes, which are killed before envd when memory runs out.
const OOM_SCORE_ADJ: i16 = 100;

/// Settings, groups and limits of new processes, and the registry that records them.
pub struct Launcher {
    /// Settings from the host.
    pub settings: Arc<Settings>,
    /// Processes that were started by envd.
    pub processes: Arc<Registry>,
    /// Groups in which processes are created.
    pub cgroups: Cgroups,
    /// Soft and hard limit of open descriptors per process.
    pub open_files: Option<(u64, u64)>,
    /// Time after which a client that takes no output is dropped.
    pub patience: Duration,
}

/// Starts a process. Returns the process and a subscription to its whole output. `limit` is the
/// maximum run time.
///
/// # Errors
/// See [`StartError`].
pub fn start(
    launcher: &Launcher,
    user: &User,
    request: StartRequest,
    limit: Option<Duration>,
) -> Result<(Arc<Running>, Subscription), StartError> {
    let config = request
        .process
        .as_option()
        .cloned()
        .ok_or_else(|| StartError::Invalid("`process` is missing".to_owned()))?;
    let failed = |program: &str| {
        let program = program.to_owned();
        move |source| StartError::Spawn { program, source }
    };
    let (ends, plumbing) = match request.pty.as_option() {
        Some(pty) => {
            let size = pty
                .size
                .as_option()
                .map_or((80, 24), |size| (size.cols, size.rows));
            terminal(user, size)?
        }
        None => pipes(request.stdin.unwrap_or(true)).map_err(failed("pipes"))?,
    };
    let group = Group::of(request.tag.as_deref(), plumbing.is_terminal());
    let (child, group) = launch(launcher, user, &config, &ends, group)?;
    let child = Child::new(child).map_err(failed(&config.cmd))?;
    // The process has its own copies. While these are open, the readers would never see an end of
    // file.
    drop(ends);
    let (input, readers) = split(plumbing);
    let process = Arc::new(Running {
        pid: child.pid,
        tag: request.tag,
        config,
        input,
        output: Arc::new(Output::new(launcher.patience)),
        group,
        reaped: CancellationToken::new(),
        killed: AtomicBool::new(false),
        expired: AtomicBool::new(false),
    });
    // Subscribed before anything is read, so that the first byte has a subscriber.
    let subscription = process.output.subscribe();
    launcher.processes.add(process.clone());
    let registry = launcher.processes.clone();
    let started = process.clone();
    tokio::spawn(async move {
        let status = attend(child, &process, readers, limit).await;
        registry.end(&process);
        process.output.finish(end_event(status));
    });
    Ok((started, subscription))
}

fn launch(
    launcher: &Launcher,
    user: &User,
    config: &ProcessConfig,
    ends: &[OwnedFd; 3],
    group: Group,
) -> Result<(Spawned, Option<CommandGroup>), StartError> {
    if config.cmd.is_empty() {
        return Err(StartError::Invalid("`process.cmd` is empty".to_owned()));
    }
    let envs = environment(launcher, user, config);
    let directory = directory(launcher, user, config)?;
    let credentials = Credentials {
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
        oom_score_adj: OOM_SCORE_ADJ,
        open_files: launcher.open_files,
        controlling_terminal: group == Group::Terminal,
    };
    let launch = Launch {
        program: &config.cmd,
        args: &config.args,
        envs: &envs,
        directory: &directory,
        stdio: [ends[0].as_fd(), ends[1].as_fd(), ends[2].as_fd()],
        credentials: &credentials,
        cgroup: None,
    };
    spawn_in(launcher.cgroups.create(group), launch)
        .map_err(|error| StartError::of(error, &config.cmd, directory, &user.name))
}

/// Starts a process in its group. Returns the process, and the group if the process is in it.
fn spawn_in(
    group: Option<CommandGroup>,
    launch: Launch<'_>,
) -> Result<(Spawned, Option<CommandGroup>), SpawnError> {
    let opened = group.and_then(|group| {
        let directory = group.open();
        let directory = directory.inspect_err(|error| tracing::warn!(%error, "cgroup unusable"));
        directory.ok().map(|directory| (group, directory))
    });
    let Some((group, directory)) = opened else {
        return wrenn_sys::spawn::spawn(&launch).map(|spawned| (spawned, None));
    };
    let mut launch = launch;
    launch.cgroup = Some(directory.as_fd());
    match wrenn_sys::spawn::spawn(&launch) {
        Err(SpawnError::NoProcess(error)) => {
            // A program in the guest has removed or divided the group.
            tracing::warn!(%error, "cgroup unusable, starting process without it");
            launch.cgroup = None;
            wrenn_sys::spawn::spawn(&launch).map(|spawned| (spawned, None))
        }
        spawned => spawned.map(|spawned| (spawned, Some(group))),
    }
}

/// Returns the environment: `PATH` of envd, the guest's locale, the user's variables, the host's,
/// the request's. Later values replace earlier ones.
fn environment(
    launcher: &Launcher,
    user: &User,
    config: &ProcessConfig,
) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
    let mut all: BTreeMap<_, _> = [
        ("PATH", path.as_str()),
        ("HOME", user.home.as_str()),
        ("USER", user.name.as_str()),
        ("LOGNAME", user.name.as_str()),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    all.extend(locale::variables());
    all.extend(launcher.settings.envs());
    all.extend(
        config
            .envs
            .iter()
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    // The kernel's format of an environment cannot represent these variables.
    all.retain(|name, value| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    });
    all
}

/// Returns the working directory. Whether the user can enter it is known when the process does.
fn directory(
    launcher: &Launcher,
    user: &User,
    config: &ProcessConfig,
) -> Result<PathBuf, StartError> {
    let default = launcher.settings.default_workdir();
    let wanted = config.cwd.clone().unwrap_or_default();
    paths::resolve(&wanted, user, default.as_deref())
        .map_err(|e| StartError::Invalid(format!("invalid `process.cwd`: {e}")))
}

/// envd's ends of a process's input and output.
enum Plumbing {
    Pipes {
        stdin: Option<pipe::Sender>,
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
    },
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl Plumbing {
    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }
}

/// Creates three pipes. Returns the process's ends and envd's ends. Without `stdin`, the process
/// reads the end of file.
fn pipes(stdin: bool) -> io::Result<([OwnedFd; 3], Plumbing)> {
    let (input, stdin) = if stdin {
        let (reader, writer) = io::pipe()?;
        (
            reader.into(),
            Some(pipe::Sender::from_owned_fd(writer.into())?),
        )
    } else {
        (File::open("/dev/null")?.into(), None)
    };
    let (stdout, output) = io::pipe()?;
    let (stderr, error) = io::pipe()?;
    let plumbing = Plumbing::Pipes {
        stdin,
        stdout: pipe::Receiver::from_owned_fd(stdout.into())?,
        stderr: pipe::Receiver::from_owned_fd(stderr.into())?,
    };
    Ok(([input, output.into(), error.into()], plumbing))
}

/// Creates a terminal. Returns three descriptors of its slave side for the process, and its master
/// side.
fn terminal(user: &User, size: (u32, u32)) -> Result<([OwnedFd; 3], Plumbing), StartError> {
    let size = window_size(size.0, size.1)
        .map_err(|e| StartError::Invalid(e.message.unwrap_or_default()))?;
    let open = || -> io::Result<_> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        fchown(&slave, Some(rustix::fs::Uid::from_raw(user.uid)), None)?;
        fchmod(&slave, Mode::RUSR | Mode::WUSR | Mode::WGRP)?;
        tcsetwinsize(&master, size)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        let ends = [slave.try_clone()?, slave.try_clone()?, slave];
        #[expect(
            deprecated,
            reason = "sound for a type that owns its descriptor, as this one does"
        )]
        let master = AsyncFd::new(master)?;
        Ok((ends, Plumbing::Terminal(Arc::new(master))))
    };
    open().map_err(|source| StartError::Spawn {
        program: "pseudo-terminal".to_owned(),
        source,
    })
}

/// Returns the destination of a process's input and the sources of its output.
fn split(plumbing: Plumbing) -> (InputSink, Vec<Source>) {
    match plumbing {
        Plumbing::Terminal(master) => (
            InputSink::Terminal(Terminal::new(master.clone())),
            vec![Source::terminal(master)],
        ),
        Plumbing::Pipes {
            stdin,
            stdout,
            stderr,
        } => (
            stdin.map_or(InputSink::Null, |pipe| {
                InputSink::Pipe(Mutex::new(Some(pipe)))
            }),
            vec![
                Source::pipe(Kind::Stdout, stdout),
                Source::pipe(Kind::Stderr, stderr),
            ],
        ),
    }
}

/// Reads all output and waits for the end of the process. Returns soon after the end, with all
/// output that was written before it, even if descendants keep the output open.
async fn attend(
    child: Child,
    process: &Arc<Running>,
    sources: Vec<Source>,
    limit: Option<Duration>,
) -> ExitStatus {
    let mut readers = JoinSet::new();
    let stop = CancellationToken::new();
    for source in sources {
        readers.spawn(source.read(process.output.clone(), stop.clone()));
    }
    let deadline = sleep(limit.unwrap_or_default());
    tokio::pin!(deadline);
    let mut limited = limit.is_some();
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            () = &mut deadline, if limited => {
                limited = false;
                // The process may have just ended.
                let _ = process.signal(Signal::SIGKILL);
            }
        }
    };
    process.reaped.cancel();
    let was_killed = status
        .as_ref()
        .is_ok_and(|status| status.signal() == Some(Signal::SIGKILL as i32));
    let ran_out = limit.is_some() && !limited && was_killed;
    process.expired.store(ran_out, Ordering::SeqCst);
    let all_read = async { while readers.join_next().await.is_some() {} };
    tokio::pin!(all_read);
    if !read_in_time(&process.output, &mut all_read).await {
        // Delivers the data that was written by now, however slow the subscriber is.
        stop.cancel();
        all_read.await;
    }
    status.unwrap_or_else(|error| {
        tracing::error!(%error, pid = process.pid, "failed to wait for process");
        ExitStatus::from_raw(255 << 8)
    })
}

/// Waits until all output was read, or until the remaining output is no longer the process's own.
/// Returns true if all output was read. Time in which a slow subscriber delays the output does not
/// count as silence.
async fn read_in_time(output: &Output, mut all: impl Future<Output = ()> + Unpin) -> bool {
    let late = Instant::now() + LAST_OUTPUT;
    let mut seen = output.activity();
    while timeout(SILENCE, &mut all).await.is_err() {
        let now = output.activity();
        if now == seen && !now.is_busy() || Instant::now() >= late {
            return false;
        }
        seen = now;
    }
    true
}
