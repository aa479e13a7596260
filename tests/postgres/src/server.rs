//! Running server.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    certificates::Certificates,
    cluster,
    command::{give_away, postgres, run},
    directory::Directory,
};

/// Superuser of the servers.
pub(crate) const USER: &str = "wrenn";

/// Number in the name of the Unix socket of a server without TCP.
const SOCKET_PORT: u16 = 5432;

/// Maximum time of a start or a stop.
const DEADLINE: Duration = Duration::from_secs(60);

/// Number of starts with another port if the chosen port is taken meanwhile.
const PORT_ATTEMPTS: u32 = 5;

/// Server with its data directory. Stops and removes the directory when it is dropped.
pub struct Server {
    directory: Directory,
    port: u16,
    tls: bool,
    process: Option<Child>,
    databases: AtomicU32,
}

impl Server {
    /// Returns the server of this process, which ends with the process. `cache` is the directory
    /// for the initialized data directory.
    ///
    /// # Panics
    /// If the server does not start.
    pub fn shared(cache: &Path) -> &'static Self {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(|| match Self::start(cache) {
            Ok(server) => server,
            Err(error) => panic!("failed to start PostgreSQL: {error:#}"),
        })
    }

    /// Starts a server on a Unix socket.
    ///
    /// # Errors
    /// If PostgreSQL is not installed or does not start.
    pub fn start(cache: &Path) -> Result<Self> {
        let mut server = Self::new(cache)?;
        server.restart()?;
        Ok(server)
    }

    /// Starts a server on a Unix socket, and with TLS on a port of 127.0.0.1.
    ///
    /// # Errors
    /// If PostgreSQL is not installed or does not start.
    pub fn start_with_tls(cache: &Path, certificates: &Certificates) -> Result<Self> {
        let mut server = Self::new(cache)?;
        server.tls = true;
        for (from, to) in [
            (&certificates.certificate, "server.crt"),
            (&certificates.key, "server.key"),
        ] {
            let to = server.data().join(to);
            fs::copy(from, &to).context("failed to copy a certificate")?;
            run(Command::new("chmod").arg("600").arg(&to))?;
            give_away(&to)?;
        }
        for _ in 1..PORT_ATTEMPTS {
            server.port = free_port()?;
            if server.restart().is_ok() {
                return Ok(server);
            }
        }
        server.port = free_port()?;
        server.restart()?;
        Ok(server)
    }

    fn new(cache: &Path) -> Result<Self> {
        let server = Self {
            directory: Directory::new()?,
            port: SOCKET_PORT,
            tls: false,
            process: None,
            databases: AtomicU32::new(0),
        };
        cluster::copy_to(&server.data(), cache)?;
        Ok(server)
    }

    /// Creates an empty database. Returns its URL.
    ///
    /// # Errors
    /// If the server is not running.
    pub fn create_database(&self) -> Result<String> {
        let number = self.databases.fetch_add(1, Ordering::Relaxed);
        let name = format!("test{number}");
        let mut createdb = postgres("createdb")?;
        createdb.arg("-h").arg(self.directory.path()).args([
            "-p",
            &self.port.to_string(),
            "-U",
            USER,
            &name,
        ]);
        run(&mut createdb)?;
        Ok(self.url(&name))
    }

    /// Returns the URL of a database at the Unix socket.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let (directory, port) = (self.directory.path().display(), self.port);
        format!("postgres://{USER}@/{database}?host={directory}&port={port}&sslmode=disable")
    }

    /// Returns the URL of a database at the TCP port, without `sslmode`.
    #[must_use]
    pub fn tcp_url(&self, host: &str, database: &str) -> String {
        format!("postgres://{USER}@{host}:{}/{database}", self.port)
    }

    /// Stops the server at once, as a crash would. Its clients lose their connections.
    ///
    /// # Errors
    /// If the server does not end.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        run(Command::new("kill").args(["-QUIT", &process.id().to_string()]))?;
        wait_until("the server has ended", || Ok(process.try_wait()?.is_some()))
    }

    /// Starts the server again, with its data.
    ///
    /// # Errors
    /// If the server does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let pid_file = self.data().join("postmaster.pid");
        // A server that was stopped at once may leave this file.
        _ = fs::remove_file(&pid_file);
        let log = self.directory.path().join("log");
        let command = self.command(&log)?;
        self.process = Some(spawn(command)?);
        wait_until("the server is ready", || {
            if let Some(process) = &mut self.process
                && let Some(status) = process.try_wait()?
            {
                self.process = None;
                let log = fs::read_to_string(&log).unwrap_or_default();
                bail!("the server ended ({status}): {log}");
            }
            let text = fs::read_to_string(&pid_file).unwrap_or_default();
            Ok(text
                .lines()
                .nth(7)
                .is_some_and(|state| state.trim() == "ready"))
        })
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn command(&self, log: &Path) -> Result<Command> {
        let log = File::create(log).context("failed to create the server's log")?;
        let addresses = if self.tls { "127.0.0.1" } else { "" };
        let mut command = postgres("postgres")?;
        command.arg("-D").arg(self.data());
        for (name, value) in [
            ("listen_addresses", addresses),
            ("port", &self.port.to_string()),
            ("ssl", if self.tls { "on" } else { "off" }),
            (
                "unix_socket_directories",
                &self.directory.path().display().to_string(),
            ),
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("shared_buffers", "16MB"),
            ("max_connections", "100"),
            ("autovacuum", "off"),
        ] {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        // A signal to the process group of the tests does not end the server before they end.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("failed to open the server's log")?)
            .stderr(log);
        Ok(command)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.stop();
    }
}

/// Starts a process in a thread that never ends. A parent-death signal is sent when the thread that
/// started the process ends, and the thread of a test ends before its process.
fn spawn(mut command: Command) -> Result<Child> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        _ = send.send(command.spawn());
        loop {
            thread::park();
        }
    });
    let process = receive.recv().context("failed to start a thread")?;
    process.context("failed to start the server")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("failed to find a free port")?;
    Ok(listener.local_addr()?.port())
}

fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !done()? {
        ensure!(Instant::now() < end, "timed out waiting until {what}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
