//! Copies of a named snapshot of a running sandbox.

use std::collections::HashSet;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{Sandbox, Service, vmms::Vmm};

use super::witness::{self, Memory};

/// Number of copies, created at once.
const COPIES: usize = 3;

pub(super) async fn are_independent(vmm: &Vmm) -> Result<()> {
    let service = vmm.service().await?;
    let original = vmm.restore(&service).await?;
    witness::start(&service, &original).await?;
    let mut memory = Memory::new();
    memory.fill(&service, original.id(), 0, 200, 1).await?;
    name(&service, original.id()).await?;
    // Later changes must not affect the copies, nor the other way round.
    let then = memory.clone();
    memory.fill(&service, original.id(), 0, 100, 2).await?;

    let copies = try_join_all((0..COPIES).map(|_| copy(&service))).await?;
    for (sandbox, generation) in copies.iter().zip(10..) {
        vmm.ensure_used(sandbox.id())?;
        then.check(&service, sandbox.id()).await?;
        let mut own = then.clone();
        own.fill(&service, sandbox.id(), 50, 100, generation)
            .await?;
        own.check(&service, sandbox.id()).await?;
    }
    memory.check(&service, original.id()).await?;
    let all: Vec<&str> = copies.iter().chain([&original]).map(Sandbox::id).collect();
    identities_differ(&service, &all).await?;
    for sandbox in copies.iter().chain([&original]) {
        sandbox.destroy().await?;
    }
    Ok(())
}

/// Makes the named snapshot `seeded` of a running sandbox.
async fn name(service: &Service, id: &str) -> Result<()> {
    let body = json!({ "sandbox_id": id, "name": "seeded" });
    let (status, made) = service.json(Method::POST, "/v1/snapshots", &body).await?;
    ensure!(status.is_success(), "{status}: {made}");
    Ok(())
}

async fn copy(service: &Service) -> Result<Sandbox<'_>> {
    let body = json!({ "template": "seeded", "timeout_sec": 0 });
    let (status, made) = service.json(Method::POST, "/v1/sandboxes", &body).await?;
    ensure!(status.is_success(), "{status}: {made}");
    let id = made["id"].as_str().context("no id")?.to_owned();
    let sandbox = Sandbox::new(service, id);
    sandbox.until_status("running").await?;
    Ok(sandbox)
}

async fn identities_differ(service: &Service, ids: &[&str]) -> Result<()> {
    let mut seen = HashSet::new();
    for id in ids {
        let identity = witness::identity(service, id).await?;
        ensure!(identity[0] == *id, "{id} has host name {}", identity[0]);
        for part in identity {
            ensure!(!part.is_empty(), "{id} has an empty part");
            ensure!(seen.insert(part.clone()), "{part} twice");
        }
    }
    Ok(())
}
