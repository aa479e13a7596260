//! Calls that create and list sandboxes, change their network access, and report the data of host
//! and sandboxes.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, atomic::Ordering},
};

use connectrpc::ConnectError;
use tokio::sync::oneshot;
use wrenn_model::{SandboxId, TemplateName, limits};
use wrenn_proto::{guest, rpc::hostagent::v1 as pb};

use super::snapshots;

use crate::{
    host::{self, in_range},
    network::access::Access,
    sandbox::{
        self, CreateError, GuestToken, Plan, ResumeFrom, Sandbox, SandboxFacts, Source, Start,
        State, actor::SandboxActors, now_unix_ms, resources::HostContext,
    },
    sandbox_dir::BootTimes,
    snapshots::LocatedSnapshot,
};

pub(super) async fn get_host(actors: &SandboxActors) -> Result<pb::GetHostResponse, ConnectError> {
    let host = actors.host.clone();
    let sandboxes = actors.registry.list().len();
    let answer = blocking(move || {
        let facts = host::HostCapacity::read(&host.config.data_dir).map_err(CreateError::Host)?;
        let templates = host.templates.templates()?;
        let snapshots = host.snapshots.all_named()?;
        let template = |template: crate::Template| pb::TemplateInfo {
            kind: pb::TemplateKind::TEMPLATE_KIND_BASE.into(),
            // 0 means unknown: the template's image was removed just now.
            disk_size_mb: image_mib(&template).unwrap_or(0),
            name: template.name.into(),
            vcpus: template.vcpus,
            memory_mb: template.memory_mib,
            size_bytes: template.size_bytes,
            created_unix_ms: template.created_unix_ms,
            ..Default::default()
        };
        Ok(pb::GetHostResponse {
            accel: host.config.accel.to_string(),
            cpu_count: facts.cpu_count,
            memory_total_mib: facts.memory_total_mib,
            memory_available_mib: facts.memory_available_mib,
            disk_free_mib: facts.disk_free_mib,
            sandboxes: u32::try_from(sandboxes).unwrap_or(u32::MAX),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host_id: host.id.clone(),
            boots: host.boots.started.load(Ordering::Relaxed),
            boots_retried: host.boots.retried.load(Ordering::Relaxed),
            boots_stalled: host.boots.stalled.load(Ordering::Relaxed),
            templates: templates
                .into_iter()
                .map(template)
                .chain(snapshots.into_iter().map(snapshots::info))
                .collect(),
            ..Default::default()
        })
    });
    answer.await.map_err(|error| (&error).into())
}

/// Creates a sandbox. The create continues if the caller disconnects.
pub(super) async fn create(
    actors: &SandboxActors,
    request: pb::CreateSandboxRequest,
    installation: String,
) -> Result<pb::CreateSandboxResponse, ConnectError> {
    let (sandbox, made) = begin(actors, request, installation)
        .await
        .map_err(|e| ConnectError::from(&e))?;
    let made = made.await.unwrap_or(Err(CreateError::Panicked));
    made.map_err(|e| ConnectError::from(&e))?;
    Ok(pb::CreateSandboxResponse {
        sandbox: info(&sandbox).into(),
        ..Default::default()
    })
}

pub(crate) type Made = oneshot::Receiver<Result<(), CreateError>>;

async fn begin(
    actors: &SandboxActors,
    request: pb::CreateSandboxRequest,
    installation: String,
) -> Result<(Arc<Sandbox>, Made), CreateError> {
    if actors.shutdown.is_cancelled() {
        return Err(CreateError::ShuttingDown);
    }
    let host = actors.host.clone();
    let plan = blocking(move || check(&host, request, installation)).await?;
    begin_plan(actors, plan)
}

/// Starts the actor of a new sandbox.
pub(crate) fn begin_plan(
    actors: &SandboxActors,
    plan: Plan,
) -> Result<(Arc<Sandbox>, Made), CreateError> {
    let (sandbox, requests) = Sandbox::new(
        SandboxFacts::from(&plan),
        plan.access.clone(),
        plan.installation.clone(),
        plan.created_unix_ms,
    );
    if !actors.registry.insert(sandbox.clone()) {
        return Err(CreateError::Exists(plan.id));
    }
    let (made, answer) = oneshot::channel();
    let plan = Box::new(plan);
    sandbox::spawn(
        actors,
        sandbox.clone(),
        requests,
        Start::Create { plan, made },
    );
    Ok((sandbox, answer))
}

/// Checks everything about a request that can be checked before anything is created.
fn check(
    host: &HostContext,
    request: pb::CreateSandboxRequest,
    installation: String,
) -> Result<Plan, CreateError> {
    let id = request.id.parse().map_err(field("id"))?;
    let template_name: TemplateName = request.template.parse().map_err(field("template"))?;
    let access = access(host, request.egress.as_known(), &request.network)?;
    let envs: BTreeMap<String, String> = request.envs.into_iter().collect();
    check_envs(&envs)?;
    in_range(
        "timeout_sec",
        request.timeout_sec,
        0,
        limits::MAX_TIMEOUT_SEC,
        "",
    )?;
    let facts = host::HostCapacity::read(&host.config.data_dir).map_err(CreateError::Host)?;
    let wanted = CreateParams {
        id,
        template_name,
        timeout_sec: request.timeout_sec,
        access,
        envs,
        installation,
    };
    if let Some(pin) = host.snapshots.named(&wanted.template_name)? {
        let snapshot = host.snapshots.locate(&pin)?;
        return wanted.with_snapshot(&facts, snapshot);
    }
    let template = host.templates.template(&wanted.template_name)?;
    facts.admit(request.vcpus, request.memory_mb)?;
    let disk_mib = match request.disk_size_mb {
        0 => limits::DEFAULT_DISK_MIB,
        size => size,
    };
    let image_mib = image_mib(&template).map_err(CreateError::Host)?;
    let why = " MiB; the minimum is the size of the template's image";
    in_range(
        "disk_size_mb",
        disk_mib,
        image_mib,
        limits::MAX_DISK_MIB,
        why,
    )?;
    let own_size = request.vcpus == template.vcpus
        && request.memory_mb == template.memory_mib
        && disk_mib == image_mib;
    if own_size
        && host.config.warm
        && let Some(snapshot) = host.snapshots.warm(&template)
    {
        return wanted.with_snapshot(&facts, snapshot);
    }
    Ok(wanted.plan(
        Source::Image(template),
        request.vcpus,
        request.memory_mb,
        disk_mib,
    ))
}

/// Returns the minimum disk size of a sandbox of this template, in MiB: the size of its image.
pub(crate) fn image_mib(template: &crate::Template) -> io::Result<u32> {
    let image = std::fs::metadata(&template.rootfs)?;
    Ok(u32::try_from(image.len().div_ceil(1024 * 1024)).unwrap_or(u32::MAX))
}

/// Parameters of a create, except those of the VM.
pub(crate) struct CreateParams {
    pub(crate) id: SandboxId,
    pub(crate) template_name: TemplateName,
    pub(crate) timeout_sec: u32,
    pub(crate) access: Access,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) installation: String,
}

impl CreateParams {
    /// Returns the parameters of a VM that continues from a snapshot. The VM has the size of the
    /// snapshot. Its environment is that of the snapshot; variables of the request take precedence.
    pub(crate) fn with_snapshot(
        self,
        facts: &host::HostCapacity,
        snapshot: LocatedSnapshot,
    ) -> Result<Plan, CreateError> {
        let manifest = snapshot.manifest();
        let mut envs = manifest.envs.clone();
        envs.extend(self.envs);
        check_envs(&envs)?;
        let (vcpus, memory_mib, disk_mib) =
            (manifest.vcpus, manifest.memory_mib, manifest.disk_mib);
        facts.admit(vcpus, memory_mib)?;
        let source = Source::Snapshot(Box::new(snapshot));
        Ok(Self { envs, ..self }.plan(source, vcpus, memory_mib, disk_mib))
    }

    pub(crate) fn plan(self, source: Source, vcpus: u32, memory_mib: u32, disk_mib: u32) -> Plan {
        Plan {
            id: self.id,
            template_name: self.template_name,
            source,
            vcpus,
            memory_mib,
            disk_mib,
            timeout_sec: self.timeout_sec,
            access: self.access,
            envs: self.envs,
            created_unix_ms: now_unix_ms(),
            envd_token: GuestToken::random(),
            installation: self.installation,
        }
    }
}

pub(super) const fn resume_from(cold_boot: bool) -> ResumeFrom {
    if cold_boot {
        ResumeFrom::Disk
    } else {
        ResumeFrom::Memory
    }
}

/// Returns the addresses that a request allows a sandbox to reach.
fn access(
    host: &HostContext,
    egress: Option<pb::Egress>,
    policy: &pb::NetworkPolicy,
) -> Result<Access, CreateError> {
    let egress = match egress {
        Some(pb::Egress::EGRESS_UNSPECIFIED) => host.config.default_egress,
        Some(pb::Egress::EGRESS_DENY) => false,
        Some(pb::Egress::EGRESS_ALLOW) => true,
        None => return Err(field("egress")("unknown value")),
    };
    Ok(Access::parse(egress, &policy.allow, &policy.deny)?)
}

/// Changes the addresses that a sandbox may reach.
pub(super) async fn update_network(
    actors: &SandboxActors,
    sandbox: &Sandbox,
    request: pb::UpdateNetworkRequest,
) -> Result<(), ConnectError> {
    let access = access(&actors.host, request.egress.as_known(), &request.network)
        .map_err(|error| ConnectError::from(&error))?;
    Ok(sandbox.set_access(access).await?)
}

fn check_envs(envs: &BTreeMap<String, String>) -> Result<(), CreateError> {
    let mut bytes = 0;
    for (name, value) in envs {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(field("envs")(format!(
                "{name:?} is not a valid variable name"
            )));
        }
        if value.contains('\0') {
            return Err(field("envs")(format!(
                "the value of {name:?} contains a NUL character"
            )));
        }
        bytes += name.len() + value.len();
    }
    let max = limits::MAX_SANDBOX_ENVS_BYTES;
    if bytes > max {
        return Err(field("envs")(format!(
            "{bytes} bytes exceed the limit of {max} bytes"
        )));
    }
    Ok(())
}

fn field<E: ToString>(field: &'static str) -> impl FnOnce(E) -> CreateError {
    move |reason| CreateError::Field {
        field,
        reason: reason.to_string(),
    }
}

pub(super) fn list(actors: &SandboxActors) -> pb::ListSandboxesResponse {
    pb::ListSandboxesResponse {
        sandboxes: actors.registry.list().iter().map(|s| info(s)).collect(),
        host_id: actors.host.id.clone(),
        ..Default::default()
    }
}

/// Returns the resource usage of the guest. Does not count as activity.
pub(super) async fn metrics(sandbox: &Sandbox) -> Result<pb::GetMetricsResponse, ConnectError> {
    let State::Running(running) = sandbox.state() else {
        return Err(sandbox.unusable().into());
    };
    let metrics = tokio::select! {
        metrics = running.envd.metrics() => metrics?,
        () = running.gone.cancelled() => return Err(sandbox.unusable().into()),
    };
    Ok(pb::GetMetricsResponse {
        timestamp_unix_ms: metrics.ts.saturating_mul(1000),
        cpu_count: metrics.cpu_count,
        cpu_used_pct: metrics.cpu_used_pct,
        mem_total_bytes: metrics.mem_total,
        mem_used_bytes: metrics.mem_used,
        mem_cache_bytes: metrics.mem_cache,
        disk_total_bytes: metrics.disk_total,
        disk_used_bytes: metrics.disk_used,
        ..Default::default()
    })
}

pub(super) fn info(sandbox: &Sandbox) -> pb::SandboxInfo {
    let facts = &sandbox.facts;
    let (state, reason, boot) = match sandbox.state() {
        State::Starting => (
            pb::SandboxState::SANDBOX_STATE_STARTING,
            String::new(),
            None,
        ),
        State::Running(running) => {
            let state = pb::SandboxState::SANDBOX_STATE_RUNNING;
            (state, String::new(), Some(boot_times(running.boot)))
        }
        State::Error { reason } => (pb::SandboxState::SANDBOX_STATE_ERROR, reason, None),
        State::Pausing(_) => (pb::SandboxState::SANDBOX_STATE_PAUSING, String::new(), None),
        State::Paused => (pb::SandboxState::SANDBOX_STATE_PAUSED, String::new(), None),
        State::Resuming(_) => (
            pb::SandboxState::SANDBOX_STATE_RESUMING,
            String::new(),
            None,
        ),
        State::Stopping => (
            pb::SandboxState::SANDBOX_STATE_STOPPING,
            String::new(),
            None,
        ),
    };
    let egress = if sandbox.access().egress {
        pb::Egress::EGRESS_ALLOW
    } else {
        pb::Egress::EGRESS_DENY
    };
    pb::SandboxInfo {
        id: facts.id.to_string(),
        state: state.into(),
        template: facts.template.to_string(),
        vcpus: facts.vcpus,
        memory_mb: facts.memory_mib,
        timeout_sec: facts.timeout_sec,
        host_ip: sandbox
            .host_ip()
            .map_or_else(String::new, |ip| ip.to_string()),
        guest_ip: guest::IP.to_string(),
        created_unix_ms: facts.created_unix_ms,
        last_active_unix_ms: sandbox.last_active_unix_ms(),
        reason,
        boot: boot.into(),
        disk_size_mb: facts.disk_mib,
        egress: egress.into(),
        warning: sandbox.warning(),
        envd_token: facts.envd_token.reveal().to_owned(),
        installation_id: sandbox.installation(),
        ..Default::default()
    }
}

fn boot_times(times: BootTimes) -> pb::BootTimes {
    pb::BootTimes {
        prepared_ms: times.prepared_ms,
        vmm_started_ms: times.vmm_started_ms,
        kernel_ms: times.kernel_ms,
        init_ms: times.init_ms,
        envd_ms: times.envd_ms,
        ..Default::default()
    }
}

/// Runs work that reads files on a blocking thread, so that other calls are not delayed.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CreateError> + Send + 'static,
) -> Result<T, CreateError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(CreateError::Panicked))
}
