//! The agent's life: take the data directory, adopt what is there, serve, let go.

use std::{
    fs, io,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::RngExt as _;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_image::ImageStore;
use wrenn_proto::supervise::Accel;

use crate::{
    cgroup::Cgroups,
    folder::Folders,
    host,
    network::{self, slot::Slots},
    registry::Registry,
    rpc,
    sandbox::{BootPolicy, Boots, adopt, owner::Owners, resources::HostParts},
    snapshots::Snapshots,
    templates::TemplateSource,
};

/// How long calls may go on once the agent is to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// How long creates that are given up may take to free what they made.
const ROLLBACK_DEADLINE: Duration = Duration::from_secs(30);

/// Settings of an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where to serve.
    pub listen: SocketAddr,
    /// Where the sandboxes' folders are.
    pub data_dir: PathBuf,
    /// Where kernels, images and templates are.
    pub images_dir: PathBuf,
    /// What callers must know.
    pub token: String,
    /// How guest code runs.
    pub accel: Accel,
    /// Whether a sandbox may reach the world when its request does not say.
    pub default_egress: bool,
    /// The program that has `supervise`.
    pub wrenn_exe: PathBuf,
    /// Nameservers of sandboxes that may reach the world.
    pub dns: Vec<Ipv4Addr>,
    /// Where snapshots are; in the data directory unless given.
    pub snapshots_dir: Option<PathBuf>,
    /// Whether a sandbox of a template's own size is brought back from the template's booted guest instead of booted.
    pub warm: bool,
    /// Whether pages that were needed after the last restore are loaded ahead of the guest.
    pub prefetch: bool,
    /// Whether frozen guests keep their page cache: larger snapshots, faster starts.
    pub keep_page_cache: bool,
    /// Attempts of boots from disk.
    pub boot: BootPolicy,
}

/// How long an agent waits for others. The default suits a slow host without hardware virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Deadlines {
    /// From a supervisor's start until its machine runs; with eight at once on a small host that takes seconds.
    pub machine: Duration,
    /// From there until the guest agent answers; with eight at once without hardware virtualization, most of a minute.
    pub guest: Duration,
    /// From asking a supervisor to end its machine until both are gone. It gives the machine 20 seconds itself.
    pub stop: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            machine: Duration::from_secs(60),
            guest: Duration::from_secs(120),
            stop: Duration::from_secs(25),
        }
    }
}

/// Why an agent could not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Another agent has the data directory.
    #[error("another host agent uses {0}: one data directory, one agent")]
    InUse(PathBuf),
    /// A system call failed.
    #[error("could not {step}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Its failure.
        #[source]
        source: io::Error,
    },
    /// The address cannot be served.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something that the host must have was not there or refused.
    #[error("could not {step}: {reason}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// The failure, with its causes.
        reason: String,
    },
}

/// Serves until `shutdown`, with the templates of `config.images_dir`. See [`serve_with`].
///
/// # Errors
/// See [`AgentError`].
pub async fn serve(
    config: AgentConfig,
    ready: impl FnOnce(SocketAddr),
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let store = ImageStore::open(&config.images_dir);
    let store = store.map_err(host_failed("open the images"))?;
    serve_with(
        config,
        Arc::new(store),
        Deadlines::default(),
        ready,
        shutdown,
    )
    .await
}

/// Serves until `shutdown`, with templates and deadlines of the caller's. `ready` is told the address once every sandbox of an earlier
/// agent is adopted. Sandboxes run on when this returns, and the next agent of the data directory adopts them.
///
/// # Errors
/// See [`AgentError`].
pub async fn serve_with(
    config: AgentConfig,
    templates: Arc<dyn TemplateSource>,
    deadlines: Deadlines,
    ready: impl FnOnce(SocketAddr),
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    fs::create_dir_all(&config.data_dir).map_err(failed("make the data directory"))?;
    let data_dir = fs::canonicalize(&config.data_dir).map_err(failed("find the data directory"))?;
    let _lock = lock(&data_dir)?;
    let config = AgentConfig { data_dir, ..config };
    // Before anything is touched: a port that is taken is the commonest mistake.
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|source| AgentError::Listen {
        address: config.listen,
        source,
    })?;
    let address = listener.local_addr().map_err(failed("find its address"))?;
    let token = config.token.clone();
    let owners = Owners {
        host: Arc::new(open_parts(config, templates, deadlines).await?),
        registry: Arc::new(Registry::default()),
        shutdown: shutdown.clone(),
        tasks: TaskTracker::new(),
    };
    adopt::adopt_all(&owners)
        .await
        .map_err(host_failed("adopt the sandboxes of an earlier agent"))?;
    tracing::info!(%address, sandboxes = owners.registry.list().len(), "host agent serves");
    ready(address);
    serve_until(listener, rpc::router(owners.clone(), &token), &shutdown).await?;
    owners.tasks.close();
    let rollbacks = owners.tasks.wait();
    if tokio::time::timeout(ROLLBACK_DEADLINE, rollbacks)
        .await
        .is_err()
    {
        tracing::warn!("creates are still being undone; the next agent cleans up");
    }
    Ok(())
}

pub(crate) async fn open_parts(
    config: AgentConfig,
    templates: Arc<dyn TemplateSource>,
    deadlines: Deadlines,
) -> Result<HostParts, AgentError> {
    network::prepare_host()
        .await
        .map_err(host_failed("prepare the host's network"))?;
    let data_dir = config.data_dir.clone();
    let root = config.snapshots_dir.clone();
    let root = root.unwrap_or_else(|| data_dir.join("snapshots"));
    let vmm = host::vmm().await;
    let tsc_khz = tokio::task::spawn_blocking(wrenn_sys::tsc::frequency_khz).await;
    let snapshots = Snapshots::open(&root, &config.images_dir, vmm, config.accel);
    Ok(HostParts {
        snapshots: Arc::new(snapshots.map_err(host_failed("open the snapshots"))?),
        config,
        templates,
        deadlines,
        folders: Folders::open(&data_dir).map_err(host_failed("open the sandboxes' folders"))?,
        slots: Slots::open(&data_dir).map_err(host_failed("open the network slots"))?,
        cgroups: Cgroups::detect(&instance(&data_dir)),
        tsc_khz: tsc_khz.map_err(host_failed("measure the processor's counter"))?,
        id: host_id(&data_dir)?,
        boots: Boots::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
    })
}

/// Serves; once `shutdown` comes, new calls are refused and those that go on have a moment to end.
async fn serve_until(
    listener: TcpListener,
    router: axum::Router,
    shutdown: &CancellationToken,
) -> Result<(), AgentError> {
    let serve =
        axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_DEADLINE).await;
    };
    tokio::select! {
        served = serve => served.map_err(failed("serve")),
        () = drained => Ok(()),
    }
}

/// Held as long as the agent lives; the kernel takes it back however that ends.
pub(crate) fn lock(data_dir: &Path) -> Result<fs::File, AgentError> {
    let file = fs::File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(data_dir.join("agent.lock"))
        .map_err(failed("open the data directory's lock"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(AgentError::InUse(data_dir.to_owned())),
        Err(error) => Err(failed("lock the data directory")(error.into())),
    }
}

/// Returns the id of a data directory, which its first agent chooses.
///
/// Rows of the control plane name it: a control plane never takes the sandboxes of another host,
/// or of another data directory, for lost ones of this host.
fn host_id(data_dir: &Path) -> Result<String, AgentError> {
    let path = data_dir.join("host-id");
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("read the host id")(error));
        }
        _ => {}
    }
    let id = hex::encode(rand::rng().random::<[u8; 16]>());
    let write = || {
        let temporary = data_dir.join("host-id.tmp");
        let mut file = fs::File::create(&temporary)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        fs::File::open(data_dir)?.sync_all()
    };
    write().map_err(failed("write the host id"))?;
    Ok(id)
}

/// A short name that stands for the data directory where a path does not fit.
fn instance(data_dir: &Path) -> String {
    let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
    hex::encode(&digest[..6])
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| AgentError::Io { step, source }
}

fn host_failed<E: std::error::Error>(step: &'static str) -> impl FnOnce(E) -> AgentError {
    move |error| AgentError::Host {
        step,
        reason: crate::sandbox::error::chain(&error),
    }
}
