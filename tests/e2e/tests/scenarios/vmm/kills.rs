//! Processes that are killed while a sandbox runs and nothing else happens.

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use wrenn_e2e::{
    Sandbox, Service,
    host::{Role, process_of},
    vmms::Vmm,
    wait::{GENEROUS, until},
};

use super::witness::{self, Memory};
use crate::pause_faults::{nothing_left, warm};

pub(super) async fn lose_no_snapshot(vmm: &Vmm) -> Result<()> {
    let (mut service, before) = warm(vmm.service().await?).await?;
    let mut roles = vec![Role::Vmm, Role::Supervisor];
    roles.extend(vmm.exports_disk.then_some(Role::DiskExporter));
    for role in &roles {
        without_a_snapshot_is_an_error(vmm, &service, *role).await?;
        nothing_left(&service, &before, &format!("{role:?}")).await?;
    }
    let (id, memory) = paused_with_data(vmm, &service).await?;
    for role in roles {
        is_paused_at_its_snapshot(&service, &id, role, &memory).await?;
    }
    agent_is_replaced(&mut service, &id, &memory).await?;
    Sandbox::new(&service, id).destroy().await?;
    nothing_left(&service, &before, "all").await
}

async fn without_a_snapshot_is_an_error(vmm: &Vmm, service: &Service, role: Role) -> Result<()> {
    let sandbox = vmm.restore(service).await?;
    kill_process(sandbox.id(), role)?;
    let record = until_not_running(&sandbox).await?;
    assert_eq!(record["status"], "error", "{role:?}: {record}");
    let reason = record["error"].as_str().unwrap_or_default();
    assert!(!reason.is_empty(), "{role:?}: {record}");
    Ok(())
}

/// Creates a paused sandbox that holds data.
async fn paused_with_data(vmm: &Vmm, service: &Service) -> Result<(String, Memory)> {
    let sandbox = vmm.restore(service).await?;
    witness::start(service, &sandbox).await?;
    let mut memory = Memory::new();
    memory.fill(service, sandbox.id(), 0, 200, 1).await?;
    sandbox.pause().await?;
    Ok((sandbox.id().to_owned(), memory))
}

/// Resumes a paused sandbox, changes its data, and kills a process. The sandbox must then be paused
/// again, with the data of its snapshot.
async fn is_paused_at_its_snapshot(
    service: &Service,
    id: &str,
    role: Role,
    memory: &Memory,
) -> Result<()> {
    let sandbox = Sandbox::new(service, id.to_owned());
    sandbox.resume().await?;
    memory.check(service, id).await?;
    memory.clone().fill(service, id, 0, 50, 2).await?;
    kill_process(id, role)?;
    let record = until_not_running(&sandbox).await?;
    assert_eq!(record["status"], "paused", "{role:?}: {record}");
    let warning = record["warning"].as_str().unwrap_or_default();
    assert!(
        warning.contains("paused at its last snapshot"),
        "{role:?}: {record}"
    );
    Ok(())
}

/// Resumes a paused sandbox, kills the agent and starts another one, which must adopt the VM with
/// its current data.
async fn agent_is_replaced(service: &mut Service, id: &str, memory: &Memory) -> Result<()> {
    Sandbox::new(service, id.to_owned()).resume().await?;
    let mut memory = memory.clone();
    memory.fill(service, id, 0, 50, 3).await?;
    let vmm = process_of(id, Role::Vmm);
    service.kill()?;
    service.start_again().await?;
    let sandbox = Sandbox::new(service, id.to_owned());
    sandbox.until_status("running").await?;
    assert_eq!(process_of(id, Role::Vmm), vmm);
    memory.check(service, id).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    memory.check(service, id).await
}

fn kill_process(id: &str, role: Role) -> Result<()> {
    let pid = process_of(id, role).with_context(|| format!("{id} has no {role:?}"))?;
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
}

/// Waits until a sandbox is paused or lost, and none of its processes is left. Returns its record.
async fn until_not_running(sandbox: &Sandbox<'_>) -> Result<Value> {
    let record = until("the loss is reported", GENEROUS, async || {
        let record = sandbox.record().await?;
        let is_over = ["paused", "error"]
            .iter()
            .any(|status| record["status"] == *status);
        Ok(is_over.then_some(record))
    })
    .await?;
    for role in [Role::Vmm, Role::Supervisor, Role::DiskExporter] {
        ensure!(
            process_of(sandbox.id(), role).is_none(),
            "{role:?} is left: {record}"
        );
    }
    Ok(record)
}
