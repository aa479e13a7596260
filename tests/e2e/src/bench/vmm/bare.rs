//! A VMM without Wrenn: no jail, no cgroups, no page server.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use wrenn_proto::supervise::{FirecrackerSpec, RestoreSpec, SupervisorSpec};
use wrenn_snapshot::{Chain, Header, layout};

use super::super::resume::millis;

/// Directory of the disk in the state of a Firecracker VM.
const DISK_DIR: &str = "/tmp/fc-vm";

/// Part of the memory that is copied at once, in bytes.
const STEP: usize = 4 << 20;

/// Maximum time until a VMM answers.
const DEADLINE: Duration = Duration::from_secs(30);

/// Times from the start of the process.
pub(super) struct Alone {
    /// Until the first answer.
    pub(super) answered_ms: f64,
    /// Until the VM runs; `None` if the VMM was only started.
    pub(super) resumed_ms: Option<f64>,
}

/// Starts the VMM of a sandbox alone. Firecracker also restores the sandbox's snapshot, with all of
/// its memory in a file. QEMU cannot: without Wrenn's library, it has no memory that is mapped and
/// saved separately.
pub(super) fn start(spec: &SupervisorSpec) -> Result<Alone> {
    match (&spec.firecracker, &spec.restore) {
        (Some(firecracker), Some(restore)) => restore_firecracker(firecracker, restore, spec),
        _ => start_qemu(spec),
    }
}

fn start_qemu(spec: &SupervisorSpec) -> Result<Alone> {
    let memory = format!("{}M", spec.size.memory_mib);
    let begun = Instant::now();
    let child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm", "-nodefaults", "-no-user-config", "-S"])
        .args(["-display", "none", "-qmp", "stdio"])
        .args(["-accel", &spec.accel.to_string(), "-m", &memory])
        .args(["-cpu", spec.cpu().as_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut child = Killed(child);
    let output = child.0.stdout.take().context("no standard output")?;
    let mut greeting = String::new();
    BufReader::new(output).read_line(&mut greeting)?;
    ensure!(greeting.contains("QMP"), "QEMU did not start: {greeting}");
    Ok(Alone {
        answered_ms: millis(begun),
        resumed_ms: None,
    })
}

fn restore_firecracker(
    firecracker: &FirecrackerSpec,
    restore: &RestoreSpec,
    spec: &SupervisorSpec,
) -> Result<Alone> {
    let dir = tempfile::tempdir()?;
    let memory = dir.path().join("memory");
    write_memory(restore, &memory)?;
    let state = dir.path().join("state");
    fs::copy(restore.snapshot.join(layout::DEVICE), &state)?;
    let disk = dir.path().join("disk");
    fs::File::create(&disk)?.set_len(u64::from(spec.size.disk_mib) << 20)?;
    fs::create_dir_all(DISK_DIR)?;
    let socket = dir.path().join("socket");
    // The state names the disk and the TAP device. Both exist in namespaces of this process only.
    let script = format!(
        "set -e; ip tuntap add dev tap0 mode tap; mount -t tmpfs none {DISK_DIR}; \
         ln -s {} {DISK_DIR}/rootfs.ext4; exec {} --api-sock {}",
        disk.display(),
        firecracker.program.display(),
        socket.display(),
    );
    let begun = Instant::now();
    let child = Command::new("unshare")
        .args(["--mount", "--net", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let child = Killed(child);
    let api = connect(&socket)?;
    call(&api, "GET", "/version", "")?;
    let answered_ms = millis(begun);
    let load = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": memory },
    });
    call(&api, "PUT", "/snapshot/load", &load.to_string())?;
    let resumed = json!({ "state": "Resumed" });
    call(&api, "PATCH", "/vm", &resumed.to_string())?;
    let resumed_ms = Some(millis(begun));
    drop(child);
    Ok(Alone {
        answered_ms,
        resumed_ms,
    })
}

/// Writes the whole memory of a snapshot to a sparse file.
fn write_memory(restore: &RestoreSpec, path: &Path) -> Result<()> {
    let header = Header::parse(&fs::read(restore.snapshot.join(layout::HEADER))?)?;
    let chain = Chain::open(&restore.memory, &header)?;
    let file = fs::File::create(path)?;
    file.set_len(header.memory_size())?;
    let mut buffer = vec![0; STEP];
    for offset in (0..header.memory_size()).step_by(STEP) {
        let left = usize::try_from(header.memory_size() - offset)?;
        let part = &mut buffer[..STEP.min(left)];
        chain.read_at(offset, part)?;
        if part.iter().any(|byte| *byte != 0) {
            file.write_all_at(part, offset)?;
        }
    }
    Ok(())
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let end = Instant::now() + DEADLINE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Sends a request of Firecracker's API, and reads the answer.
fn call(mut api: &UnixStream, method: &str, path: &str, body: &str) -> Result<()> {
    api.set_read_timeout(Some(DEADLINE))?;
    let length = body.len();
    write!(
        api,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = [0; 4096];
    let read = api.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    if !answer.starts_with("HTTP/1.1 20") {
        bail!("{method} {path}: {answer}");
    }
    Ok(())
}

/// Process that is killed on drop.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Best effort: it may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
