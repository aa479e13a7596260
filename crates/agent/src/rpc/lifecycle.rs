//! Conversion of the calls that create and list sandboxes, change their network access, and report
//! the data of host and sandboxes.

use std::sync::atomic::Ordering;

use connectrpc::ConnectError;
use wrenn_model::MachineSize;
use wrenn_proto::{guest, rpc::hostagent::v1 as pb};

use super::{parse, snapshots};
use crate::{
    admission::{self, CreateParams, CreateRequest},
    inventory::{Inventory, InventoryError},
    network::egress::{Access, AccessError},
    sandbox::{
        PauseEffort, ResumeFrom, Sandbox, State, resources::HostContext, service::SandboxService,
    },
    sandbox_dir::BootTimes,
    templates::{Template, image_mib},
};

pub(super) async fn get_host(
    sandboxes: &SandboxService,
) -> Result<pb::GetHostResponse, ConnectError> {
    let host = sandboxes.host().clone();
    let count = sandboxes.list().len();
    let described = tokio::task::spawn_blocking(move || {
        Inventory::read(&host).map(|inventory| describe(&host, count, inventory))
    });
    Ok(described.await.map_err(|_| InventoryError::Panicked)??)
}

fn describe(host: &HostContext, sandboxes: usize, inventory: Inventory) -> pb::GetHostResponse {
    let Inventory {
        capacity,
        templates,
        snapshots,
    } = inventory;
    let (memory_promised_mib, memory_promise_limit_mib) = host.memory.promised();
    pb::GetHostResponse {
        memory_promised_mib,
        memory_promise_limit_mib,
        accel: host.config.vmm.boot_accel().to_string(),
        vmm: host.snapshots.vmms().boots.version,
        cpu: host.config.cpu.to_string(),
        cpu_count: capacity.cpu_count,
        memory_total_mib: capacity.memory_total_mib,
        memory_available_mib: capacity.memory_available_mib,
        disk_free_mib: capacity.disk_free_mib,
        sandboxes: u32::try_from(sandboxes).unwrap_or(u32::MAX),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host_id: host.id.clone(),
        boots: host.boots.started.load(Ordering::Relaxed),
        boots_retried: host.boots.retried.load(Ordering::Relaxed),
        boots_stalled: host.boots.stalled.load(Ordering::Relaxed),
        network_restored: host.network.restored(),
        templates: templates
            .into_iter()
            .map(|template| template_info(host, template))
            .chain(snapshots.iter().map(|named| snapshots::info(named)))
            .collect(),
        ..Default::default()
    }
}

fn template_info(host: &HostContext, template: Template) -> pb::TemplateInfo {
    let is_restored = host.config.template_snapshots;
    let cold = is_restored.then(|| host.snapshots.template_snapshot(&template).err());
    let cold_boot_reason = cold.flatten().map(|reason| reason.to_string());
    pb::TemplateInfo {
        cold_boot_reason: cold_boot_reason.unwrap_or_default(),
        kind: pb::TemplateKind::TEMPLATE_KIND_BASE.into(),
        // 0 means unknown: the template's image was removed just now.
        disk_size_mb: image_mib(&template).unwrap_or(0),
        name: template.name.into(),
        vcpus: template.vcpus,
        memory_mb: template.memory_mib,
        size_bytes: template.size_bytes,
        created_unix_ms: template.created_unix_ms,
        ..Default::default()
    }
}

/// Creates a sandbox. The create continues if the caller disconnects.
pub(super) async fn create(
    sandboxes: &SandboxService,
    request: pb::CreateSandboxRequest,
    installation: String,
) -> Result<pb::CreateSandboxResponse, ConnectError> {
    sandboxes.require_open()?;
    let request = create_request(sandboxes.host(), request, installation)?;
    let sandbox = sandboxes.create(request).await?;
    Ok(pb::CreateSandboxResponse {
        sandbox: info(&sandbox).into(),
        ..Default::default()
    })
}

fn create_request(
    host: &HostContext,
    request: pb::CreateSandboxRequest,
    installation: String,
) -> Result<CreateRequest, ConnectError> {
    let params = CreateParams {
        id: parse("id", &request.id)?,
        template_name: parse("template", &request.template)?,
        access: access(host, request.egress.as_known(), &request.network)?,
        timeout_sec: request.timeout_sec,
        envs: request.envs.into_iter().collect(),
        installation,
    };
    let size = MachineSize {
        vcpus: request.vcpus,
        memory_mib: request.memory_mb,
        disk_mib: request.disk_size_mb,
    };
    Ok(CreateRequest { params, size })
}

pub(super) fn pause_effort(effort: Option<pb::PauseEffort>) -> Result<PauseEffort, ConnectError> {
    match effort {
        Some(pb::PauseEffort::PAUSE_EFFORT_UNSPECIFIED) => Ok(PauseEffort::WithGuest),
        Some(pb::PauseEffort::PAUSE_EFFORT_WITHOUT_GUEST) => Ok(PauseEffort::WithoutGuest),
        Some(pb::PauseEffort::PAUSE_EFFORT_OR_END) => Ok(PauseEffort::OrEnd),
        None => Err(ConnectError::invalid_argument("`effort`: unknown value")),
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
) -> Result<Access, ConnectError> {
    let egress = match egress {
        Some(pb::Egress::EGRESS_UNSPECIFIED) => host.config.default_egress,
        Some(pb::Egress::EGRESS_DENY) => false,
        Some(pb::Egress::EGRESS_ALLOW) => true,
        None => return Err(ConnectError::invalid_argument("`egress`: unknown value")),
    };
    Access::parse(egress, &policy.allow, &policy.deny)
        .map_err(|error: AccessError| ConnectError::invalid_argument(error.to_string()))
}

/// Changes the addresses that a sandbox may reach.
pub(super) async fn update_network(
    host: &HostContext,
    sandbox: &Sandbox,
    request: pb::UpdateNetworkRequest,
) -> Result<(), ConnectError> {
    let access = access(host, request.egress.as_known(), &request.network)?;
    admission::check_egress(host, &access)?;
    Ok(sandbox.set_access(access).await?)
}

pub(super) fn list(sandboxes: &SandboxService) -> pb::ListSandboxesResponse {
    pb::ListSandboxesResponse {
        sandboxes: sandboxes.list().iter().map(|s| info(s)).collect(),
        host_id: sandboxes.host().id.clone(),
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
    let (mut cpu, mut accel) = (String::new(), String::new());
    let (state, reason, boot) = match sandbox.state() {
        State::Starting => (
            pb::SandboxState::SANDBOX_STATE_STARTING,
            String::new(),
            None,
        ),
        State::Running(running) => {
            let state = pb::SandboxState::SANDBOX_STATE_RUNNING;
            cpu = running.cpu.to_string();
            accel = running.accel.to_string();
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
        vcpus: facts.size.vcpus,
        memory_mb: facts.size.memory_mib,
        timeout_sec: facts.timeout_sec,
        host_ip: sandbox
            .host_ip()
            .map_or_else(String::new, |ip| ip.to_string()),
        guest_ip: guest::IP.to_string(),
        created_unix_ms: facts.created_unix_ms,
        last_active_unix_ms: sandbox.last_active_unix_ms(),
        reason,
        boot: boot.into(),
        disk_size_mb: facts.size.disk_mib,
        egress: egress.into(),
        warning: sandbox.warning(),
        envd_token: facts.envd_token.reveal().to_owned(),
        installation_id: sandbox.installation(),
        cpu,
        accel,
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
