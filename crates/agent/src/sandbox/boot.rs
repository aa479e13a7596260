//! The steps of a create, from nothing to a guest that answers.
//!
//! Each step notes in [`Resources`] what it is about to make; the owner frees all of that if any step fails. Between the
//! steps, and in the long ones, an abort is noticed.

use std::{net::IpAddr, time::Duration};

use rand::RngExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wrenn_proto::supervise::{NetworkSpec, SupervisorSpec, files};

use super::{
    Plan, Running, Sandbox,
    error::CreateError,
    resources::{HostParts, Resources},
};
use crate::{
    cgroup::Limits,
    disk,
    envd_client::{EnvdClient, Init},
    folder::{BootTimes, Folder, FolderError},
    network,
    supervisor::{Supervisor, SupervisorError, final_reason},
};

/// Pause between two looks at a guest that boots.
const POLL: Duration = Duration::from_millis(15);

/// Version of `spec.json`.
const SPEC_VERSION: u32 = 1;

/// Why a boot should stop.
#[derive(Debug, Clone)]
pub(super) struct Abort {
    /// Somebody destroys the sandbox.
    pub(super) destroyed: CancellationToken,
    /// The agent ends.
    pub(super) shutdown: CancellationToken,
}

impl Abort {
    fn check(&self) -> Result<(), CreateError> {
        if self.destroyed.is_cancelled() {
            Err(CreateError::Destroyed)
        } else if self.shutdown.is_cancelled() {
            Err(CreateError::ShuttingDown)
        } else {
            Ok(())
        }
    }

    async fn requested(&self) -> CreateError {
        tokio::select! {
            () = self.destroyed.cancelled() => CreateError::Destroyed,
            () = self.shutdown.cancelled() => CreateError::ShuttingDown,
        }
    }
}

/// What the steps of a boot work on.
pub(super) struct Boot<'a> {
    pub(super) host: &'a HostParts,
    pub(super) sandbox: &'a Sandbox,
    pub(super) resources: &'a mut Resources,
    pub(super) abort: Abort,
    /// When the create began.
    pub(super) began: Instant,
}

impl Boot<'_> {
    /// All of it. What was made is in `resources`, whatever becomes of it.
    pub(super) async fn run(&mut self, plan: &Plan) -> Result<Running, CreateError> {
        let claimed = self.host.folders.claim(&plan.id);
        let folder = claimed.map_err(CreateError::Folder)?;
        self.resources.folder = Some(folder.clone());
        let network = self.make_network(plan).await?;
        self.abort.check()?;
        self.resources.cgroup = true;
        let limits = Limits::for_guest(plan.memory_mib, plan.vcpus);
        let cgroups = self.host.cgroups.create(&plan.id, limits)?;
        let spec = self.make_spec(plan, network, cgroups);
        self.resources.disk = true;
        disk::create(folder.path(), plan.disk_mib, spec.uid).await?;
        self.abort.check()?;
        write_spec(&folder, &spec).await?;
        let mut times = BootTimes {
            prepared_ms: ms_since(self.began),
            ..BootTimes::default()
        };
        let started_ms = times.prepared_ms;
        self.start_supervisor(&folder).await?;
        let running = self
            .await_guest(&folder, &spec, &mut times, started_ms)
            .await?;
        tracing::info!(sandbox_id = %plan.id, ?times, "sandbox runs");
        Ok(running)
    }

    async fn make_network(&mut self, plan: &Plan) -> Result<NetworkSpec, CreateError> {
        let slot = self.host.slots.claim(&plan.id)?;
        self.resources.slot = Some(slot);
        let network = network::create(slot, plan.egress).await?;
        self.sandbox.set_host_ip(network.host_ip);
        Ok(network)
    }

    fn make_spec(
        &self,
        plan: &Plan,
        network: NetworkSpec,
        cgroups: Vec<std::path::PathBuf>,
    ) -> SupervisorSpec {
        let config = &self.host.config;
        let slot = self.resources.slot;
        SupervisorSpec {
            version: SPEC_VERSION,
            id: plan.id.clone(),
            template: plan.template_name.clone(),
            accel: config.accel,
            vcpus: plan.vcpus,
            memory_mib: plan.memory_mib,
            disk_mib: plan.disk_mib,
            timeout_sec: plan.timeout_sec,
            created_unix_ms: plan.created_unix_ms,
            kernel: plan.template.kernel.clone(),
            initrd: plan.template.initrd.clone(),
            kernel_args: wrenn_image::kernel_args(config.accel),
            base_disk: plan.template.rootfs.clone(),
            uid: slot.map_or(u32::MAX, network::addresses::Slot::uid),
            cgroups,
            dns: if plan.egress {
                config.dns.clone()
            } else {
                Vec::new()
            },
            network,
            envd_token: hex::encode(rand::rng().random::<[u8; 32]>()),
            envs: plan.envs.clone(),
            default_user: plan.template.default_user.clone(),
        }
    }

    async fn start_supervisor(&mut self, folder: &Folder) -> Result<(), CreateError> {
        let start = Supervisor::start(
            &self.host.config.wrenn_exe,
            folder,
            self.host.deadlines.machine,
        );
        let started = tokio::select! {
            started = start => started,
            // Dropping the start kills the supervisor.
            abort = self.abort.requested() => return Err(abort),
        };
        match started {
            Ok(supervisor) => {
                self.resources.supervisor = Some(supervisor);
                Ok(())
            }
            Err(error) => {
                log_last_words(folder);
                Err(CreateError::Supervisor(error))
            }
        }
    }

    /// Waits until the guest answers, and tells it what it must know. Also the rest of a boot that an earlier agent began.
    pub(super) async fn await_guest(
        &mut self,
        folder: &Folder,
        spec: &SupervisorSpec,
        times: &mut BootTimes,
        started_ms: u32,
    ) -> Result<Running, CreateError> {
        let Some(supervisor) = &self.resources.supervisor else {
            return Err(CreateError::Ended(final_reason(folder)));
        };
        let ip = IpAddr::V4(spec.network.host_ip);
        let envd = EnvdClient::new(ip, &spec.envd_token).map_err(CreateError::Guest)?;
        let set_up = async {
            while !envd.is_healthy().await {
                tokio::time::sleep(POLL).await;
            }
            times.envd_ms = ms_since(self.began);
            init(&envd, spec).await
        };
        let limit = self.host.deadlines.guest;
        let deadline = tokio::time::timeout(limit, set_up);
        let outcome = tokio::select! {
            // What makes waiting pointless is looked at first.
            biased;
            () = supervisor.gone() => Err(CreateError::Ended(final_reason(folder))),
            abort = self.abort.requested() => return Err(abort),
            answered = deadline => answered.unwrap_or(Err(CreateError::GuestSilent(limit))),
        };
        if let Err(error) = outcome {
            log_last_words(folder);
            return Err(error);
        }
        note_machine_times(supervisor, times, started_ms).await;
        // Without it the next agent would only wait for the guest again, so a failure is not the sandbox's end.
        if let Err(error) = folder.write_boot(times) {
            tracing::warn!(sandbox_id = %spec.id, error = super::error::chain(&error), "boot times not kept");
        }
        Ok(Running {
            envd,
            boot: *times,
            gone: CancellationToken::new(),
        })
    }
}

async fn init(envd: &EnvdClient, spec: &SupervisorSpec) -> Result<(), CreateError> {
    let init = Init {
        access_token: &spec.envd_token,
        env_vars: &spec.envs,
        default_user: &spec.default_user,
        timestamp: jiff::Timestamp::now().to_string(),
    };
    envd.init(&init).await.map_err(CreateError::Guest)
}

/// Adds what the supervisor measured, in milliseconds from its own start.
async fn note_machine_times(supervisor: &Supervisor, times: &mut BootTimes, started_ms: u32) {
    match supervisor.status().await {
        Ok(status) => {
            let since_create = |ms: Option<u32>| ms.map_or(0, |ms| ms.saturating_add(started_ms));
            times.vmm_started_ms = since_create(status.vmm_started_ms);
            times.kernel_ms = since_create(status.kernel_ms);
            times.init_ms = since_create(status.init_ms);
        }
        Err(error) => tracing::warn!(error = super::error::chain(&error), "no boot times"),
    }
}

/// Flushing to disk blocks, so it is done aside.
async fn write_spec(folder: &Folder, spec: &SupervisorSpec) -> Result<(), CreateError> {
    let (folder, spec) = (folder.clone(), spec.clone());
    let written = tokio::task::spawn_blocking(move || folder.write_spec(&spec)).await;
    written
        .unwrap_or_else(|lost| {
            Err(FolderError::Io {
                step: "write",
                path: files::SPEC.into(),
                source: std::io::Error::other(lost),
            })
        })
        .map_err(CreateError::Folder)
}

/// A create that fails takes its logs with it, so their end goes to the agent's.
fn log_last_words(folder: &Folder) {
    let supervisor = folder.tail(files::LOG, 2000);
    let console = folder.tail(files::CONSOLE, 2000);
    tracing::warn!(
        supervisor,
        console,
        "a sandbox did not start; its last words"
    );
}

fn ms_since(began: Instant) -> u32 {
    u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX)
}

impl From<SupervisorError> for CreateError {
    fn from(error: SupervisorError) -> Self {
        Self::Supervisor(error)
    }
}
