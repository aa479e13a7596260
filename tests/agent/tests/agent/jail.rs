//! Jail of a VMM, inspected from inside: a program of the tests runs in place of QEMU.

use std::{
    fs,
    io::Read as _,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{
            fs::{PermissionsExt as _, chown},
            net::UnixStream,
        },
    },
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use wrenn_jail::{JailFile, JailSpec, ParentPipe, ProcessLimits, Program, SocketDir};

use crate::private_host;

/// Program that enters the jail, and that runs in it.
const EXE: &str = env!("CARGO_BIN_EXE_wrenn-fake-supervisor");

/// User of the jails of this test.
fn uid() -> u32 {
    1_000_000_000 + std::process::id()
}

/// Runs the program in a jail like that of a VMM. Returns its output and the content of the disk.
fn in_jail(command: &str, limits: ProcessLimits) -> (Output, Vec<u8>) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, target: &str, writable| {
        let source = dir.path().join(name);
        fs::write(&source, "content\n").expect("written");
        chown(&source, Some(uid()), Some(uid())).expect("changed");
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&source, mode).expect("changed");
        JailFile {
            source,
            target: target.into(),
            writable,
            executable: false,
        }
    };
    let Program { file: exe, dirs } = Program::of_qemu(Path::new(EXE));
    let parent = ParentPipe::new().expect("a pipe");
    let spec = JailSpec {
        parent: parent.parent(),
        netns: None,
        cgroups: vec![],
        uid: uid(),
        dirs,
        files: vec![
            exe,
            file("disk", "/tmp/fc-vm/rootfs.qcow2", true),
            file("base", "/tmp/fc-vm/base", false),
        ],
        devices: vec!["/dev/null".into(), "/dev/urandom".into()],
        argv: vec![EXE.to_owned(), command.to_owned()],
        env: vec![],
        fds: Some(vec![]),
        sockets: None,
        limits,
        seccomp: true,
    };
    let mut jail = Command::new(EXE);
    let number = wrenn_sys::session::inherit(&mut jail, spec.to_memfd().expect("a file"));
    // One that the specification does not list.
    let other = fs::File::open("/etc/passwd").expect("a file");
    wrenn_sys::session::inherit(&mut jail, other.into());
    jail.args(["jail", "--spec"])
        .arg(format!("/proc/self/fd/{number}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = wrenn_jail::spawn_in_pid_namespace(|| jail.spawn()).expect("started");
    let _alive = parent.keep();
    let output = child.wait_with_output().expect("ended");
    let disk = fs::read(dir.path().join("disk")).expect("read");
    (output, disk)
}

/// Returns the report of the program, and the content of the disk afterwards.
fn report() -> (Value, Vec<u8>) {
    private_host::enter();
    let (output, disk) = in_jail("probe", ProcessLimits::default());
    assert!(output.status.success(), "{output:?}");
    (serde_json::from_slice(&output.stdout).expect("JSON"), disk)
}

fn names(list: &Value) -> Vec<&str> {
    let list = list.as_array().expect("a list").iter();
    list.map(|name| name.as_str().expect("a name")).collect()
}

#[test]
fn every_thread_is_filtered_and_denied_operations_fail() {
    let (report, disk) = report();
    let threads = names(&report["threads"]);
    assert_eq!(threads, ["2", "2"], "mode 2 is a filter");
    let attempts = report["attempts"].as_object().expect("attempts");
    for (name, error) in attempts {
        let error = error.as_str();
        match name.as_str() {
            "disk" => assert_eq!(error, None, "the disk must be writable"),
            "create" | "read-only file" => {
                let text = error.unwrap_or_default();
                assert!(text.contains("Read-only"), "{name}: {error:?}");
            }
            "host file" => {
                let text = error.unwrap_or_default();
                assert!(text.contains("No such file"), "{name}: {error:?}");
            }
            _ => {
                let text = error.unwrap_or_default();
                assert!(text.contains("not permitted"), "{name}: {error:?}");
            }
        }
    }
    assert_eq!(disk, b"changed");
}

#[test]
fn process_sees_its_program_its_libraries_and_its_files_only() {
    let (report, _) = report();
    let root = names(&report["root"]);
    for name in &root {
        // The program of this test is outside of `/usr`.
        let of_program = Path::new(EXE).starts_with(Path::new("/").join(name));
        let expected = ["dev", "lib", "lib64", "proc", "tmp", "usr"].contains(name);
        assert!(expected || of_program, "{name} in {root:?}");
    }
    for name in names(&report["usr"]) {
        assert!(["lib", "lib64", "share"].contains(&name), "{name}");
    }
    assert_eq!(names(&report["programs"]), [""; 0]);
    assert_eq!(names(&report["descriptors"]), ["0", "1", "2", "3"]);
    assert_eq!(names(&report["home"]), ["base", "layers", "rootfs.qcow2"]);
}

#[test]
fn process_has_namespaces_of_its_own_and_no_privileges() {
    let (report, _) = report();
    // The first process of its namespace, and the only one.
    assert_eq!(
        (&report["pid"], &report["processes"]),
        (&1.into(), &1.into())
    );
    for (name, inside) in report["namespaces"].as_object().expect("namespaces") {
        let outside = fs::read_link(format!("/proc/self/ns/{name}")).expect("a namespace");
        assert_ne!(
            Some(outside.as_path()),
            inside.as_str().map(Path::new),
            "{name}"
        );
    }
    let status = report["status"].as_str().expect("a status");
    let id = uid();
    for line in [
        format!("Uid:\t{id}\t{id}\t{id}\t{id}"),
        format!("Gid:\t{id}\t{id}\t{id}\t{id}"),
        "CapEff:\t0000000000000000".to_owned(),
        "CapPrm:\t0000000000000000".to_owned(),
        "NoNewPrivs:\t1".to_owned(),
    ] {
        assert!(status.contains(&line), "{line} in {status}");
    }
    let limits = report["limits"].as_str().expect("limits");
    for (name, value) in [
        ("Max core file size", "0"),
        ("Max open files", "1024"),
        ("Max processes", "256"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max realtime priority", "0"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("{name} in {limits}"));
        let value = format!(" {value} ");
        assert_eq!(line.matches(&value).count(), 2, "{line}");
    }
}

#[test]
fn a_file_cannot_grow_beyond_its_limit() {
    private_host::enter();
    let limits = ProcessLimits {
        file_bytes: 1 << 20,
        ..ProcessLimits::default()
    };
    let (output, disk) = in_jail("fill", limits);
    // The signal that the kernel sends is ignored by the first process of a PID namespace.
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("too large"),
        "{output:?}"
    );
    assert_eq!(disk.len(), 1 << 20);
}

/// Waits until the jailed process has bound its socket, and connects.
fn connect(sockets: &SocketDir) -> UnixStream {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let connected = sockets
            .find("api.sock")
            .and_then(|socket| UnixStream::connect(socket.address()));
        match connected {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_jail_with_sockets_binds_its_own_and_reaches_those_of_its_parent_only() {
    private_host::enter();
    let sockets = SocketDir::new(uid()).expect("a directory");
    let pages = sockets.listen("pages.sock").expect("bound");
    // Opened again by its path, like the files of a VMM's snapshots.
    let mut unnamed = tempfile::tempfile().expect("a file");
    std::os::unix::fs::fchown(&unnamed, Some(uid()), Some(uid())).expect("changed");
    let number = unnamed.as_raw_fd();
    let Program { file: exe, dirs } = Program::of_qemu(Path::new(EXE));
    let parent = ParentPipe::new().expect("a pipe");
    let spec = JailSpec {
        parent: parent.parent(),
        netns: None,
        cgroups: vec![],
        uid: uid(),
        dirs,
        files: vec![exe],
        devices: vec!["/dev/null".into(), "/dev/net/tun".into()],
        argv: vec![
            EXE.to_owned(),
            "sockets".to_owned(),
            format!("/proc/self/fd/{number}"),
        ],
        env: vec![],
        fds: Some(vec![number]),
        sockets: Some(sockets.as_fd().as_raw_fd()),
        limits: ProcessLimits::default(),
        seccomp: true,
    };
    let mut jail = Command::new(EXE);
    let spec_number = wrenn_sys::session::inherit(&mut jail, spec.to_memfd().expect("a file"));
    for fd in [unnamed.as_fd(), sockets.as_fd()] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).expect("possible");
    }
    jail.args(["jail", "--spec"])
        .arg(format!("/proc/self/fd/{spec_number}"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let child = wrenn_jail::spawn_in_pid_namespace(|| jail.spawn()).expect("started");
    let _alive = parent.keep();
    let mut report = String::new();
    let mut client = connect(&sockets);
    client.read_to_string(&mut report).expect("a report");
    let output = child.wait_with_output().expect("ended");
    assert!(output.status.success(), "{output:?}");
    let mut content = String::new();
    unnamed.read_to_string(&mut content).expect("read");
    assert_eq!(content, "written");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    for (name, part) in [
        ("connect to the parent", None),
        ("open an inherited descriptor", None),
        ("network socket", Some("not permitted")),
        ("parent's directory", Some("Permission denied")),
        ("root", Some("Read-only")),
    ] {
        let error = report[name].as_str();
        let expected = error.is_some() == part.is_some();
        let contains = error.unwrap_or_default().contains(part.unwrap_or_default());
        assert!(expected && contains, "{name}: {error:?}");
    }
    pages.accept().expect("the process has connected");
}

#[test]
fn a_jail_whose_parent_is_gone_is_not_entered() {
    private_host::enter();
    let parent = ParentPipe::new().expect("a pipe");
    let spec = JailSpec {
        parent: parent.parent(),
        netns: None,
        cgroups: vec![],
        uid: uid(),
        dirs: vec![],
        files: vec![],
        devices: vec![],
        argv: vec![EXE.to_owned(), "probe".to_owned()],
        env: vec![],
        fds: Some(vec![]),
        sockets: None,
        limits: ProcessLimits::default(),
        seccomp: true,
    };
    let mut jail = Command::new(EXE);
    let number = wrenn_sys::session::inherit(&mut jail, spec.to_memfd().expect("a file"));
    // As if the parent had died: no process holds the writing end any more.
    let reader = parent.into_reader();
    jail.args(["jail", "--spec"])
        .arg(format!("/proc/self/fd/{number}"));
    let output = wrenn_jail::spawn_in_pid_namespace(|| jail.output()).expect("run");
    drop(reader);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("parent is alive"),
        "{text}"
    );
}
