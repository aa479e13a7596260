//! Booted guests of templates: made once, after an image is built, so that a create is a restore.
//!
//! A short-lived agent without a service boots the template, has it run what most guests run first (so that it is in the page
//! cache), and freezes it in the images' directory. Then it restores it once: which pages that needs is recorded for all
//! who come later. A run that is killed leaves what a killed agent leaves, and the next run cleans it up.
//!
//! The caller holds the store's lock ([`StoreLock`]): nobody else boots templates there, or removes what this one is made of.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::RngExt as _;
use tokio::task::JoinError;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_image::{ImageStore, StoreLock};
use wrenn_proto::{
    SandboxId, TemplateName, limits,
    rpc::{hostagent::v1 as pb, process::ProcessConfig},
    supervise::Accel,
};
use wrenn_snapshot::layout;

use crate::{
    AgentConfig, AgentError, Deadlines, Template,
    network::access::Access,
    registry::Registry,
    rpc::{self, Wanted},
    sandbox::{Sandbox, Source, adopt, error::chain, owner::Owners, resources::HostParts},
    server,
    snapshots::{PinnedBuild, warm_name},
};

/// What guests run first, as their template's default user: our own client, and the SDKs of E2B.
const FIRST_COMMANDS: [&[&str]; 4] = [
    &["/bin/true"],
    &["/bin/sh", "-c", "cat /etc/hostname; ls /"],
    &["/bin/bash", "-l", "-c", "echo hi"],
    &["python3", "-c", "print(1)"],
];

/// How long a restored guest may take to have its pages recorded.
const RECORD_DEADLINE: Duration = Duration::from_secs(60);

/// Where the booted guest of a template is to be made.
#[derive(Debug, Clone)]
pub struct WarmConfig {
    /// Where kernels, images and templates are.
    pub images_dir: PathBuf,
    /// How guest code runs.
    pub accel: Accel,
    /// The program that has `supervise`.
    pub wrenn_exe: PathBuf,
    /// Builds of booted guests that sandboxes of a service run from: they are not removed. `None` if that is not known.
    pub in_use: Option<Vec<String>>,
    /// Ends the work before its time.
    pub stop: CancellationToken,
}

/// Why there is no booted guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WarmError {
    /// Somebody ended the work.
    #[error("it was interrupted")]
    Stopped,
    /// The parts of an agent could not be put together.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A step failed; the text says which and why.
    #[error("could not {step}: {reason}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The failure, with its causes.
        reason: String,
    },
}

fn failed<E: std::error::Error>(step: &'static str) -> impl FnOnce(E) -> WarmError {
    move |error| WarmError::Step {
        step,
        reason: chain(&error),
    }
}

/// Makes the booted guest of a template, unless there is one that fits. True if it was made; `begins` is called before that.
///
/// # Errors
/// See [`WarmError`].
pub async fn make(
    config: WarmConfig,
    lock: &StoreLock,
    name: &TemplateName,
    begins: impl FnOnce(),
) -> Result<bool, WarmError> {
    let store = ImageStore::open(&config.images_dir).map_err(failed("open the images"))?;
    let template = store.template(name).map_err(failed("find the template"))?;
    let (_alone, host) = open(&config, store, lock).await?;
    let is_made = host.snapshots.warm(&template).is_some();
    if !is_made {
        begins();
    }
    let _in_use = in_use(&host, &config)?;
    let owners = Owners {
        host: Arc::new(host),
        registry: Arc::new(Registry::default()),
        shutdown: CancellationToken::new(),
        tasks: TaskTracker::new(),
    };
    let made = async {
        clean_up(&owners).await?;
        if !is_made {
            freeze_template(&owners, &template).await?;
        }
        Ok(!is_made)
    };
    let made = tokio::select! {
        made = made => made,
        () = config.stop.cancelled() => Err(WarmError::Stopped),
    };
    for left in owners.registry.list() {
        // What is left is removed by the next run; the first failure is the one to tell.
        let _ = left.destroy().await;
    }
    owners.shutdown.cancel();
    owners.tasks.close();
    owners.tasks.wait().await;
    made
}

/// Ends what a run left that was killed.
async fn clean_up(owners: &Owners) -> Result<(), WarmError> {
    const STEP: &str = "clean up after an earlier run";
    adopt::adopt_all(owners).await.map_err(failed(STEP))?;
    for left in owners.registry.list() {
        left.destroy().await.map_err(failed(STEP))?;
    }
    Ok(())
}

/// The parts of an agent for the images' directory, and its right to work there.
async fn open(
    config: &WarmConfig,
    store: ImageStore,
    _lock: &StoreLock,
) -> Result<(std::fs::File, HostParts), WarmError> {
    let work = store.warm_dir();
    std::fs::create_dir_all(&work).map_err(failed("make a directory to work in"))?;
    let lock = server::lock(&work)?;
    let agent = agent_config(config, &work);
    let host = server::open_parts(agent, Arc::new(store), Deadlines::default()).await?;
    Ok((lock, host))
}

/// Removes the booted guests of a template.
///
/// # Errors
/// If they cannot be removed.
pub async fn remove(
    config: WarmConfig,
    lock: &StoreLock,
    name: &TemplateName,
) -> Result<(), WarmError> {
    if !config.images_dir.join("snapshots").is_dir() {
        return Ok(());
    }
    let store = ImageStore::open(&config.images_dir).map_err(failed("open the images"))?;
    let (_alone, host) = open(&config, store, lock).await?;
    let _in_use = in_use(&host, &config)?;
    for accel in [Accel::Kvm, Accel::Tcg] {
        if let Ok(name) = warm_name(name, accel) {
            let removed = host.snapshots.unname(&name);
            removed.map_err(failed("remove the booted guest"))?;
        }
    }
    let collected: Result<(), JoinError> =
        tokio::task::spawn_blocking(move || host.snapshots.collect(|| Some(Vec::new()))).await;
    collected.map_err(failed("remove the booted guest"))
}

/// Keeps the booted guests that sandboxes of another process run from.
fn in_use(host: &HostParts, config: &WarmConfig) -> Result<Vec<PinnedBuild>, WarmError> {
    let Some(builds) = &config.in_use else {
        let all = host.snapshots.pin_all();
        return all.map_err(failed("find the booted guests"));
    };
    Ok(builds
        .iter()
        .filter_map(|build| host.snapshots.pin(build))
        .collect())
}

fn agent_config(config: &WarmConfig, work: &Path) -> AgentConfig {
    AgentConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        data_dir: work.to_owned(),
        images_dir: config.images_dir.clone(),
        token: String::new(),
        accel: config.accel,
        default_egress: false,
        wrenn_exe: config.wrenn_exe.clone(),
        dns: Vec::new(),
        snapshots_dir: Some(config.images_dir.join("snapshots")),
        warm: false,
        prefetch: true,
        keep_page_cache: true,
    }
}

async fn freeze_template(owners: &Owners, template: &Template) -> Result<(), WarmError> {
    let disk_mib = rpc::image_mib(template).map_err(failed("find the template's image"))?;
    let wanted = wanted(&template.name)?;
    let plan = wanted.plan(
        Source::Image(template.clone()),
        template.vcpus,
        template.memory_mib,
        disk_mib,
    );
    let booted = run(owners, plan, "boot the template").await?;
    // What runs after a boot by itself would run again in every sandbox, if it were frozen in the middle of it.
    let settled = format!("until [ -e {} ]; do sleep 0.1; done", limits::SETTLED);
    run_command(owners, &booted, &["/bin/sh", "-c", &settled]).await?;
    run_first_commands(owners, &booted).await?;
    let pin = booted.freeze().await.map_err(failed("freeze the guest"))?;
    booted
        .destroy()
        .await
        .map_err(failed("end the guest that was frozen"))?;
    record_working_set(owners, template, &pin).await?;
    let name =
        warm_name(&template.name, owners.host.config.accel).map_err(|name| WarmError::Step {
            step: "name the booted guest",
            reason: format!("`{name}` is too long"),
        })?;
    let snapshots = &owners.host.snapshots;
    snapshots
        .name(&name, &pin, true)
        .map_err(failed("name the booted guest"))?;
    Ok(())
}

/// Restores the frozen guest once, so that what that needs is known to all who come later.
async fn record_working_set(
    owners: &Owners,
    template: &Template,
    pin: &PinnedBuild,
) -> Result<(), WarmError> {
    let moment = owners.host.snapshots.moment(pin);
    let moment = moment.map_err(failed("find what was frozen"))?;
    let record = moment.restore(true).snapshot.join(layout::WORKING_SET);
    let facts = crate::host::Facts::read(&owners.host.config.data_dir)
        .map_err(failed("find out what this host has"))?;
    let plan = wanted(&template.name)?
        .thawing(&facts, moment)
        .map_err(failed("restore the guest"))?;
    let restored = run(owners, plan, "restore the guest").await?;
    run_first_commands(owners, &restored).await?;
    let deadline = Instant::now() + RECORD_DEADLINE;
    while !record.exists() {
        if Instant::now() > deadline {
            return Err(WarmError::Step {
                step: "record the pages that a restore needs",
                reason: format!("nothing was recorded within {RECORD_DEADLINE:?}"),
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    restored
        .destroy()
        .await
        .map_err(failed("end the restored guest"))
}

fn wanted(template: &TemplateName) -> Result<Wanted, WarmError> {
    let id = format!("sb-{:08x}", rand::rng().random::<u32>());
    Ok(Wanted {
        id: id.parse::<SandboxId>().map_err(failed("make an id"))?,
        template_name: template.clone(),
        timeout_sec: 0,
        access: Access::default(),
        envs: std::collections::BTreeMap::new(),
    })
}

async fn run(
    owners: &Owners,
    plan: crate::sandbox::Plan,
    step: &'static str,
) -> Result<Arc<Sandbox>, WarmError> {
    let (sandbox, made) = rpc::begin_plan(owners, plan).map_err(failed(step))?;
    match made.await {
        Ok(made) => made.map_err(failed(step))?,
        Err(lost) => return Err(failed(step)(lost)),
    }
    Ok(sandbox)
}

async fn run_first_commands(owners: &Owners, sandbox: &Sandbox) -> Result<(), WarmError> {
    for command in FIRST_COMMANDS {
        run_command(owners, sandbox, command).await?;
    }
    Ok(())
}

async fn run_command(
    owners: &Owners,
    sandbox: &Sandbox,
    command: &[&str],
) -> Result<(), WarmError> {
    const STEP: &str = "run a first command in the guest";
    let (cmd, args) = command.split_first().unwrap_or((&"true", &[]));
    let request = pb::ExecRequest {
        id: sandbox.facts.id.to_string(),
        process: ProcessConfig {
            cmd: (*cmd).to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        }
        .into(),
        timeout_sec: 120,
        ..Default::default()
    };
    let done = rpc::exec(owners, request).await.map_err(failed(STEP))?;
    if done.exit_code != 0 {
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        return Err(WarmError::Step {
            step: STEP,
            reason: format!("`{cmd}` ended with code {}: {said}", done.exit_code),
        });
    }
    Ok(())
}
