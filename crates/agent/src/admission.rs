//! Admission of new sandboxes: checks a request against the rules and the capacity of this host,
//! and returns the plan of the sandbox. Creates nothing. Knows neither the caller nor its protocol.
//!
//! | rule                                                    | in                | failure      |
//! |---------------------------------------------------------|-------------------|--------------|
//! | names and total size of the environment                 | `environment`     | invalid      |
//! | idle timeout                                            | here              | invalid      |
//! | vCPUs per processor of the host                         | `vcpu_overcommit` | invalid      |
//! | memory of a sandbox, at most that of the host           | `memory_size`     | invalid      |
//! | memory of the host that is available and not promised   | `memory_ledger`   | host is full |
//! | disk space of the host: free, and within the budget     | `disk_space`      | host is full |
//! | disk size, at most the budget of a sandbox              | `disk_space`      | invalid      |
//! | disk size, at least that of the template's image        | `disk_size`       | invalid      |
//! | copies per fork                                         | `fork_copies`     | invalid      |
//! | network access, at most the operator's ceiling          | `egress`          | invalid      |
//! | boot of the image, or restore of the template snapshot  | `source`          | -            |
//!
//! The rules are pure functions. Only [`plan`] reads the host. A tagged snapshot takes precedence
//! over an image of the same name. A sandbox that continues from a snapshot has the size of the
//! snapshot, regardless of the requested size.
//!
//! [`plan`] reserves nothing. The memory of an admitted sandbox is reserved when its create starts
//! (`SandboxService::start`), so of two concurrent requests that fit only one at a time, one is
//! rejected.

mod capacity;
mod disk_size;
mod egress;
mod environment;
mod error;
mod fork_copies;
mod memory_size;
mod source;
mod vcpu_overcommit;

use std::collections::BTreeMap;

use wrenn_model::{MachineSize, SandboxId, TemplateName, limits};

pub(crate) use egress::check as check_egress;
pub(crate) use error::AdmissionError;
use error::in_range;
pub(crate) use fork_copies::check as check_fork_copies;

use crate::{
    host::HostCapacity,
    network::egress::Access,
    sandbox::{GuestToken, Plan, Source, now_unix_ms, resources::HostContext},
    snapshots::LocatedSnapshot,
    templates::image_mib,
};

/// Parameters of a create, except the size of the VM.
#[derive(Debug, Clone)]
pub(crate) struct CreateParams {
    pub(crate) id: SandboxId,
    pub(crate) template_name: TemplateName,
    pub(crate) timeout_sec: u32,
    pub(crate) access: Access,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) installation: String,
}

/// Request to create a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct CreateRequest {
    pub(crate) params: CreateParams,
    /// Requested size. A disk of 0 MiB stands for the default size. Not used if the template is a
    /// snapshot.
    pub(crate) size: MachineSize,
}

/// Checks everything about a request that can be checked before anything is created. Reads files,
/// and may block.
pub(crate) fn plan(host: &HostContext, request: CreateRequest) -> Result<Plan, AdmissionError> {
    let CreateRequest { params, size } = request;
    environment::check(&params.envs)?;
    egress::check(host, &params.access)?;
    let timeout_sec = params.timeout_sec;
    in_range("timeout_sec", timeout_sec, 0, limits::MAX_TIMEOUT_SEC, "")?;
    let capacity = HostCapacity::read(&host.config.data_dir).map_err(AdmissionError::Capacity)?;
    host.disk_space.check_create()?;
    if let Some(pin) = host.snapshots.named(&params.template_name)? {
        let snapshot = host.snapshots.locate(&pin)?;
        return params.with_snapshot(&capacity, snapshot);
    }
    let template = host.templates.template(&params.template_name)?;
    capacity::check(&capacity, size)?;
    let template_size = MachineSize {
        vcpus: template.vcpus,
        memory_mib: template.memory_mib,
        disk_mib: image_mib(&template).map_err(AdmissionError::Capacity)?,
    };
    let size = MachineSize {
        disk_mib: disk_size::choose(size.disk_mib, template_size.disk_mib)?,
        ..size
    };
    host.disk_space.check_size(size)?;
    if source::may_restore(host.config.template_snapshots, size, template_size)
        && let Ok(snapshot) = host.snapshots.template_snapshot(&template)
    {
        return params.with_snapshot(&capacity, snapshot);
    }
    Ok(params.plan(Source::Image(template), size))
}

impl CreateParams {
    /// Returns the plan of a VM that continues from a snapshot. The VM has the size of the
    /// snapshot. Its environment is that of the snapshot; variables of the request take precedence.
    pub(crate) fn with_snapshot(
        self,
        capacity: &HostCapacity,
        snapshot: LocatedSnapshot,
    ) -> Result<Plan, AdmissionError> {
        let manifest = snapshot.manifest();
        let envs = environment::merge(manifest.envs.clone(), self.envs);
        environment::check(&envs)?;
        let size = manifest.size;
        capacity::check(capacity, size)?;
        let source = Source::Snapshot(Box::new(snapshot));
        Ok(Self { envs, ..self }.plan(source, size))
    }

    /// Returns the plan of a VM of this size, without any check.
    pub(crate) fn plan(self, source: Source, size: MachineSize) -> Plan {
        Plan {
            id: self.id,
            template_name: self.template_name,
            source,
            size,
            timeout_sec: self.timeout_sec,
            access: self.access,
            envs: self.envs,
            created_unix_ms: now_unix_ms(),
            envd_token: GuestToken::random(),
            installation: self.installation,
        }
    }
}
