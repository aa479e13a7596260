//! Fake of `wrenn supervise` for the agent's tests: the same protocol, with a guest that has no
//! virtual machine, but a real guest agent.
//!
//! The sandbox's environment variable `FAKE` selects a fault: `die-at-start`, `never-ready`,
//! `die-in-boot`, `silent-guest`, `hang`, `hang-once`, `report-failure`, `reject-init`, `deaf`
//! (ignores stop requests). The file `fault` in the sandbox's directory selects a fault of the
//! following snapshots: see `snapshot`, and `reject-prepare`, `claim-full-disk`, `reject-recover`,
//! `hang-prepare` and `silent` (answers nothing) in `envd`. The file `busy` contains the number of
//! answers to `status` that come late.
#![forbid(unsafe_code)]

mod envd;
mod guest;
mod probe;
mod snapshot;

use std::{
    fs, io,
    io::Write as _,
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, exit},
    sync::mpsc,
    time::Duration,
};

use tokio_seqpacket::{UnixSeqpacket, UnixSeqpacketListener};
use wrenn_proto::supervise::{
    FinalStatus, MAX_MESSAGE_BYTES, MachineStatus, Reply, Request, SupervisorSpec, files,
};

fn main() -> io::Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if_eq("agent").is_some() {
        return serve_agent(args);
    }
    if args.next_if_eq("probe").is_some() {
        probe::report();
        return Ok(());
    }
    if args.next_if_eq("fill").is_some() {
        return probe::fill();
    }
    if args.next_if_eq("sockets").is_some() {
        return probe::serve_sockets(&args.next().unwrap_or_default());
    }
    if args.next_if_eq("jail").is_some() {
        let spec = args.nth(1).unwrap_or_default();
        return Err(io::Error::other(wrenn_jail::enter(Path::new(&spec))));
    }
    let words = (args.next(), args.next(), args.next());
    let (Some("supervise"), Some("--dir"), Some(dir)) =
        (words.0.as_deref(), words.1.as_deref(), words.2)
    else {
        return Err(io::Error::other("usage: supervise --dir DIR"));
    };
    let dir = PathBuf::from(dir);
    let spec: SupervisorSpec = serde_json::from_slice(&fs::read(dir.join(files::SPEC))?)?;
    for cgroup in &spec.supervisor_cgroups {
        fs::write(cgroup.join("cgroup.procs"), "0")?;
    }
    let fake = spec.envs.get("FAKE").cloned().unwrap_or_default();
    if fake == "die-at-start" {
        end(&dir, "the disk is not readable");
    }
    run(&dir, &spec, &fake)
}

/// Runs the supervisor in a thread, and the guest in the main thread once its VM has started.
fn run(dir: &Path, spec: &SupervisorSpec, fake: &str) -> io::Result<()> {
    let (vm_started, guest_start) = mpsc::channel();
    std::thread::scope(|threads| {
        let supervisor = threads.spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(supervise(dir, spec, fake, vm_started))
        });
        // Without a message, this VM has no guest that answers.
        if guest_start.recv().is_ok() {
            guest::become_guest(&spec.network.netns)
                .and_then(|()| envd::serve(dir, fake))
                .unwrap_or_else(|error| end(dir, &format!("the guest failed: {error}")));
        }
        supervisor
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the supervisor panicked")))
    })
}

/// Runs an agent in a separate process, for tests that kill it: `agent DATA_DIR TOKEN`.
fn serve_agent(mut args: impl Iterator<Item = String>) -> io::Result<()> {
    let (Some(data_dir), Some(token)) = (args.next(), args.next()) else {
        return Err(io::Error::other("usage: agent DATA_DIR TOKEN"));
    };
    let data_dir = PathBuf::from(data_dir);
    let config = wrenn_agent_tests::agent_config(&data_dir, &token, std::env::current_exe()?)?;
    let templates = std::sync::Arc::new(wrenn_agent_tests::OneTemplate::new(&data_dir));
    let ready = |address| {
        println!("{address}");
        let _ = io::stdout().flush();
    };
    let serve = wrenn_agent::serve_with(
        config,
        templates,
        wrenn_agent::Deadlines::default(),
        ready,
        tokio_util::sync::CancellationToken::new(),
    );
    tokio::runtime::Runtime::new()?
        .block_on(serve)
        .map_err(io::Error::other)
}

/// Supervises until the process ends. Sends a message when the guest is to start.
async fn supervise(
    dir: &Path,
    spec: &SupervisorSpec,
    fake: &str,
    vm_started: mpsc::Sender<()>,
) -> io::Result<()> {
    let sandbox_dir = fs::File::open(dir)?;
    let _ = fs::remove_file(dir.join(files::SOCKET));
    let address = format!(
        "/proc/self/fd/{}/{}",
        sandbox_dir.as_raw_fd(),
        files::SOCKET
    );
    let mut listener = UnixSeqpacketListener::bind(address)?;
    // The disk file of an earlier VM of the sandbox is a layer by now, and the new VM is not
    // paused.
    for left in ["layers.json", "paused"] {
        let _ = fs::remove_file(dir.join(left));
    }
    let machine = start_machine(spec, dir)?;
    if fake == "never-ready" {
        std::future::pending::<()>().await;
    }
    let hangs = match fake {
        "hang" => true,
        // The file is created by the first attempt.
        "hang-once" => fs::File::create_new(dir.join("hung")).is_ok(),
        _ => false,
    };
    if !hangs && !["silent-guest", "die-in-boot", "report-failure"].contains(&fake) {
        vm_started.send(()).expect("the main thread waits");
    }
    drop(vm_started);
    println!("ready");
    if fake == "die-in-boot" {
        tokio::time::sleep(Duration::from_millis(100)).await;
        end(dir, "the guest powered off");
    }
    let pid = machine.id();
    loop {
        let connection = listener.accept().await?;
        let (dir, fake) = (dir.to_owned(), fake.to_owned());
        tokio::spawn(async move { serve(connection, pid, &dir, &fake).await });
    }
}

/// Delay of a late answer, longer than the agent waits.
const LATE: Duration = Duration::from_secs(6);

/// True if this answer comes late.
fn is_busy(dir: &Path) -> bool {
    let path = dir.join("busy");
    let left = fs::read_to_string(&path)
        .ok()
        .and_then(|left| left.parse::<u32>().ok());
    match left {
        None | Some(0) => false,
        Some(left) => fs::write(&path, (left - 1).to_string()).is_ok(),
    }
}

async fn serve(connection: UnixSeqpacket, vmm_pid: u32, dir: &Path, fake: &str) -> io::Result<()> {
    let mut packet = vec![0; MAX_MESSAGE_BYTES];
    loop {
        let length = connection.recv(&mut packet).await?.bytes_read();
        if length == 0 {
            return Ok(());
        }
        let request: Request = serde_json::from_slice(&packet[..length])?;
        match request {
            Request::Status => {
                if fake == "hang-once" {
                    // The agent regards the supervisor as started.
                    let _ = fs::write(dir.join("asked"), "");
                }
                if is_busy(dir) {
                    tokio::time::sleep(LATE).await;
                }
                let status = MachineStatus {
                    vmm_pid,
                    vmm_started_ms: Some(1),
                    kernel_ms: Some(2),
                    init_ms: Some(3),
                    paused: dir.join("paused").exists(),
                    snapshotting: dir.join("snapshotting").exists(),
                    disk: snapshot::layers(dir),
                    // Processor time of an idle guest.
                    vmm_time: fake.starts_with("hang").then(Default::default),
                    boot_failure: (fake == "report-failure").then(|| "no timer".to_owned()),
                    ..MachineStatus::default()
                };
                let reply = serde_json::to_vec(&Reply::Status(status))?;
                connection.send(&reply).await?;
            }
            Request::Snapshot {
                staging,
                build,
                next_disk,
            } => {
                let reply = snapshot::take(dir, &staging, &build, next_disk.as_deref()).await;
                connection.send(&serde_json::to_vec(&reply)?).await?;
            }
            Request::Resume => {
                let _ = fs::remove_file(dir.join("paused"));
                connection
                    .send(&serde_json::to_vec(&Reply::Resumed)?)
                    .await?;
            }
            Request::Published { .. } => {
                connection.send(&serde_json::to_vec(&Reply::Noted)?).await?;
            }
            Request::ImageMemory => {
                let reply = serde_json::to_vec(&Reply::rejected("no memory"))?;
                connection.send(&reply).await?;
            }
            Request::Stop if fake == "deaf" => {}
            Request::Stop => {
                kill(vmm_pid);
                connection
                    .send(&serde_json::to_vec(&Reply::Stopped)?)
                    .await?;
                end(dir, "stopped on request");
            }
        }
    }
}

/// Starts the fake VMM: a process in the sandbox's cgroups. Unlike a real VMM, it does not die with
/// its supervisor, so the agent must kill it. Its file `machine.pid` appears once it has joined the
/// cgroups.
fn start_machine(spec: &SupervisorSpec, dir: &Path) -> io::Result<Child> {
    let mut script = "set -e\n".to_owned();
    for cgroup in &spec.cgroups {
        script += &format!("echo 0 > {}/cgroup.procs\n", cgroup.display());
    }
    script += "echo $$ > machine.tmp; mv machine.tmp machine.pid; exec sleep 100000";
    Command::new("sh")
        .arg0("fake-vmm")
        .args(["-c", &script])
        .current_dir(dir)
        .spawn()
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

fn end(dir: &Path, reason: &str) -> ! {
    let status = FinalStatus {
        requested: false,
        reason: reason.to_owned(),
    };
    let temporary = dir.join("status.tmp");
    let text = serde_json::to_vec(&status).expect("plain data");
    fs::write(&temporary, text).expect("written");
    fs::rename(temporary, dir.join(files::STATUS)).expect("renamed");
    let _ = io::stdout().flush();
    exit(1)
}
