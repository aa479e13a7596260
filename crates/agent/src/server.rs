//! Lifecycle of the agent: locks the data directory, adopts existing sandboxes, serves calls, and
//! leaves the sandboxes running at its end.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::RngExt as _;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use thiserror_ext::AsReport as _;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_disk::ToolJails;
use wrenn_image::ImageStore;
use wrenn_model::{CpuModel, EgressLimit};

use crate::{
    cgroup::{Cgroups, CommonLimits, IoLimit, policy},
    disk_space::DiskSpace,
    host::HostCapacity,
    limits::HostLimits,
    memory_ledger::MemoryLedger,
    network::{
        HostNetwork, NetworkSettings, TrafficLimits, addresses::Subnets, ceiling::EgressCeiling,
        slot::Slots,
    },
    registry::Registry,
    rpc,
    sandbox::{BootPolicy, Boots, actor::SandboxActors, adopt, resources::HostContext},
    sandbox_dir::SandboxDirs,
    snapshots::{ObjectStoreConfig, RemoteConfig, Snapshots},
    template_snapshot::renew,
    templates::TemplateSource,
    vmms::{VmmConfig, Vmms},
};

/// Maximum time for calls in progress to complete after a shutdown request.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum time for aborted creates to free their resources.
const ROLLBACK_DEADLINE: Duration = Duration::from_secs(30);

/// Priority of the agent for the kernel's OOM killer (`oom_score_adj`, `proc(5)`). Supervisors and
/// VMMs have higher ones.
const OOM_SCORE_ADJ: i32 = -500;

/// Settings of an agent.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Directory that contains the sandboxes' directories.
    pub data_dir: PathBuf,
    /// Directory that contains kernels, images and templates.
    pub images_dir: PathBuf,
    /// Token required from callers.
    pub token: String,
    /// VMMs of this host.
    pub vmm: VmmConfig,
    /// CPU model of VMs that boot. A restored VM has the model of its snapshot.
    pub cpu: CpuModel,
    /// True if a sandbox whose request does not specify egress may reach addresses beyond the host.
    pub default_egress: bool,
    /// The most that any sandbox of this host may reach.
    pub egress_ceiling: EgressCeiling,
    /// Subnets of the sandboxes; `None` to choose some that the host does not use.
    pub subnets: Option<Subnets>,
    /// Program that provides `supervise`.
    pub wrenn_exe: PathBuf,
    /// Nameservers of the host, which sandboxes use whose access permits them.
    pub dns: Vec<IpAddr>,
    /// Directory that contains the snapshots; by default in the data directory.
    pub snapshots_dir: Option<PathBuf>,
    /// True if a sandbox with the size of its template is restored from the template snapshot
    /// instead of booted.
    pub template_snapshots: bool,
    /// True if pages that were needed after the last restore are loaded ahead of the guest.
    pub prefetch: bool,
    /// True if snapshots keep the page cache of the guest: larger snapshots, faster starts.
    pub keep_page_cache: bool,
    /// Policy for boots from disk.
    pub boot: BootPolicy,
    /// Limits that the operator sets.
    pub limits: HostLimits,
    /// Object store of snapshots, if there is one.
    pub object_store: Option<ObjectStoreConfig>,
}

/// Maximum times that an agent waits for other components. The defaults suit a slow host without
/// hardware virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Deadlines {
    /// From the start of a supervisor until its VM runs. With eight at once on a small host, this
    /// takes seconds.
    pub machine: Duration,
    /// From the start of the VM until the guest agent answers. With eight at once without hardware
    /// virtualization, this takes most of a minute.
    pub guest: Duration,
    /// From the request to a supervisor to end its VM until both are gone. The supervisor itself
    /// gives the VM 20 seconds.
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

/// Failure to start or run an agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Another agent uses the data directory.
    #[error("the data directory {0} is in use by another host agent")]
    InUse(PathBuf),
    /// A system call failed.
    #[error("failed to {step}")]
    Io {
        /// Attempted operation.
        step: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The agent cannot listen on the address.
    #[error("failed to listen on {address}")]
    Listen {
        /// Address.
        address: SocketAddr,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A component that the host must provide is missing or failed.
    #[error("failed to {step}: {reason}")]
    Host {
        /// Attempted operation.
        step: &'static str,
        /// Failure with its causes.
        reason: String,
    },
}

/// Serves until `shutdown` is cancelled, with the templates in `config.images_dir`. See
/// [`serve_with`].
///
/// # Errors
/// See [`AgentError`].
pub async fn serve(
    config: AgentConfig,
    ready: impl FnOnce(SocketAddr),
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let store = ImageStore::open(&config.images_dir);
    let store = store.map_err(host_failed("open the image store"))?;
    serve_with(
        config,
        Arc::new(store),
        Deadlines::default(),
        ready,
        shutdown,
    )
    .await
}

/// Serves until `shutdown` is cancelled, with the caller's templates and deadlines. Calls `ready`
/// with the address once all sandboxes of an earlier agent are known; their VMs are examined while
/// the agent serves. The sandboxes keep running when this function returns, and the next agent of
/// the data directory adopts them.
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
    fs::create_dir_all(&config.data_dir).map_err(failed("create the data directory"))?;
    let data_dir = fs::canonicalize(&config.data_dir)
        .map_err(failed("resolve the path of the data directory"))?;
    let _lock = lock(&data_dir)?;
    let config = AgentConfig { data_dir, ..config };
    check_default_egress(&config)?;
    // Bound before anything is changed, because a port in use is the most common mistake.
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|source| AgentError::Listen {
        address: config.listen,
        source,
    })?;
    let address = listener
        .local_addr()
        .map_err(failed("read the address of the listener"))?;
    let token = config.token.clone();
    let actors = SandboxActors {
        host: Arc::new(open_parts(config, templates, deadlines).await?),
        registry: Arc::new(Registry::default()),
        shutdown: shutdown.clone(),
        tasks: TaskTracker::new(),
        collection_waits: Arc::default(),
    };
    adopt::adopt_all(&actors)
        .await
        .map_err(host_failed("adopt the sandboxes of an earlier agent"))?;
    let keep = actors.host.network.clone().keep(shutdown.clone());
    actors.tasks.spawn(keep);
    actors
        .tasks
        .spawn(renew::run(actors.host.clone(), shutdown.clone()));
    tracing::info!(%address, sandboxes = actors.registry.list().len(), "host agent ready");
    ready(address);
    serve_until(listener, rpc::router(actors.clone(), &token), &shutdown).await?;
    actors.tasks.close();
    let rollbacks = actors.tasks.wait();
    if tokio::time::timeout(ROLLBACK_DEADLINE, rollbacks)
        .await
        .is_err()
    {
        tracing::warn!("creates still being undone, clean-up left to the next agent");
    }
    Ok(())
}

/// Rejects settings with which every create that does not specify its egress would be rejected.
fn check_default_egress(config: &AgentConfig) -> Result<(), AgentError> {
    let EgressCeiling { limit, open, .. } = &config.egress_ceiling;
    if !config.default_egress || *limit != EgressLimit::Never || !open.is_empty() {
        return Ok(());
    }
    Err(AgentError::Host {
        step: "use the egress settings",
        reason: "`WRENN_EGRESS=allow` contradicts `WRENN_EGRESS_LIMIT=never`".to_owned(),
    })
}

pub(crate) async fn open_parts(
    config: AgentConfig,
    templates: Arc<dyn TemplateSource>,
    deadlines: Deadlines,
) -> Result<HostContext, AgentError> {
    let data_dir = config.data_dir.clone();
    let settings = NetworkSettings {
        ceiling: config.egress_ceiling.clone(),
        subnets: config.subnets,
        nameservers: config.dns.clone(),
        traffic: TrafficLimits {
            bytes_per_sec: u64::from(config.limits.sandbox.network_mbit_per_sec) * 1_000_000 / 8,
            connections: config.limits.sandbox.connections,
        },
    };
    let capacity =
        HostCapacity::read(&data_dir).map_err(failed("read the capacity of this host"))?;
    let memory = MemoryLedger::new(capacity.memory_total_mib, &config.limits);
    let cgroups = open_cgroups(&config, memory.usable_bytes())?;
    let network = HostNetwork::open(&instance(&data_dir), settings).await;
    let network = network.map_err(host_failed("prepare the host's network"))?;
    let root = config.snapshots_dir.clone();
    let root = root.unwrap_or_else(|| data_dir.join("snapshots"));
    protect_from_oom_killer();
    let vmms = Vmms::of_host(&config.vmm);
    let tsc_khz = tokio::task::spawn_blocking(wrenn_sys::tsc::frequency_khz).await;
    let for_tools = cgroups.clone();
    let tools = ToolJails::new(&config.wrenn_exe, move |number| {
        for_tools.create_for_tool(number).map_err(io::Error::other)
    });
    let disk_space = DiskSpace::open(&data_dir, &root, &config.limits)
        .map_err(failed("read the size of the data directory's file system"))?;
    let cache = data_dir.join("cache");
    let remote = config.object_store.as_ref().map(|store| RemoteConfig {
        store,
        cache: &cache,
        room_bytes: disk_space.room_bytes(),
    });
    let cpu = config.cpu.clone();
    let snapshots = Snapshots::open(&root, &config.images_dir, vmms, cpu, tools, remote);
    Ok(HostContext {
        snapshots: Arc::new(snapshots.map_err(host_failed("open the snapshot store"))?),
        templates,
        deadlines,
        sandbox_dirs: SandboxDirs::open(&data_dir)
            .map_err(host_failed("open the sandboxes' directories"))?,
        network: Arc::new(network),
        slots: Slots::open(&data_dir).map_err(host_failed("open the network slots"))?,
        cgroups,
        memory: Arc::new(memory),
        disk_space,
        tsc_khz: tsc_khz.map_err(host_failed(
            "measure the frequency of the time stamp counter",
        ))?,
        id: host_id(&data_dir)?,
        boots: Boots::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)),
        adoptions: Semaphore::new(adopt::MAX_AT_ONCE),
        background_compactions: Semaphore::new(1),
        config,
    })
}

/// Finds the cgroups of this host, and checks that sandboxes have the limits that the settings
/// require.
fn open_cgroups(config: &AgentConfig, memory_bytes: u64) -> Result<Cgroups, AgentError> {
    let HostLimits {
        sandbox, cgroups, ..
    } = &config.limits;
    let common = CommonLimits {
        memory_bytes,
        swap_bytes: u64::from(sandbox.swap_mib) * 1024 * 1024,
        io: IoLimit::of(sandbox, &config.data_dir),
    };
    let found = Cgroups::detect(&instance(&config.data_dir), common);
    policy::check(*cgroups, &found.missing(), &config.data_dir)
        .map_err(host_failed("limit sandboxes"))?;
    Ok(found)
}

/// Makes the kernel end VMs rather than this process if the host runs out of memory. A setting of
/// the process's manager takes precedence.
fn protect_from_oom_killer() {
    if let Err(error) = wrenn_sys::oom::set_score_adj_if_unset(OOM_SCORE_ADJ) {
        // In a container without the capability, the process keeps the default.
        tracing::info!(%error, "failed to lower the priority of this process for the OOM killer");
    }
}

/// Serves until `shutdown` is cancelled. Then rejects new calls, and gives calls in progress
/// [`DRAIN_DEADLINE`] to complete.
async fn serve_until(
    listener: TcpListener,
    router: axum::Router,
    shutdown: &CancellationToken,
) -> Result<(), AgentError> {
    // A connection may become a tunnel.
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| rpc::tune(stream));
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

/// Locks the data directory for as long as the returned file is open. The kernel releases the lock
/// however the agent ends.
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

/// Returns the ID of a data directory. The first agent of the directory chooses the ID.
///
/// Rows of the control plane contain the ID. A control plane therefore never takes the sandboxes of
/// another host, or of another data directory, for lost sandboxes of this host.
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
    wrenn_durable::replace(&path, format!("{id}\n").as_bytes(), 0o644)
        .map_err(failed("write the host id"))?;
    Ok(id)
}

/// Returns a short name for the data directory, for places where its path does not fit.
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
        reason: error.to_report_string(),
    }
}
