//! Steps of a create or a resume, up to a guest that answers.
//!
//! Each step records in [`Resources`] what it is about to create. If a step fails, the sandbox's
//! actor frees everything that is recorded. An abort is noticed between the steps, and during the
//! long ones.

mod from_disk;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use connectrpc::{ConnectError, ErrorCode};
use sha2::{Digest as _, Sha256};
use thiserror_ext::AsReport as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wrenn_envd_client::{EnvdClient, Init, Recover};
use wrenn_model::{MachineSize, SandboxId};
use wrenn_proto::{
    guest,
    supervise::{NetworkSpec, SupervisorSpec, files},
};
use wrenn_sys::failpoint;

use super::{
    Plan, Running, Sandbox, Source,
    actor::Pins,
    error::CreateError,
    guest_dial::GuestDial,
    hardware::Hardware,
    resources::{HostContext, Resources},
};
use crate::{
    cgroup::Limits,
    disk,
    network::{addresses::Slot, egress::Access},
    sandbox_dir::{BootTimes, SandboxDir, SandboxDirError},
    snapshots::{ImageMemory, LocatedSnapshot},
    supervisor::{Supervisor, SupervisorError, final_reason},
};

pub(super) use from_disk::Attempt;

/// Interval between two attempts to reach a guest that starts.
const POLL: Duration = Duration::from_millis(15);

/// Maximum duration of one attempt to reach a restored guest. A request that was sent before the
/// guest listened, or on a connection that existed when the snapshot was taken, is never answered;
/// another attempt is.
const RECOVER_ATTEMPT: Duration = Duration::from_secs(20);

/// Version of `spec.json`.
const SPEC_VERSION: u32 = 1;

/// Requests to abort a boot.
#[derive(Debug, Clone)]
pub(super) struct Abort {
    /// Cancelled when a client destroys the sandbox.
    pub(super) destroyed: CancellationToken,
    /// Cancelled when the agent shuts down.
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

/// Environment that a VM is started in.
pub(super) struct MachineEnv {
    pub(super) network: NetworkSpec,
    pub(super) cgroups: Vec<std::path::PathBuf>,
    pub(super) supervisor_cgroups: Vec<std::path::PathBuf>,
    pub(super) uid: u32,
    pub(super) exporter_uid: u32,
}

/// Context of the steps of a boot.
pub(super) struct Boot<'a> {
    pub(super) host: &'a HostContext,
    pub(super) sandbox: &'a Sandbox,
    pub(super) resources: &'a mut Resources,
    pub(super) pins: &'a mut Pins,
    pub(super) abort: Abort,
    /// Start time of the create or the resume.
    pub(super) began: Instant,
}

impl Boot<'_> {
    /// Creates the sandbox. Everything that was created is recorded in `resources`, regardless of
    /// the outcome.
    pub(super) async fn run(&mut self, plan: &Plan) -> Result<Running, CreateError> {
        let claimed = self.host.sandbox_dirs.claim(&plan.id);
        let sandbox_dir = claimed.map_err(CreateError::SandboxDir)?;
        self.resources.sandbox_dir = Some(sandbox_dir.clone());
        let recorded = sandbox_dir.write_installation(&plan.installation);
        recorded.map_err(CreateError::SandboxDir)?;
        let parts = self.make_environment(&plan.access, plan.size).await?;
        let spec = self.make_spec(plan, parts);
        match &plan.source {
            Source::Image(_) => self.start(&sandbox_dir, &spec, None).await,
            Source::Snapshot(snapshot) => self.start(&sandbox_dir, &spec, Some(snapshot)).await,
        }
    }

    /// Creates network and cgroups, unless the boot is aborted.
    pub(super) async fn make_environment(
        &mut self,
        access: &Access,
        size: MachineSize,
    ) -> Result<MachineEnv, CreateError> {
        let network = self.make_network(access).await?;
        self.abort.check()?;
        self.resources.cgroup = true;
        let (id, groups) = (&self.sandbox.facts.id, &self.host.cgroups);
        groups.create(id, Limits::for_guest(size), Limits::for_supervisor(size))?;
        let slot = self.resources.slot;
        Ok(MachineEnv {
            network,
            cgroups: groups.directories(id),
            supervisor_cgroups: groups.supervisor_directories(id),
            uid: slot.map_or(u32::MAX, Slot::uid),
            exporter_uid: slot.map_or(u32::MAX, Slot::exporter_uid),
        })
    }

    /// Creates the disk and starts the VM. Returns when the guest answers.
    pub(super) async fn start(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        snapshot: Option<&LocatedSnapshot>,
    ) -> Result<Running, CreateError> {
        failpoint::hit("agent.start.parts", None);
        let Some(snapshot) = snapshot else {
            return self.boot_from_disk(sandbox_dir, spec, Attempt::First).await;
        };
        self.prepare(sandbox_dir, spec).await?;
        self.pins.origin = Some(snapshot.pin());
        // Reads whole files, which may take minutes.
        tokio::select! {
            biased;
            error = self.abort.requested() => return Err(error),
            verified = verify(self.host, snapshot) => verified?,
        }
        let memory = self.host.snapshots.memory(snapshot)?;
        let (mut times, started_ms) = self.prepared();
        let restore = spec.restore.as_ref();
        let is_remote = restore.is_some_and(|restore| restore.remote.is_some());
        self.start_supervisor(sandbox_dir, Some(&memory), is_remote)
            .await?;
        failpoint::hit("agent.start.supervised", None);
        let guest = self.await_guest(sandbox_dir, spec, &mut times, started_ms);
        let mut running = guest.await?;
        running.memory = Some(memory);
        failpoint::hit("agent.start.recovered", None);
        tracing::info!(sandbox_id = %spec.id, ?times, "sandbox running");
        Ok(running)
    }

    /// Creates the disk and writes the specification. Overwrites those of an earlier attempt.
    async fn prepare(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
    ) -> Result<(), CreateError> {
        self.resources.disk = true;
        disk::create(sandbox_dir.path(), spec.size.disk_mib, spec.uid).await?;
        self.abort.check()?;
        write_spec(sandbox_dir, spec).await?;
        failpoint::hit("agent.start.spec", None);
        Ok(())
    }

    /// Returns the times so far, and the time at which the supervisor starts, in milliseconds since
    /// the start of the create.
    fn prepared(&self) -> (BootTimes, u32) {
        let times = BootTimes {
            prepared_ms: ms_since(self.began),
            ..BootTimes::default()
        };
        (times, times.prepared_ms)
    }

    async fn make_network(&mut self, access: &Access) -> Result<NetworkSpec, CreateError> {
        let slot = self.host.slots.claim(&self.sandbox.facts.id)?;
        self.resources.slot = Some(slot);
        let network = self.host.network.create(slot, access).await?;
        self.sandbox.set_host_ip(Some(network.host_ip));
        Ok(network)
    }

    fn make_spec(&self, plan: &Plan, parts: MachineEnv) -> SupervisorSpec {
        let prefetch = self.host.config.prefetch;
        let (kernel, initrd, base_disk, default_user) = match &plan.source {
            Source::Image(image) => (
                image.kernel.clone(),
                image.initrd.clone(),
                image.rootfs.clone(),
                image.default_user.clone(),
            ),
            Source::Snapshot(snapshot) => snapshot.image(),
        };
        let snapshot = match &plan.source {
            Source::Image(_) => None,
            Source::Snapshot(snapshot) => Some(snapshot),
        };
        let nameservers = self.host.network.nameservers(&plan.access);
        let hardware = Hardware::choose(self.host, snapshot.map(AsRef::as_ref), parts.exporter_uid);
        SupervisorSpec {
            version: SPEC_VERSION,
            id: plan.id.clone(),
            template: plan.template_name.clone(),
            accel: hardware.accel,
            cpu_model: Some(hardware.cpu),
            machine: Some(hardware.machine),
            firecracker: hardware.firecracker,
            size: plan.size,
            timeout_sec: plan.timeout_sec,
            created_unix_ms: plan.created_unix_ms,
            kernel,
            initrd,
            kernel_args: hardware.kernel_args,
            base_disk,
            disk_layers: snapshot.map(|m| m.disk_layers()).unwrap_or_default(),
            restore: snapshot.map(|m| m.restore(prefetch)),
            uid: parts.uid,
            cgroups: parts.cgroups,
            supervisor_cgroups: parts.supervisor_cgroups,
            disk_rate: self.host.disk_rate(),
            dns: nameservers.guest,
            dns_upstreams: nameservers.upstreams,
            network: parts.network,
            envd_token: plan.envd_token.reveal().to_owned(),
            envs: plan.envs.clone(),
            default_user,
            disk_room_bytes: self.host.disk_space.room_bytes(),
        }
    }

    async fn start_supervisor(
        &mut self,
        sandbox_dir: &SandboxDir,
        memory: Option<&ImageMemory>,
        is_remote: bool,
    ) -> Result<(), CreateError> {
        // Until it is known to run or to have ended, also if killing it takes too long.
        self.resources.may_be_supervised = true;
        let start = Supervisor::start(
            &self.host.config.wrenn_exe,
            sandbox_dir,
            memory.map(ImageMemory::as_fd),
            is_remote,
            self.host.deadlines.machine,
        );
        let started = tokio::select! {
            started = start => started,
            // Dropping the future kills the supervisor.
            abort = self.abort.requested() => return Err(abort),
        };
        match started {
            Ok(supervisor) => {
                self.resources.supervisor = Some(Arc::new(supervisor));
                self.resources.may_be_supervised = false;
                Ok(())
            }
            Err(error) => {
                log_final_output(sandbox_dir);
                Err(CreateError::Supervisor(error))
            }
        }
    }

    /// Waits until the guest answers, and sends its settings. Also completes a boot that an earlier
    /// agent started.
    pub(super) async fn await_guest(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        times: &mut BootTimes,
        started_ms: u32,
    ) -> Result<Running, CreateError> {
        let Some(supervisor) = self.resources.supervisor.clone() else {
            return Err(CreateError::Ended(final_reason(sandbox_dir)));
        };
        let envd = guest_client(self.sandbox, spec).map_err(CreateError::Guest)?;
        let before = self.pins.origin.as_ref();
        let before = before.and_then(|pin| self.host.snapshots.guest_token(pin));
        let set_up = async {
            if let Some(token) = &before {
                // The guest continues at a point at which it answered. A health check first would
                // only cost time.
                while !recovered(&envd, token, spec).await? {
                    tokio::time::sleep(POLL).await;
                }
                times.envd_ms = ms_since(self.began);
                return Ok(());
            }
            while !envd.is_healthy().await {
                tokio::time::sleep(POLL).await;
            }
            times.envd_ms = ms_since(self.began);
            init(&envd, spec).await?;
            recover(&envd, spec).await.map_err(CreateError::Guest)
        };
        let limit = self.host.deadlines.guest;
        let deadline = tokio::time::timeout(limit, set_up);
        let outcome = tokio::select! {
            // Events that make waiting pointless are checked first.
            biased;
            () = supervisor.gone() => Err(CreateError::Ended(final_reason(sandbox_dir))),
            abort = self.abort.requested() => return Err(abort),
            answered = deadline => answered.unwrap_or(Err(CreateError::GuestSilent(limit))),
        };
        if let Err(error) = outcome {
            log_final_output(sandbox_dir);
            return Err(error);
        }
        note_machine_times(&supervisor, times, started_ms).await;
        // Without the record, the next agent only waits for the guest again. A failure is therefore
        // not the end of the sandbox.
        if let Err(error) = sandbox_dir.write_boot(times) {
            tracing::warn!(sandbox_id = %spec.id, error = error.to_report_string(), "failed to record the boot times");
        }
        Ok(Running {
            envd,
            boot: *times,
            cpu: spec.cpu(),
            accel: spec.accel,
            gone: CancellationToken::new(),
            memory: None,
        })
    }
}

/// Returns a client of the sandbox's guest agent. Does not connect yet.
pub(super) fn guest_client(
    sandbox: &Sandbox,
    spec: &SupervisorSpec,
) -> Result<EnvdClient, ConnectError> {
    let address = SocketAddr::from((spec.network.host_ip, guest::ENVD_PORT));
    let dial = GuestDial {
        address,
        connections: sandbox.guest_connections.clone(),
    };
    EnvdClient::new(Arc::new(dial), &spec.envd_token)
}

/// Gives a guest the identity of this sandbox. Until then, a restored guest still has the identity
/// of the snapshot, and its token.
async fn recover(envd: &EnvdClient, spec: &SupervisorSpec) -> Result<(), ConnectError> {
    let (id, template) = (spec.id.to_string(), spec.template.to_string());
    let recover = Recover {
        entropy: wrenn_envd_client::entropy(),
        sandbox_id: &id,
        template_id: &template,
        hostname: &id,
        machine_id: machine_id(&spec.id),
        env_vars: Some(&spec.envs),
        access_token: Some(&spec.envd_token),
        default_user: &spec.default_user,
        nameservers: Some(&spec.dns),
        mtu: Some(spec.network.mtu),
    };
    envd.recover(&recover).await
}

/// Tries to [`recover`] the guest. Returns false if the guest cannot be reached yet. A second
/// recovery is harmless, but by then the guest requires this sandbox's token.
async fn recovered(
    envd: &EnvdClient,
    token: &str,
    spec: &SupervisorSpec,
) -> Result<bool, CreateError> {
    let unrecovered = envd.showing(token).map_err(CreateError::Guest)?;
    let attempt = tokio::time::timeout(RECOVER_ATTEMPT, recover(&unrecovered, spec));
    let first_error = match attempt.await {
        Ok(Ok(())) => return Ok(true),
        Err(_) => return Ok(false),
        Ok(Err(error)) if error.code == ErrorCode::Unavailable => return Ok(false),
        Ok(Err(error)) => error,
    };
    let again = recover(envd, spec).await;
    again
        .map(|()| true)
        .map_err(|_| CreateError::Guest(first_error))
}

/// Returns a machine ID (32 hexadecimal digits) that is unique to the sandbox and stays the same
/// across its resumes.
fn machine_id(id: &SandboxId) -> String {
    let digest = Sha256::digest(format!("wrenn machine-id {id}"));
    hex::encode(&digest[..16])
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

/// Adds the times that the supervisor measured, in milliseconds since its own start.
async fn note_machine_times(supervisor: &Supervisor, times: &mut BootTimes, started_ms: u32) {
    match supervisor.status().await {
        Ok(status) => {
            let since_create = |ms: Option<u32>| ms.map_or(0, |ms| ms.saturating_add(started_ms));
            times.vmm_started_ms = since_create(status.vmm_started_ms);
            times.kernel_ms = since_create(status.kernel_ms);
            times.init_ms = since_create(status.init_ms);
        }
        Err(error) => tracing::warn!(
            error = error.to_report_string(),
            "failed to read the boot times"
        ),
    }
}

/// Verifies the files of a snapshot, on a blocking thread because reading may block.
async fn verify(host: &HostContext, snapshot: &LocatedSnapshot) -> Result<(), CreateError> {
    let (snapshots, snapshot) = (host.snapshots.clone(), snapshot.clone());
    let verified = tokio::task::spawn_blocking(move || snapshots.verify(&snapshot)).await;
    Ok(verified.unwrap_or_else(|lost| Err(std::io::Error::from(lost).into()))?)
}

/// Writes the specification, on a blocking thread because flushing to disk blocks.
async fn write_spec(sandbox_dir: &SandboxDir, spec: &SupervisorSpec) -> Result<(), CreateError> {
    let (sandbox_dir, spec) = (sandbox_dir.clone(), spec.clone());
    let written = tokio::task::spawn_blocking(move || sandbox_dir.write_spec(&spec)).await;
    written
        .unwrap_or_else(|lost| {
            Err(SandboxDirError::Io {
                step: "write",
                path: files::SPEC.into(),
                source: std::io::Error::other(lost),
            })
        })
        .map_err(CreateError::SandboxDir)
}

/// Logs the end of the supervisor's log and of the console output, so that the agent's log shows
/// the cause of a failed create.
fn log_final_output(sandbox_dir: &SandboxDir) {
    let supervisor = sandbox_dir.tail(files::LOG, 2000);
    let console = sandbox_dir.tail(files::CONSOLE, 2000);
    tracing::warn!(supervisor, console, "sandbox did not start");
}

fn ms_since(began: Instant) -> u32 {
    u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX)
}

impl From<SupervisorError> for CreateError {
    fn from(error: SupervisorError) -> Self {
        Self::Supervisor(error)
    }
}
