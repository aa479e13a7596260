//! Life of a supervisor, from `spec.json` to `status.json`.

use std::{
    fs,
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Instant,
};

use thiserror_ext::AsReport as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use wrenn_proto::supervise::{FinalStatus, MachineStatus, SupervisorSpec, files};
use wrenn_sys::failpoint;
use wrenn_vmm::{Machine as _, MemoryAccess, VmmDriver, firecracker::Firecracker, qemu::Qemu};

use crate::{
    SupervisorError, console, control,
    disk::{DiskPlace, NewDisk},
    disk_room::DiskRoom,
    gateway::{self, mmds::Mmds},
    machine,
    machine_actor::MachineActor,
    memory::GuestMemory,
    preload, status,
};

/// Priority for the kernel's OOM killer (`oom_score_adj`). The supervisor would otherwise inherit
/// the agent's. Its VMM, which has most of the memory, comes first.
const OOM_SCORE_ADJ: i32 = 250;

/// Runs the sandbox in directory `dir` until its VM ends, with the VMM that its specification names.
/// `image` is the shared memory of the snapshot from which the VM is restored, if the agent already
/// has it.
///
/// # Errors
/// The VM did not start, or ended by itself. `status.json` contains the same reason.
pub fn run(dir: &Path, image: Option<OwnedFd>) -> Result<(), SupervisorError> {
    until_the_end(dir, async |started| {
        let spec = read_spec(dir)?;
        let exe = wrenn_exe()?;
        match &spec.firecracker {
            Some(firecracker) => {
                let driver = Firecracker::new(exe, firecracker.program.clone());
                supervise(dir, spec, image, &driver, started).await
            }
            None => {
                let preload = preload::find(&exe)?;
                supervise(dir, spec, image, &Qemu::new(exe, preload), started).await
            }
        }
    })
}

/// Runs the sandbox in directory `dir` with the given driver.
///
/// # Errors
/// Same as [`run`].
pub fn run_with<D: VmmDriver>(
    dir: &Path,
    image: Option<OwnedFd>,
    driver: &D,
) -> Result<(), SupervisorError> {
    until_the_end(dir, async |started| {
        supervise(dir, read_spec(dir)?, image, driver, started).await
    })
}

/// Runs a VM, and writes how it ended to `status.json`.
fn until_the_end(
    dir: &Path,
    supervise: impl AsyncFnOnce(Instant) -> Result<(), SupervisorError>,
) -> Result<(), SupervisorError> {
    let started = Instant::now();
    // A single thread, and the VMM is its child: the VMM's parent-death signal depends on the
    // thread that started the VMM.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(SupervisorError::io("start the runtime"))?;
    let outcome = runtime.block_on(supervise(started));
    let last = match &outcome {
        Ok(()) => FinalStatus {
            requested: true,
            reason: "stopped on request".to_owned(),
        },
        Err(error) => FinalStatus {
            requested: false,
            reason: error.to_report_string(),
        },
    };
    // Before the sockets are closed: the agent ends this process when it notices that.
    match last.requested {
        true => tracing::info!("VM stopped"),
        false => tracing::error!(reason = last.reason, "VM ended"),
    }
    if let Err(error) = status::write(dir, &last) {
        tracing::error!(%error, "failed to write the final status");
    }
    // The VM may have been stopped during a snapshot. Its files are garbage, and waiting for the
    // thread that writes them would hold up the destroy.
    runtime.shutdown_background();
    outcome
}

async fn supervise<D: VmmDriver>(
    dir: &Path,
    spec: SupervisorSpec,
    image: Option<OwnedFd>,
    driver: &D,
    started: Instant,
) -> Result<(), SupervisorError> {
    if let Err(error) = wrenn_sys::oom::set_score_adj(OOM_SCORE_ADJ) {
        tracing::warn!(%error, "failed to set the priority for the OOM killer");
    }
    join_cgroups(&spec)?;
    let mut terminate =
        signal(SignalKind::terminate()).map_err(SupervisorError::io("listen for SIGTERM"))?;
    let listener = control::listen(dir)?;
    let mmds = Mmds::for_sandbox(&spec);
    let services = gateway::serve(&spec.network.netns, mmds, &spec.dns_upstreams)?;
    let (mut memory, vmm_fds) = GuestMemory::prepare(&spec, image)?;
    if spec.restore.is_some() {
        failpoint::hit("supervisor.restore.prepared", None);
    }
    let place = DiskPlace::new(dir, wrenn_exe()?);
    let disk = NewDisk::open(driver.disk_form(), &spec, &place)?;
    let disk_path = disk.vmm_path(&place);
    // The machine is dropped before `memory`, because the VM must not touch memory that is no longer
    // served.
    let (disk, mut machine) = tokio::try_join!(
        disk.start(&spec, &place),
        machine::launch(driver, &spec, dir, disk_path, vmm_fds),
    )?;
    let vmm_started_ms = elapsed_ms(started);
    let mut restored_ms = None;
    let failure = match &spec.restore {
        Some(restore) => {
            let failure = machine::restore(&mut machine, restore, &mut memory).await?;
            restored_ms = Some(elapsed_ms(started));
            failpoint::hit("supervisor.restore.resumed", Some(machine.pid()));
            failure
        }
        None => {
            if machine.memory_access() == MemoryAccess::PageTables {
                memory.attach()?;
            }
            memory.failure()?
        }
    };
    let (status_sender, status) = watch::channel(MachineStatus {
        vmm_pid: machine.pid(),
        vmm_started_ms: Some(vmm_started_ms),
        restored_ms,
        ..MachineStatus::default()
    });
    if let Some(output) = machine.take_console() {
        let log = dir.join(files::CONSOLE);
        tokio::spawn(console::record(output, log, status_sender, started));
    }
    let (commands, queue) = mpsc::channel(16);
    tokio::spawn(control::serve(listener, commands));
    announce_ready()?;
    tracing::info!(
        vmm_pid = machine.pid(),
        vmm = machine.version(),
        vmm_started_ms,
        restored_ms,
        "VM started"
    );
    let disk_room = DiskRoom::new(dir, spec.disk_room_bytes, disk.writable());
    let mut actor = MachineActor {
        disk,
        machine,
        memory,
        is_paused: false,
        disk_room,
        status,
    };
    let outcome = actor.drive(queue, &failure, &mut terminate).await;
    drop(services);
    outcome
}

fn wrenn_exe() -> Result<PathBuf, SupervisorError> {
    std::env::current_exe().map_err(SupervisorError::io("find the wrenn executable"))
}

/// Joins the cgroups of the supervisor. Its VMM joins others in its jail.
fn join_cgroups(spec: &SupervisorSpec) -> Result<(), SupervisorError> {
    for dir in &spec.supervisor_cgroups {
        fs::write(dir.join("cgroup.procs"), "0")
            .map_err(SupervisorError::io("join the supervisor's cgroups"))?;
    }
    Ok(())
}

fn read_spec(dir: &Path) -> Result<SupervisorSpec, SupervisorError> {
    let path: PathBuf = dir.join(files::SPEC);
    let text = fs::read(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| SupervisorError::ParseSpec { path, source })
}

/// Reports to the agent that the socket is listening and the VM runs. An agent that was killed in
/// the meantime does not receive the message; the next agent finds the socket.
fn announce_ready() -> Result<(), SupervisorError> {
    let mut out = std::io::stdout();
    match out.write_all(b"ready\n").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(SupervisorError::io("report readiness to the agent")),
    }
}

/// Returns whole milliseconds since `since`.
pub(crate) fn elapsed_ms(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}
