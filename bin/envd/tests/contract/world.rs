//! Isolated test environment for one agent: namespaces, users, file systems.

use std::{
    fs,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

/// Port of the agent.
pub(crate) const PORT: u16 = 49983;

/// Maximum duration of a test on a slow and busy machine.
const TEST_DEADLINE: Duration = Duration::from_secs(240);

/// Script that sets up the environment, starts the agent, and runs until the test closes standard
/// input.
const SCRIPT: &str = r#"
mount --make-rprivate /
mount -t tmpfs -o size=600m,mode=755 tmpfs /mnt
mkdir /mnt/etc /mnt/work /mnt/small
chmod 1777 /mnt/work
mount -t tmpfs -o size=1m,mode=777 tmpfs /mnt/small
cp -a /etc/. /mnt/etc/
mount --bind /mnt/etc /etc
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /home
sed -i '/:1000:/d;/^user:/d' /etc/passwd
sed -i '/:100[0-2]:/d;/^\(user\|team\|crew\):/d' /etc/group
echo 'user:x:1000:1000::/home/user:/bin/bash' >> /etc/passwd
printf 'user:x:1000:\nteam:x:1001:user\ncrew:x:1002:other,user\n' >> /etc/group
mkdir /home/user
chown 1000:1000 /home/user
rm -f /etc/locale.conf /etc/default/locale
hostname sandbox
ip link set lo up
ip link add eth0 type veth peer name far0
ip address add 169.254.0.21/30 dev eth0
ip link set eth0 up
if [ -n "${WORLD_GROUPS-}" ]; then
    mkdir /mnt/groups
    mount -t cgroup2 none /mnt/groups
    mkdir "$WORLD_GROUPS"
fi
"$@" &
echo ready
cat > /dev/null
"#;

/// One agent and its environment. Dropping it kills everything in it.
pub(crate) struct World {
    unshare: Child,
    _stdin: ChildStdin,
    /// First process in the environment, by its PID outside.
    init: u32,
    /// Agent, by its PID outside.
    pub(crate) agent: u32,
}

impl World {
    fn start(arguments: &[&str], envs: &[(&str, &str)]) -> Self {
        let mut command = Command::new("unshare");
        command
            .args([
                "--net",
                "--mount",
                "--pid",
                "--uts",
                "--fork",
                "--mount-proc",
                "--kill-child",
                "--",
            ])
            .args(["sh", "-euc", SCRIPT, "world", env!("CARGO_BIN_EXE_envd")])
            .args(arguments)
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .envs(envs.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut unshare = command.spawn().expect("unshare starts");
        let stdin = unshare.stdin.take().expect("a pipe");
        let mut word = [0; 6];
        let mut stdout = unshare.stdout.take().expect("a pipe");
        stdout
            .read_exact(&mut word)
            .expect("the test environment is set up; this needs root");
        assert_eq!(&word, b"ready\n");
        let init = children(unshare.id())[0];
        let agent = wait_for("the agent's process", || {
            children(init).into_iter().find(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "envd\n")
            })
        });
        Self {
            unshare,
            _stdin: stdin,
            init,
            agent,
        }
    }

    /// Moves the calling thread into the environment's network namespace.
    fn enter_network(&self) {
        let space = fs::File::open(format!("/proc/{}/ns/net", self.init)).expect("there");
        setns(space, CloneFlags::CLONE_NEWNET).expect("entered");
    }

    /// First process in the environment, by its PID outside.
    pub(crate) fn init_pid(&self) -> u32 {
        self.init
    }

    /// Returns the path outside of a path in the environment.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// Reads a file of the environment.
    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).expect(path)
    }

    /// Writes a file of the environment.
    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(path), content).expect(path);
    }

    /// True if a process of the environment, given by its PID inside, runs and is not a zombie.
    pub(crate) fn runs(&self, pid: u32) -> bool {
        let stat = fs::read_to_string(self.path(&format!("/proc/{pid}/stat")));
        stat.is_ok_and(|stat| !stat.rsplit_once(')').expect("a name").1.starts_with(" Z"))
    }

    /// Returns a field of the agent's `/proc/PID/status`, in KiB or as a count.
    pub(crate) fn agent_status(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent)).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let word = line.expect(field).split_whitespace().next().expect(field);
        word.parse().expect(field)
    }

    /// Restarts the measurement of the agent's peak memory, `VmHWM`.
    pub(crate) fn reset_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.agent), "5").expect("it runs");
    }

    /// Returns the number of open descriptors of the agent.
    pub(crate) fn descriptors(&self) -> usize {
        let list = fs::read_dir(format!("/proc/{}/fd", self.agent));
        list.expect("it runs").count()
    }

    /// Returns a URL of the agent.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", address())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let init = nix::unistd::Pid::from_raw(i32::try_from(self.init).expect("a pid"));
        // The end of its first process ends a PID namespace.
        let _ = nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL);
        let _ = self.unshare.wait();
    }
}

/// Address of the agent, for threads in the environment's network namespace.
pub(crate) fn address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, PORT))
}

/// Sets up an environment with an agent, and runs a test on a thread in its network namespace.
pub(crate) fn run(test: impl AsyncFnOnce(&World)) {
    run_with(&[], &[], test);
}

/// Same as [`run`], with arguments and environment variables for the agent.
pub(crate) fn run_with(arguments: &[&str], envs: &[(&str, &str)], test: impl AsyncFnOnce(&World)) {
    let world = World::start(arguments, envs);
    world.enter_network();
    wait_for("the agent listens", || TcpStream::connect(address()).ok());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let done = tokio::time::timeout(TEST_DEADLINE, test(&world)).await;
        done.expect("the test ends in time");
    });
}

/// Returns the PIDs of a process's children.
fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Polls until there is a value.
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "timed out waiting for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Same as [`wait_for`], but other tasks of the test keep running.
pub(crate) async fn eventually(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ask().await {
        assert!(Instant::now() < deadline, "timed out waiting for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
