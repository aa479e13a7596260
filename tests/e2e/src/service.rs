//! `wrenn up` of a test.

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    Sandbox,
    wait::{GENEROUS, patient, until},
};

/// Running service with its data directory.
pub struct Service {
    child: Option<Child>,
    dir: tempfile::TempDir,
    listen: String,
    agent_listen: String,
    traffic_listen: String,
    /// Holds the claims of the three ports.
    _ports: [fs::File; 3],
    key: String,
    fault: Option<String>,
    /// File name of the database in the data directory, if it is not the default one.
    database: Option<String>,
    /// Directory of the programs and templates of another release, if that one is used.
    release: Option<PathBuf>,
    /// Image directory, if it is not that of the test run.
    images: Option<PathBuf>,
    /// Further environment variables.
    settings: BTreeMap<String, String>,
    http: reqwest::Client,
}

impl Service {
    /// Starts a service on free ports with an empty data directory, and waits until it responds.
    ///
    /// # Errors
    /// The service does not respond. The error contains its log.
    pub async fn start() -> Result<Self> {
        Self::start_in(&std::env::temp_dir()).await
    }

    /// Same as [`start`](Self::start), with the data directory below `root`.
    ///
    /// # Errors
    /// Same as [`start`](Self::start).
    pub async fn start_in(root: &Path) -> Result<Self> {
        let mut service = Self::new(root)?;
        service.start_again().await?;
        Ok(service)
    }

    /// Same as [`start`](Self::start), with the programs and templates of another release.
    ///
    /// # Errors
    /// Same as [`start`](Self::start).
    pub async fn start_release(release: &Path) -> Result<Self> {
        let mut service = Self::new(&std::env::temp_dir())?;
        service.release = Some(release.to_owned());
        service.images = Some(release.join("images"));
        service.start_again().await?;
        Ok(service)
    }

    /// Same as [`start`](Self::start), with another image directory.
    ///
    /// # Errors
    /// Same as [`start`](Self::start).
    pub async fn start_with_images(images: &Path) -> Result<Self> {
        let mut service = Self::new(&std::env::temp_dir())?;
        service.images = Some(images.to_owned());
        service.start_again().await?;
        Ok(service)
    }

    /// Same as [`start`](Self::start), with a setting: an environment variable.
    ///
    /// # Errors
    /// Same as [`start`](Self::start).
    pub async fn start_with(name: &str, value: &str) -> Result<Self> {
        let mut service = Self::new(&std::env::temp_dir())?;
        service.set(name, Some(value));
        service.start_again().await?;
        Ok(service)
    }

    /// Same as [`start`](Self::start), with another image directory, if one is given, and with
    /// settings: environment variables.
    ///
    /// # Errors
    /// Same as [`start`](Self::start).
    pub async fn start_configured(
        images: Option<&Path>,
        settings: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut service = Self::new(&std::env::temp_dir())?;
        service.images = images.map(Path::to_owned);
        service.settings = settings.clone();
        service.start_again().await?;
        Ok(service)
    }

    /// Changes a setting, an environment variable, for the next start.
    pub fn set(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.settings.insert(name.to_owned(), value.to_owned()),
            None => self.settings.remove(name),
        };
    }

    /// Selects the programs of this release for the next start. The templates stay.
    pub fn use_this_release(&mut self) {
        self.release = None;
    }

    fn new(root: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("wrenn-e2e-")
            .tempdir_in(root)?;
        let [api, agent, traffic] = [free_port()?, free_port()?, free_port()?];
        let address = |port: u16| format!("127.0.0.1:{port}");
        Ok(Self {
            child: None,
            dir,
            listen: address(api.0),
            agent_listen: address(agent.0),
            traffic_listen: address(traffic.0),
            _ports: [api.1, agent.1, traffic.1],
            key: String::new(),
            fault: None,
            database: None,
            release: None,
            images: None,
            settings: BTreeMap::new(),
            http: reqwest::Client::new(),
        })
    }

    /// Starts the service on the same data directory and ports, after [`kill`](Self::kill) or
    /// [`stop`](Self::stop).
    ///
    /// # Errors
    /// The service does not respond in time.
    pub async fn start_again(&mut self) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = self
            .command("up")
            .args([
                "--listen",
                &self.listen,
                "--agent-listen",
                &self.agent_listen,
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("failed to start wrenn up")?;
        self.child = Some(child);
        until("wrenn up answers", GENEROUS, async || {
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().transpose()) {
                bail!("wrenn up exited: {:?}\n{}", status?, self.log());
            }
            let health = self.http.get(self.url("/health")).send().await;
            Ok(health.ok().filter(|h| h.status().is_success()).map(drop))
        })
        .await
        .with_context(|| self.log())?;
        self.key = fs::read_to_string(self.dir().join("api-key"))?
            .trim()
            .to_owned();
        Ok(())
    }

    /// Returns a CLI command that is configured for this service.
    #[must_use]
    pub fn command(&self, verb: &str) -> Command {
        let exe = self
            .release
            .as_ref()
            .map_or_else(wrenn_exe, |release| release.join("wrenn"));
        let mut command = Command::new(exe);
        command
            .arg(verb)
            .env("WRENN_DIR", self.dir())
            .env("WRENN_API_URL", self.url(""))
            .env("WRENN_TRAFFIC_LISTEN", &self.traffic_listen)
            .env("WRENN_EGRESS", "deny")
            .env("WRENN_FAULT", self.fault.as_deref().unwrap_or_default())
            .env_remove("WRENN_API_KEY")
            .env_remove("WRENN_CPU")
            .env_remove("DATABASE_URL")
            .envs(&self.settings);
        if let Some(images) = &self.images {
            command.env("WRENN_IMAGES_DIR", images);
        }
        if let Some(name) = &self.database {
            let file = self.dir().join(name);
            command.env(
                "DATABASE_URL",
                format!("sqlite://{}?mode=rwc", file.display()),
            );
        }
        command
    }

    /// Returns the data directory of the service.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the listen address for REST, `address:port`.
    #[must_use]
    pub fn listen(&self) -> &str {
        &self.listen
    }

    /// Returns the listen address for sandbox traffic, `address:port`.
    #[must_use]
    pub fn traffic_listen(&self) -> &str {
        &self.traffic_listen
    }

    /// Returns the service's key for clients of the E2B API.
    ///
    /// # Errors
    /// The service has not written a key.
    pub fn e2b_key(&self) -> Result<String> {
        let file = self.dir().join("e2b-api-key");
        let key = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        Ok(key.trim().to_owned())
    }

    /// Returns the API key of the service.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the process id of the service.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Returns the URL of a path.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.listen)
    }

    /// Returns the log of the service.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dir().join("wrenn-up.log")
    }

    /// Returns a request with the API key.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http
            .request(method, self.url(path))
            .header("X-API-Key", &self.key)
            .timeout(patient(Duration::from_secs(300)))
    }

    /// Sends JSON. Returns the status and the JSON response (null if the body is empty).
    ///
    /// # Errors
    /// The server does not respond, or the response is not JSON.
    pub async fn json(
        &self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<(StatusCode, Value)> {
        let response = self.request(method, path).json(body).send().await?;
        read_json(response).await
    }

    /// Same as [`json`](Self::json), with GET and without a body.
    ///
    /// # Errors
    /// Same as [`json`](Self::json).
    pub async fn get(&self, path: &str) -> Result<(StatusCode, Value)> {
        read_json(self.request(Method::GET, path).send().await?).await
    }

    /// Creates a sandbox with 256 MiB and waits until it runs.
    ///
    /// # Errors
    /// The sandbox does not start.
    pub async fn create(&self) -> Result<Sandbox<'_>> {
        self.create_with(json!({})).await
    }

    /// Creates a sandbox and waits until it runs.
    ///
    /// # Errors
    /// The sandbox does not start.
    pub async fn create_with(&self, body: Value) -> Result<Sandbox<'_>> {
        let sandbox = self.create_unready(body).await?;
        sandbox.until_status("running").await?;
        Ok(sandbox)
    }

    /// Creates a sandbox and returns at once.
    ///
    /// # Errors
    /// The server rejects the request.
    pub async fn create_unready(&self, mut body: Value) -> Result<Sandbox<'_>> {
        if body["memory_mb"].is_null() {
            body["memory_mb"] = json!(256);
        }
        if body["timeout_sec"].is_null() {
            body["timeout_sec"] = json!(0);
        }
        let (status, reply) = self.json(Method::POST, "/v1/sandboxes", &body).await?;
        ensure!(
            status == StatusCode::CREATED,
            "{status}: {reply}\n{}",
            self.log()
        );
        let id = reply["id"].as_str().context("no id")?.to_owned();
        Ok(Sandbox::new(self, id))
    }

    /// Selects another database for the next start. `None` selects the original one.
    pub fn use_database(&mut self, name: Option<&str>) {
        self.database = name.map(str::to_owned);
    }

    /// Kills the service without any cleanup, as a crash would.
    ///
    /// # Errors
    /// The service was not running.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("wrenn up is not running")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Returns true if the service exits by itself within 20 s.
    ///
    /// # Errors
    /// The service was not started, or its state cannot be determined.
    pub async fn has_died(&mut self) -> Result<bool> {
        let child = self.child.as_mut().context("wrenn up was not started")?;
        let died = until("wrenn up exits", Duration::from_secs(20), async || {
            Ok(child.try_wait()?)
        });
        Ok(died.await.is_ok())
    }

    /// Restarts the service with a failpoint, at which the service or its supervisors die
    /// (`WRENN_FAULT`, see `wrenn_sys::failpoint`); with `None`, without a failpoint. Running
    /// supervisors are not affected.
    ///
    /// # Errors
    /// The service does not respond in time.
    pub async fn restart_with_fault(&mut self, fault: Option<&str>) -> Result<()> {
        // The service may have exited already.
        let _ = self.kill();
        self.fault = fault.map(str::to_owned);
        self.start_again().await
    }

    /// Stops the service with SIGTERM and waits for its exit code.
    ///
    /// # Errors
    /// The service does not stop in time.
    pub async fn stop(&mut self) -> Result<i32> {
        let mut child = self.child.take().context("wrenn up is not running")?;
        kill(pid_of(&child), Signal::SIGTERM)?;
        let status = until("wrenn up stops", GENEROUS, async || Ok(child.try_wait()?)).await?;
        status.code().context("wrenn up was killed by a signal")
    }
}

impl Drop for Service {
    /// Destroys the sandboxes of the test, then ends the service.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of wrenn up ---\n{}", self.log());
        }
        let cleaned = self.destroy_all();
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if cleaned.is_err() {
            eprintln!("failed to destroy the sandboxes of the test: {cleaned:?}");
        }
    }
}

impl Service {
    fn destroy_all(&mut self) -> Result<()> {
        self.fault = None;
        let alive = self
            .child
            .as_mut()
            .is_some_and(|c| matches!(c.try_wait(), Ok(None)));
        if !alive {
            let child = self
                .command("up")
                .args([
                    "--listen",
                    &self.listen,
                    "--agent-listen",
                    &self.agent_listen,
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()?;
            self.child = Some(child);
        }
        let deadline = std::time::Instant::now() + patient(GENEROUS);
        while fs::read_dir(self.dir().join("sandboxes")).is_ok_and(|mut d| d.next().is_some()) {
            ensure!(std::time::Instant::now() < deadline, "sandboxes are left");
            let _ = self.command("sandbox").args(["rm", "--all"]).output();
            let unknown = self
                .command("sandbox")
                .args(["ls", "--unknown", "--quiet"])
                .output()?;
            for id in String::from_utf8_lossy(&unknown.stdout).lines() {
                let _ = self
                    .command("sandbox")
                    .args(["rm", "--unknown", id])
                    .output();
            }
        }
        Ok(())
    }
}

async fn read_json(response: reqwest::Response) -> Result<(StatusCode, Value)> {
    let status = response.status();
    let text = response.text().await?;
    let value = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))?
    };
    Ok((status, value))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

/// Returns a port that is free and that the kernel does not assign to outgoing connections, and the
/// file that claims it until it is closed: a service is stopped and started again on its ports, so
/// the tests that run beside it must not be given them.
fn free_port() -> Result<(u16, fs::File)> {
    const FIRST: u16 = 10_000;
    let given = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let end: u16 = given
        .split_whitespace()
        .next()
        .context("no port")?
        .parse()?;
    let count = end.saturating_sub(FIRST);
    ensure!(count > 0, "no port is free below {end}");
    for _ in 0..100 {
        let number = RandomState::new().build_hasher().finish() % u64::from(count);
        let port = FIRST + u16::try_from(number)?;
        let claim = claim(port)?;
        if let Some(claim) = claim
            && TcpListener::bind(("127.0.0.1", port)).is_ok()
        {
            return Ok((port, claim));
        }
    }
    bail!("no port is free from {FIRST} to {end}")
}

/// Claims a port among the tests of this machine. Returns `None` if another test has it.
fn claim(port: u16) -> Result<Option<fs::File>> {
    let dir = std::env::temp_dir().join("wrenn-e2e-ports");
    fs::create_dir_all(&dir)?;
    let file = fs::File::create(dir.join(port.to_string()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Returns the path of the tested `wrenn`: `WRENN_BIN`, or the program that `make test` built.
#[must_use]
pub fn wrenn_exe() -> PathBuf {
    std::env::var_os("WRENN_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/wrenn"),
        PathBuf::from,
    )
}
