//! The supervisor's life, from `spec.json` to `status.json`.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
};
use wrenn_proto::supervise::{FinalStatus, MachineStatus, Reply, SupervisorSpec, files};
use wrenn_vmm::{Machine, VmmDriver, qemu::Qemu};

use crate::{
    SupervisorError, console,
    control::{self, Command},
    gateway, machine, status,
};

/// How long a killed VMM may take to be gone: it has to give back all of its guest's memory.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// Supervises the sandbox of folder `dir` with QEMU until its machine ends.
///
/// # Errors
/// Why the machine did not start, or ended by itself. The same is in `status.json`.
pub fn run(dir: &Path) -> Result<(), SupervisorError> {
    let wrenn_exe =
        std::env::current_exe().map_err(SupervisorError::io("find the wrenn executable"))?;
    run_with(dir, &Qemu::new(wrenn_exe))
}

/// Supervises the sandbox of folder `dir` with a driver of the caller's.
///
/// # Errors
/// As [`run`].
pub fn run_with<D: VmmDriver>(dir: &Path, driver: &D) -> Result<(), SupervisorError> {
    let started = Instant::now();
    // One thread, and the VMM is its child: the VMM's parent-death signal is tied to the thread that started it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(SupervisorError::io("start the runtime"))?;
    let outcome = runtime.block_on(supervise(dir, driver, started));
    let last = match &outcome {
        Ok(()) => FinalStatus {
            requested: true,
            reason: "stopped as asked".to_owned(),
        },
        Err(error) => FinalStatus {
            requested: false,
            reason: error.chain(),
        },
    };
    if let Err(error) = status::write(dir, &last) {
        tracing::error!(%error, "could not write the final status");
    }
    outcome
}

async fn supervise<D: VmmDriver>(
    dir: &Path,
    driver: &D,
    started: Instant,
) -> Result<(), SupervisorError> {
    let spec = read_spec(dir)?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(SupervisorError::io("listen for SIGTERM"))?;
    let listener = control::listen(dir)?;
    let gateway = gateway::serve(&spec.network.netns)?;
    let mut machine = machine::launch(driver, &spec, dir).await?;
    let (status_sender, status) = watch::channel(MachineStatus {
        vmm_pid: machine.pid(),
        vmm_started_ms: Some(elapsed_ms(started)),
        ..MachineStatus::default()
    });
    if let Some(output) = machine.take_console() {
        let log = dir.join(files::CONSOLE);
        tokio::spawn(console::record(output, log, status_sender, started));
    }
    let (commands, mut queue) = mpsc::channel(16);
    tokio::spawn(control::serve(listener, commands));
    announce_ready()?;
    tracing::info!(sandbox_id = %spec.id, vmm_pid = machine.pid(), "machine started");
    let outcome = drive(&mut machine, &mut queue, &status, &mut terminate).await;
    gateway.abort();
    outcome
}

/// The one place where a running machine is acted on.
async fn drive<M: Machine>(
    machine: &mut M,
    queue: &mut mpsc::Receiver<Command>,
    status: &watch::Receiver<MachineStatus>,
    terminate: &mut Signal,
) -> Result<(), SupervisorError> {
    loop {
        let stop_reply = tokio::select! {
            exit = machine.wait() => return Err(SupervisorError::Ended(exit)),
            Some(command) = queue.recv() => match command {
                Command::Status(reply) => {
                    // Whoever asked may be gone by now.
                    let _ = reply.send(Reply::Status(status.borrow().clone()));
                    continue;
                }
                Command::Stop(reply) => Some(reply),
            },
            _ = terminate.recv() => None,
        };
        let stopped = machine.stop(STOP_DEADLINE).await;
        if let Some(reply) = stop_reply {
            let answer = match &stopped {
                Ok(()) => Reply::Stopped,
                Err(error) => Reply::Refused {
                    reason: error.to_string(),
                },
            };
            reply.send_and_flush(answer).await;
        }
        return Ok(stopped?);
    }
}

fn read_spec(dir: &Path) -> Result<SupervisorSpec, SupervisorError> {
    let path: PathBuf = dir.join(files::SPEC);
    let text = fs::read(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| SupervisorError::ParseSpec { path, source })
}

/// Tells the agent that the socket listens and the machine runs.
fn announce_ready() -> Result<(), SupervisorError> {
    let mut out = std::io::stdout();
    out.write_all(b"ready\n")
        .and_then(|()| out.flush())
        .map_err(SupervisorError::io("tell the agent"))
}

/// Whole milliseconds since a moment.
pub(crate) fn elapsed_ms(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}
