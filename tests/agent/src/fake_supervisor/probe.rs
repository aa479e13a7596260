//! Program that runs in a jail in place of a VMM, and tries what a jailed process must not do.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::UdpSocket,
    os::unix::net::{UnixListener, UnixStream},
    process::Command,
};

use nix::{
    mount::MsFlags,
    sched::CloneFlags,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// Prints what the process sees, and the result of each attempt.
pub(crate) fn report() {
    let list = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let namespaces = ["pid", "ipc", "uts", "cgroup", "net", "mnt"].map(|name| {
        let link = fs::read_link(format!("/proc/self/ns/{name}")).unwrap_or_default();
        (name, link.to_string_lossy().into_owned())
    });
    let report = json!({
        "pid": std::process::id(),
        "status": fs::read_to_string("/proc/self/status").unwrap_or_default(),
        "limits": fs::read_to_string("/proc/self/limits").unwrap_or_default(),
        "threads": threads(),
        // The last one is that of this list.
        "descriptors": list("/proc/self/fd"),
        "root": list("/"),
        "usr": list("/usr"),
        "programs": list("/usr/bin"),
        "home": list("/tmp/fc-vm"),
        "processes": list("/proc").iter().filter(|name| name.parse::<u32>().is_ok()).count(),
        "namespaces": BTreeMap::from(namespaces),
        "attempts": attempts(),
    });
    println!("{report}");
}

/// Writes to the disk without end.
pub(crate) fn fill() -> io::Result<()> {
    let mut disk = fs::File::options()
        .write(true)
        .open("/tmp/fc-vm/rootfs.qcow2")?;
    loop {
        disk.write_all(&[1; 1 << 16])?;
    }
}

/// Binds a socket like a VMM, and tries operations of a jail with sockets. Sends the error of each
/// to its first client. `inherited` is the path of a descriptor that belongs to the jail's user.
pub(crate) fn serve_sockets(inherited: &str) -> io::Result<()> {
    let listener = UnixListener::bind("/tmp/fc-vm/sockets/own/api.sock")?;
    let (mut client, _) = listener.accept()?;
    let pages = UnixStream::connect("/tmp/fc-vm/sockets/pages.sock");
    let tries: [(&str, io::Result<()>); 5] = [
        ("connect to the parent", pages.map(drop)),
        (
            "open an inherited descriptor",
            fs::write(inherited, "written"),
        ),
        ("network socket", UdpSocket::bind("127.0.0.1:0").map(drop)),
        (
            "parent's directory",
            fs::write("/tmp/fc-vm/sockets/new", ""),
        ),
        ("root", fs::write("/new", "")),
    ];
    let texts = tries.map(|(name, result)| (name, result.err().map(|error| error.to_string())));
    client.write_all(json!(BTreeMap::from(texts)).to_string().as_bytes())
}

/// Returns the `Seccomp` field of each thread.
fn threads() -> Vec<String> {
    let (ready, wait) = std::sync::mpsc::channel();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        ready.send(()).expect("waited for");
        let _ = stopped.recv();
    });
    wait.recv().expect("the thread runs");
    let tasks = fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let field = |status: String| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp:"));
        line.unwrap_or_default().trim().to_owned()
    };
    let fields = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = fields.map(field).collect();
    drop(stop);
    thread.join().expect("no panic");
    fields
}

/// Tries operations that the jail denies. Returns the error of each, or null if it succeeded.
fn attempts() -> Value {
    let disk = "/tmp/fc-vm/rootfs.qcow2";
    let none = None::<&str>;
    let nix = |result: nix::Result<()>| result.map_err(io::Error::from);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    let size = rustix::termios::tcgetwinsize(io::stdin());
    let tries: [(&str, io::Result<()>); 12] = [
        ("ioctl", size.map(drop).map_err(io::Error::from)),
        (
            "mount",
            nix(nix::mount::mount(
                Some("tmpfs"),
                "/tmp",
                Some("tmpfs"),
                MsFlags::empty(),
                none,
            )),
        ),
        (
            "unshare",
            nix(nix::sched::unshare(CloneFlags::CLONE_NEWUSER)),
        ),
        ("socket", UdpSocket::bind("127.0.0.1:0").map(drop)),
        ("kill", nix(kill(Pid::this(), None::<Signal>))),
        ("spawn", Command::new("/proc/self/exe").status().map(drop)),
        ("chmod", fs::set_permissions(disk, mode)),
        ("unlink", fs::remove_file(disk)),
        ("create", fs::write("/tmp/fc-vm/new", "")),
        ("host file", fs::read("/etc/passwd").map(drop)),
        ("read-only file", fs::write("/tmp/fc-vm/base", "changed")),
        ("disk", fs::write(disk, "changed")),
    ];
    let texts = tries.map(|(name, result)| (name, result.err().map(|error| error.to_string())));
    json!(BTreeMap::from(texts))
}
