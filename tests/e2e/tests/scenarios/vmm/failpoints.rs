//! Death of processes in the middle of a pause and of a resume: a selection of the failpoints of
//! `pause_faults`, at the steps that differ between VMMs.

use anyhow::Result;

use crate::pause_faults::{the_agent_of_dies, the_machine_dies, the_machine_dies_in_a_resume};
use wrenn_e2e::vmms::Vmm;

pub(super) async fn agent_in_a_pause(vmm: &Vmm) -> Result<()> {
    let points = [
        "self@agent.snapshot.captured",
        "self@agent.snapshot.published",
        "self@agent.pause.noted",
    ];
    the_agent_of_dies(vmm.service().await?, &points, None, "pause").await
}

pub(super) async fn agent_in_a_resume(vmm: &Vmm) -> Result<()> {
    let points = ["self@agent.start.supervised", "self@agent.start.recovered"];
    the_agent_of_dies(vmm.service().await?, &points, Some("pause"), "resume").await
}

pub(super) async fn vm_in_a_pause(vmm: &Vmm) -> Result<()> {
    let points = [
        "self@supervisor.snapshot.paused",
        "self@supervisor.snapshot.saved",
        "vmm@supervisor.snapshot.paused",
        "vmm@supervisor.snapshot.written",
    ];
    the_machine_dies(vmm.service().await?, &points, "pause").await
}

pub(super) async fn vm_in_a_resume(vmm: &Vmm) -> Result<()> {
    let points = [
        "self@supervisor.restore.prepared",
        "self@supervisor.restore.attached",
        "vmm@supervisor.restore.attached",
        "vmm@supervisor.restore.loaded",
    ];
    the_machine_dies_in_a_resume(vmm.service().await?, &points).await
}
