//! Life of a supervisor with an ordinary process in place of the VMM. Requires root, for the
//! network namespace.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on should stop where it is"
)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio_seqpacket::UnixSeqpacket;
use wrenn_model::MachineSize;
use wrenn_proto::supervise::{
    Accel, FinalStatus, NetworkSpec, Reply, Request, SupervisorSpec, files,
};
use wrenn_supervisor::{SupervisorError, run_with};
use wrenn_vmm::fake::FakeDriver;

const DEADLINE: Duration = Duration::from_secs(20);

/// Network namespace as the agent creates it, as far as a supervisor needs it. Removed on drop.
struct Namespace(String);

impl Namespace {
    fn new(test: &str) -> Self {
        let name = format!("wt-{test}-{}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        ip(&["-n", &name, "addr", "add", "169.254.0.22/30", "dev", "lo"]);
        let metadata = "169.254.169.254/32";
        ip(&["-n", &name, "addr", "add", metadata, "dev", "lo"]);
        Self(name)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status().unwrap();
    assert!(status.success(), "ip {args:?}");
}

/// Directory of a sandbox with a specification.
struct Sandbox {
    dir: PathBuf,
    _root: tempfile::TempDir,
    namespace: Namespace,
}

impl Sandbox {
    fn new(test: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        // Longer than a socket address, because users can choose any data directory.
        let dir = root.path().join("d".repeat(120));
        fs::create_dir(&dir).unwrap();
        let namespace = Namespace::new(test);
        let spec = SupervisorSpec {
            version: 1,
            id: "sb-0123abcd".parse().unwrap(),
            template: "minimal".parse().unwrap(),
            accel: Accel::Tcg,
            cpu_model: None,
            machine: None,
            size: MachineSize {
                vcpus: 1,
                memory_mib: 128,
                disk_mib: 1024,
            },
            timeout_sec: 0,
            created_unix_ms: 0,
            kernel: "/nowhere/vmlinux".into(),
            initrd: "/nowhere/initrd".into(),
            kernel_args: "console=ttyS0".into(),
            base_disk: "/nowhere/base".into(),
            uid: 70_001,
            cgroups: vec![],
            network: NetworkSpec {
                slot: 1,
                netns: namespace.path(),
                host_ip: Ipv4Addr::LOCALHOST,
                egress: false,
                allow: vec![],
                deny: vec![],
                mtu: wrenn_proto::guest::DEFAULT_MTU,
            },
            envd_token: "secret".into(),
            envs: [].into(),
            dns: vec![],
            dns_upstreams: vec![],
            default_user: "root".into(),
            disk_layers: vec![],
            restore: None,
            disk_room_bytes: 0,
            supervisor_cgroups: vec![],
            disk_rate: wrenn_proto::supervise::DiskRate::default(),
            firecracker: None,
        };
        fs::write(dir.join(files::SPEC), serde_json::to_vec(&spec).unwrap()).unwrap();
        Self {
            dir,
            _root: root,
            namespace,
        }
    }

    fn start(&self, script: &str) -> JoinHandle<Result<(), SupervisorError>> {
        let (dir, driver) = (
            self.dir.clone(),
            FakeDriver {
                script: script.to_owned(),
                version: String::new(),
            },
        );
        std::thread::spawn(move || run_with(&dir, None, &driver))
    }

    async fn connect(&self) -> UnixSeqpacket {
        let deadline = Instant::now() + DEADLINE;
        let sandbox_dir = fs::File::open(&self.dir).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&sandbox_dir);
        loop {
            match UnixSeqpacket::connect(format!("/proc/self/fd/{fd}/{}", files::SOCKET)).await {
                Ok(connection) => return connection,
                Err(error) => assert!(Instant::now() < deadline, "no socket: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Connects from the sandbox's namespace, where the address is.
    fn connect_to_metadata(&self) -> TcpStream {
        let namespace = fs::File::open(self.namespace.path()).unwrap();
        let connect = move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let deadline = Instant::now() + DEADLINE;
            loop {
                // The address exists before the service listens.
                match TcpStream::connect("169.254.169.254:80") {
                    Ok(connection) => return connection,
                    Err(error) => assert!(Instant::now() < deadline, "no service: {error}"),
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        std::thread::spawn(connect).join().unwrap()
    }

    fn final_status(&self) -> FinalStatus {
        serde_json::from_slice(&fs::read(self.dir.join(files::STATUS)).unwrap()).unwrap()
    }
}

async fn ask(connection: &UnixSeqpacket, packet: &[u8]) -> Reply {
    connection.send(packet).await.unwrap();
    let mut answer = vec![0; 65536];
    let info = tokio::time::timeout(DEADLINE, connection.recv(&mut answer))
        .await
        .expect("a reply within the deadline")
        .unwrap();
    serde_json::from_slice(&answer[..info.bytes_read()]).unwrap()
}

async fn request(connection: &UnixSeqpacket, request: &Request) -> Reply {
    ask(connection, &serde_json::to_vec(request).unwrap()).await
}

#[tokio::test]
async fn running_vm_reports_its_boot_and_stops_on_request() {
    let sandbox = Sandbox::new("stop");
    let supervisor =
        sandbox.start("echo 'wrenn: kernel up'; echo 'wrenn: starting envd'; exec sleep 1000");
    let connection = sandbox.connect().await;
    let deadline = Instant::now() + DEADLINE;
    let status = loop {
        let Reply::Status(status) = request(&connection, &Request::Status).await else {
            panic!("no status");
        };
        if status.init_ms.is_some() {
            break status;
        }
        assert!(Instant::now() < deadline, "no mark: {status:?}");
    };
    assert!(status.kernel_ms.is_some() && status.vmm_pid > 0);
    let process = PathBuf::from(format!("/proc/{}", status.vmm_pid));
    assert!(process.exists());

    assert_eq!(request(&connection, &Request::Stop).await, Reply::Stopped);
    supervisor.join().unwrap().unwrap();
    assert!(!process.exists(), "the VMM still exists");
    assert!(sandbox.final_status().requested);
    let console = fs::read_to_string(sandbox.dir.join(files::CONSOLE)).unwrap();
    assert!(console.contains("wrenn: kernel up"));
}

#[tokio::test]
async fn vm_that_exits_leaves_its_reason() {
    let sandbox = Sandbox::new("end");
    let supervisor = sandbox.start("read line; exit 3");
    let outcome = supervisor.join().unwrap();
    assert!(
        matches!(outcome, Err(SupervisorError::Ended(_))),
        "{outcome:?}"
    );
    let status = sandbox.final_status();
    assert!(!status.requested);
    assert!(status.reason.contains("code 3"), "{}", status.reason);
}

#[tokio::test]
async fn killed_vm_is_distinguished_from_one_that_exits() {
    let sandbox = Sandbox::new("kill");
    let supervisor = sandbox.start("kill -9 $$");
    supervisor.join().unwrap().unwrap_err();
    let status = sandbox.final_status();
    assert!(
        status.reason.contains("killed (signal 9)"),
        "{}",
        status.reason
    );
}

#[tokio::test]
async fn invalid_message_is_rejected_and_changes_nothing() {
    let sandbox = Sandbox::new("garbage");
    let supervisor = sandbox.start("exec sleep 1000");
    let connection = sandbox.connect().await;
    for garbage in [&b"{"[..], b"null", b"{\"op\":\"explode\"}", &[0xff; 1000]] {
        let reply = ask(&connection, garbage).await;
        assert!(matches!(reply, Reply::Rejected { .. }), "{reply:?}");
    }
    let second = sandbox.connect().await;
    assert!(matches!(
        request(&second, &Request::Status).await,
        Reply::Status(_)
    ));
    assert_eq!(request(&connection, &Request::Stop).await, Reply::Stopped);
    supervisor.join().unwrap().unwrap();
}

/// Sends bytes to the metadata service as a guest would. Returns all bytes up to the end of the
/// connection.
fn ask_metadata(sandbox: &Sandbox, request: &str) -> String {
    let mut connection = sandbox.connect_to_metadata();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

#[tokio::test]
async fn gateway_serves_the_identity_of_the_guest() {
    let sandbox = Sandbox::new("mmds");
    let supervisor = sandbox.start("exec sleep 1000");
    let connection = sandbox.connect().await;
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
    let answer = ask_metadata(&sandbox, put);
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let (_, token) = answer.split_once("\r\n\r\n").unwrap();
    // An unexpected body must not matter.
    let get = format!(
        "GET / HTTP/1.1\r\nX-metadata-token: {token}\r\nAccept: application/json\r\nContent-Length: 5\r\n\r\nhello"
    );
    let answer = ask_metadata(&sandbox, &get);
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let data: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        data,
        serde_json::json!({
            "instanceID": "sb-0123abcd",
            "envID": "minimal",
            "address": "",
            // SHA-512 of `secret`.
            "accessTokenHash": "bd2b1aaf7ef4f09be9f52ce2d8d599674d81aa9d6a4421696dc4d93dd0619d68\
                2ce56b4d64a9ef097761ced99e0f67265b5f76085e5b0ee7ca4696b2ad6fe2b2",
        })
    );
    let garbage = ask_metadata(&sandbox, "\x16\x03\x01 hello\r\n\r\n");
    assert!(garbage.starts_with("HTTP/1.1 400 "), "{garbage}");

    // Idle connections delay other connections, but not forever.
    let silent: Vec<_> = (0..20).map(|_| sandbox.connect_to_metadata()).collect();
    let began = Instant::now();
    while !ask_metadata(&sandbox, &get).starts_with("HTTP/1.1 200 OK") {
        assert!(began.elapsed() < DEADLINE);
    }
    drop(silent);
    assert_eq!(request(&connection, &Request::Stop).await, Reply::Stopped);
    supervisor.join().unwrap().unwrap();
}

#[test]
fn directory_without_a_specification_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let driver = FakeDriver {
        script: "exec sleep 1000".into(),
        version: String::new(),
    };
    let error = run_with(dir.path(), None, &driver).unwrap_err();
    assert!(error.to_string().contains("spec.json"), "{error}");
}

/// True if a process is stopped by a signal, which stands in for paused virtual CPUs.
fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

#[test]
fn a_guest_that_writes_is_held_while_the_room_on_the_disk_is_used_up() {
    wrenn_test_host::enter();
    // The threads of the runtime start after this thread changed its namespaces, and share them.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let sandbox = Sandbox::new("room");
        let (tmpfs, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        let spec = fs::read(sandbox.dir.join(files::SPEC)).unwrap();
        let mut spec: SupervisorSpec = serde_json::from_slice(&spec).unwrap();
        nix::mount::mount(tmpfs, &sandbox.dir, tmpfs, flags, Some("size=64m")).unwrap();
        spec.disk_room_bytes = 32 << 20;
        let spec = serde_json::to_vec(&spec).unwrap();
        fs::write(sandbox.dir.join(files::SPEC), spec).unwrap();
        let (disk, filler) = (sandbox.dir.join(files::DISK), sandbox.dir.join("filler"));
        fs::write(&filler, vec![1; 40 << 20]).unwrap();
        // Writes in small steps, up to 8 MiB.
        let script = format!(
            "for i in $(seq 2048); do head -c 4096 /dev/zero >> {}; sleep 0.01; done; exec sleep 1000",
            disk.display()
        );
        let supervisor = sandbox.start(&script);
        let connection = sandbox.connect().await;
        let deadline = Instant::now() + DEADLINE;
        let until = async |held: bool| loop {
            let Reply::Status(status) = request(&connection, &Request::Status).await else {
                panic!("no status");
            };
            if status.waits_for_disk == held && is_stopped(status.vmm_pid) == held {
                return status;
            }
            assert!(Instant::now() < deadline, "held: {held}: {status:?}");
        };
        let held = until(true).await;
        // It is not the caller's pause, and the VM can be stopped.
        assert!(!held.paused);
        fs::remove_file(&filler).unwrap();
        until(false).await;
        assert_eq!(request(&connection, &Request::Stop).await, Reply::Stopped);
        supervisor.join().unwrap().unwrap();
        let detach = nix::mount::MntFlags::MNT_DETACH;
        nix::mount::umount2(&sandbox.dir, detach).unwrap();
    });
}

#[tokio::test]
async fn dns_requests_to_the_gateway_reach_a_server_on_the_hosts_loopback() {
    let server = UdpSocket::bind("127.0.78.53:53").unwrap();
    std::thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((length, from)) = server.recv_from(&mut packet) {
            packet[2] |= 0x80;
            let _ = server.send_to(&packet[..length], from);
        }
    });
    let sandbox = Sandbox::new("dns");
    let path = sandbox.dir.join(files::SPEC);
    let mut spec: SupervisorSpec = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    spec.dns_upstreams = vec![[127, 0, 78, 53].into()];
    fs::write(&path, serde_json::to_vec(&spec).unwrap()).unwrap();
    let supervisor = sandbox.start("exec sleep 1000");
    let connection = sandbox.connect().await;
    // The services at the gateway run before the supervisor answers.
    let status = request(&connection, &Request::Status).await;
    assert!(matches!(status, Reply::Status(_)), "{status:?}");
    let namespace = fs::File::open(sandbox.namespace.path()).unwrap();
    let resolve = move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.connect("169.254.0.22:53").unwrap();
        socket.send(b"\x12\x34\x01\0\0\0\0\0\0\0\0\0").unwrap();
        let mut reply = [0; 512];
        let length = socket.recv(&mut reply).unwrap();
        reply[..length].to_vec()
    };
    let reply = std::thread::spawn(resolve).join().unwrap();
    assert_eq!(reply, b"\x12\x34\x81\0\0\0\0\0\0\0\0\0");
    assert_eq!(request(&connection, &Request::Stop).await, Reply::Stopped);
    supervisor.join().unwrap().unwrap();
}
