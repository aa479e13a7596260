//! Template snapshots: taken once after an image is built, so that a create is a restore.
//!
//! A short-lived agent without a service boots the template and runs the commands that most guests
//! run first, so that their files are in the page cache. It takes a snapshot and stores it in the
//! image directory. It then restores the snapshot once, to record the pages that a restore needs
//! for all later restores. A killed run leaves the same state as a killed agent, and the next run
//! cleans it up.
//!
//! A running agent renews a template snapshot that its host can no longer load (`renew`).
//!
//! The caller holds the store's lock ([`StoreLock`]). No other process boots templates there, or
//! removes the files that the snapshot is made from.

mod free_memory;
mod guest_command;
pub(crate) mod renew;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use thiserror_ext::AsReport as _;
use tokio::task::JoinError;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_image::{ImageStore, StoreLock};
use wrenn_model::{CpuModel, MachineSize, SandboxId, TemplateName};
use wrenn_proto::guest;
use wrenn_snapshot::layout;

use self::guest_command::{User, run_command};
use crate::{
    AgentConfig, AgentError, CgroupPolicy, Deadlines, HostLimits, Template,
    admission::CreateParams,
    host::HostCapacity,
    network::{ceiling::EgressCeiling, egress::Access},
    registry::Registry,
    sandbox::{
        BootPolicy, Plan, Sandbox, Source, actor::SandboxActors, adopt, resources::HostContext,
        service::SandboxService,
    },
    server,
    snapshots::{self, SnapshotRef, TemplateSnapshotState, template_snapshot_name},
    templates::image_mib,
    vmms::{VmmConfig, Vmms},
};

/// Commands that guests run first, as their template's default user: those of our own client and of
/// the E2B SDKs.
const FIRST_COMMANDS: [&[&str]; 4] = [
    &["/bin/true"],
    &["/bin/sh", "-c", "cat /etc/hostname; ls /"],
    &["/bin/bash", "-l", "-c", "echo hi"],
    &["python3", "-c", "print(1)"],
];

/// Maximum time to record the pages of a restored guest.
const RECORD_DEADLINE: Duration = Duration::from_secs(60);

/// Settings for making a template snapshot.
#[derive(Debug, Clone)]
pub struct TemplateSnapshotConfig {
    /// Directory of kernels, images and templates.
    pub images_dir: PathBuf,
    /// VMMs of this host.
    pub vmm: VmmConfig,
    /// CPU model of the guest.
    pub cpu: CpuModel,
    /// Program that implements `supervise`.
    pub wrenn_exe: PathBuf,
    /// IDs of the template snapshots that sandboxes of a running service depend on; they are not
    /// removed. `None` if they are not known.
    pub in_use: Option<Vec<String>>,
    /// Cancelled to interrupt the work.
    pub stop: CancellationToken,
}

/// Failure to make or remove a template snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateSnapshotError {
    /// The work was interrupted.
    #[error("interrupted")]
    Stopped,
    /// The components of the agent could not be set up.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A step failed.
    #[error("failed to {step}: {reason}")]
    Step {
        /// The step.
        step: &'static str,
        /// The failure, with its causes.
        reason: String,
    },
}

fn step_failed<E: std::error::Error>(
    step: &'static str,
) -> impl FnOnce(E) -> TemplateSnapshotError {
    move |error| TemplateSnapshotError::Step {
        step,
        reason: error.to_report_string(),
    }
}

/// Makes the snapshot of a template, unless a matching one exists. Returns true if it was made.
/// Calls `begins` before making it.
///
/// # Errors
/// See [`TemplateSnapshotError`].
pub async fn make(
    config: TemplateSnapshotConfig,
    lock: &StoreLock,
    name: &TemplateName,
    begins: impl FnOnce(),
) -> Result<bool, TemplateSnapshotError> {
    let store =
        ImageStore::open(&config.images_dir).map_err(step_failed("open the image directory"))?;
    let template = store
        .template(name)
        .map_err(step_failed("find the template"))?;
    let (_alone, host) = open(&config, store, lock).await?;
    let state = host.snapshots.template_snapshot_state(&template);
    let is_made = state == TemplateSnapshotState::Current;
    if !is_made {
        begins();
    }
    let _in_use = in_use(&host, &config)?;
    let actors = SandboxActors {
        host: Arc::new(host),
        registry: Arc::new(Registry::default()),
        shutdown: CancellationToken::new(),
        tasks: TaskTracker::new(),
        collection_waits: Arc::default(),
    };
    let made = async {
        clean_up(&actors).await?;
        if !is_made {
            snapshot_template(&actors, &template).await?;
        }
        Ok(!is_made)
    };
    let made = tokio::select! {
        made = made => made,
        () = config.stop.cancelled() => Err(TemplateSnapshotError::Stopped),
    };
    for left in actors.registry.list() {
        // Anything left is removed by the next run. The first failure is the one reported.
        let _ = left.destroy().await;
    }
    actors.shutdown.cancel();
    actors.tasks.close();
    actors.tasks.wait().await;
    made
}

/// Destroys the sandboxes that a killed run left behind.
async fn clean_up(actors: &SandboxActors) -> Result<(), TemplateSnapshotError> {
    const STEP: &str = "clean up after an earlier run";
    adopt::adopt_all(actors).await.map_err(step_failed(STEP))?;
    for left in actors.registry.list() {
        left.destroy().await.map_err(step_failed(STEP))?;
    }
    Ok(())
}

/// Opens the components of an agent for the image directory, and takes the lock of its work
/// directory.
async fn open(
    config: &TemplateSnapshotConfig,
    store: ImageStore,
    _lock: &StoreLock,
) -> Result<(std::fs::File, HostContext), TemplateSnapshotError> {
    let work = store.template_snapshot_dir();
    std::fs::create_dir_all(&work).map_err(step_failed("create the work directory"))?;
    let lock = server::lock(&work)?;
    let agent = agent_config(config, &work);
    let host = server::open_parts(agent, Arc::new(store), Deadlines::default()).await?;
    Ok((lock, host))
}

/// Removes the snapshots of a template.
///
/// # Errors
/// If they cannot be removed.
pub async fn remove(
    config: TemplateSnapshotConfig,
    lock: &StoreLock,
    name: &TemplateName,
) -> Result<(), TemplateSnapshotError> {
    if !config.images_dir.join("snapshots").is_dir() {
        return Ok(());
    }
    let store =
        ImageStore::open(&config.images_dir).map_err(step_failed("open the image directory"))?;
    let (_alone, host) = open(&config, store, lock).await?;
    let _in_use = in_use(&host, &config)?;
    for variant in snapshots::VARIANTS {
        if let Ok(name) = template_snapshot_name(name, variant) {
            let removed = host.snapshots.unname(&name);
            removed.map_err(step_failed("remove the template snapshot"))?;
        }
    }
    let collected: Result<(), JoinError> =
        tokio::task::spawn_blocking(move || host.snapshots.collect(|| Some(Vec::new()))).await;
    collected.map_err(step_failed("remove the template snapshot"))
}

/// Takes references to the template snapshots that sandboxes of another process depend on.
fn in_use(
    host: &HostContext,
    config: &TemplateSnapshotConfig,
) -> Result<Vec<SnapshotRef>, TemplateSnapshotError> {
    let Some(builds) = &config.in_use else {
        let all = host.snapshots.pin_all();
        return all.map_err(step_failed("find the template snapshots"));
    };
    Ok(builds
        .iter()
        .filter_map(|build| host.snapshots.pin(build))
        .collect())
}

fn agent_config(config: &TemplateSnapshotConfig, work: &Path) -> AgentConfig {
    AgentConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        data_dir: work.to_owned(),
        images_dir: config.images_dir.clone(),
        token: String::new(),
        vmm: config.vmm.clone(),
        cpu: config.cpu.clone(),
        default_egress: false,
        egress_ceiling: EgressCeiling::default(),
        subnets: None,
        wrenn_exe: config.wrenn_exe.clone(),
        dns: Vec::new(),
        snapshots_dir: Some(config.images_dir.join("snapshots")),
        template_snapshots: false,
        prefetch: true,
        keep_page_cache: true,
        boot: BootPolicy::precise(),
        limits: HostLimits {
            // The guest is the operator's own image. A host without controllers can still make its
            // snapshot.
            cgroups: CgroupPolicy::Optional,
            ..HostLimits::default()
        },
        object_store: None,
    }
}

/// Returns the templates of an image directory whose creates boot, each with the reason. Only
/// reads, but blocks while the VMM prints its version; the directory exists.
///
/// # Errors
/// If the templates cannot be read.
pub fn cold_templates(
    images_dir: &Path,
    vmm: &VmmConfig,
    cpu: &CpuModel,
) -> Result<Vec<(TemplateName, String)>, TemplateSnapshotError> {
    let store = ImageStore::open(images_dir).map_err(step_failed("open the image directory"))?;
    let templates = store.each().map_err(step_failed("list the templates"))?;
    let vmms = Vmms::of_host(vmm).current();
    // A damaged template is reported elsewhere.
    let templates = templates.into_iter().flatten();
    let cold = templates.filter_map(|template| {
        let reason = snapshots::examine(images_dir, &template, &vmms, cpu)?;
        Some((template.name, reason.to_string()))
    });
    Ok(cold.collect())
}

async fn snapshot_template(
    actors: &SandboxActors,
    template: &Template,
) -> Result<(), TemplateSnapshotError> {
    let sandboxes = SandboxService::new(actors.clone());
    let size = MachineSize {
        vcpus: template.vcpus,
        memory_mib: template.memory_mib,
        disk_mib: image_mib(template).map_err(step_failed("find the template's image"))?,
    };
    let plan = create_params(&template.name).plan(Source::Image(template.clone()), size);
    let booted = create(&sandboxes, plan, "boot the template").await?;
    // Work that the guest does by itself after a boot would be repeated in every sandbox if the
    // snapshot were taken in the middle of it.
    let settled = format!("until [ -e {} ]; do sleep 0.1; done", guest::SETTLED);
    run_command(&booted, User::Default, &["/bin/sh", "-c", &settled]).await?;
    run_first_commands(&booted).await?;
    free_memory::await_reported(&booted).await?;
    let pin = booted
        .snapshot()
        .await
        .map_err(step_failed("snapshot the guest"))?;
    booted
        .destroy()
        .await
        .map_err(step_failed("destroy the guest after its snapshot"))?;
    record_working_set(&sandboxes, template, &pin).await?;
    let vmm = &sandboxes.host().config.vmm;
    let variant = snapshots::variant(vmm.boots, vmm.boot_accel());
    let name = template_snapshot_name(&template.name, variant).map_err(|name| {
        TemplateSnapshotError::Step {
            step: "name the template snapshot",
            reason: format!("`{name}` is too long"),
        }
    })?;
    let snapshots = &sandboxes.host().snapshots;
    snapshots
        .name(&name, &pin, true)
        .map_err(step_failed("name the template snapshot"))?;
    Ok(())
}

/// Restores the template snapshot once, so that the pages that a restore needs are recorded for all
/// later restores.
async fn record_working_set(
    sandboxes: &SandboxService,
    template: &Template,
    pin: &SnapshotRef,
) -> Result<(), TemplateSnapshotError> {
    let snapshot = sandboxes.host().snapshots.locate(pin);
    let snapshot = snapshot.map_err(step_failed("find the new snapshot"))?;
    let record = snapshot.restore(true).snapshot.join(layout::WORKING_SET);
    let capacity = HostCapacity::read(&sandboxes.host().config.data_dir)
        .map_err(step_failed("read the capacity of this host"))?;
    let plan = create_params(&template.name)
        .with_snapshot(&capacity, snapshot)
        .map_err(step_failed("restore the template snapshot"))?;
    let restored = create(sandboxes, plan, "restore the template snapshot").await?;
    run_first_commands(&restored).await?;
    let deadline = Instant::now() + RECORD_DEADLINE;
    while !record.exists() {
        if Instant::now() > deadline {
            return Err(TemplateSnapshotError::Step {
                step: "record the working set",
                reason: format!("timed out after {RECORD_DEADLINE:?}"),
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    restored
        .destroy()
        .await
        .map_err(step_failed("destroy the restored guest"))
}

fn create_params(template: &TemplateName) -> CreateParams {
    CreateParams {
        id: SandboxId::random(),
        template_name: template.clone(),
        timeout_sec: 0,
        access: Access::default(),
        envs: std::collections::BTreeMap::new(),
        installation: String::new(),
    }
}

async fn create(
    sandboxes: &SandboxService,
    plan: Plan,
    step: &'static str,
) -> Result<Arc<Sandbox>, TemplateSnapshotError> {
    let memory = sandboxes.reserve(plan.size).map_err(step_failed(step))?;
    let pending = sandboxes.start(plan, memory).map_err(step_failed(step))?;
    pending.wait().await.map_err(step_failed(step))
}

async fn run_first_commands(sandbox: &Sandbox) -> Result<(), TemplateSnapshotError> {
    for command in FIRST_COMMANDS {
        run_command(sandbox, User::Default, command).await?;
    }
    Ok(())
}
