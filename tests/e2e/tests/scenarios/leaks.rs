//! No resource is left on the host after all sandboxes are destroyed. These tests run alone (see
//! `.config/nextest.toml`).

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{
    Service,
    host::{Traces, open_files},
    rounds,
    wait::{GENEROUS, until},
};

/// Returns the resources that were added. Resources left by an earlier test may disappear in the
/// meantime, which is ignored.
fn added(before: &Traces, now: &Traces) -> Vec<String> {
    let (rules_before, rules_now) = (rules(before), rules(now));
    [
        (&now.namespaces, &before.namespaces),
        (&now.links, &before.links),
        (&now.routes, &before.routes),
        (&rules_now, &rules_before),
        (&now.cgroups, &before.cgroups),
        (&now.processes, &before.processes),
        (&now.slots, &before.slots),
        (&now.sandbox_dirs, &before.sandbox_dirs),
        (&now.mounts, &before.mounts),
        (&now.snapshots, &before.snapshots),
        (&now.memory_files, &before.memory_files),
        (&now.connections, &before.connections),
    ]
    .into_iter()
    .flat_map(|(now, before)| now.difference(before).cloned())
    .collect()
}

/// Returns the rules, with each set element as a separate entry, because the line of a set changes
/// when an element is removed.
fn rules(traces: &Traces) -> BTreeSet<String> {
    let parts = traces.rules.iter().flat_map(|line| line.split(','));
    parts
        .map(|part| {
            let part = part.trim().trim_start_matches("elements = {");
            part.trim_end_matches('}').trim().to_owned()
        })
        .collect()
}

/// Waits until no added resource is left on the host. The error lists the resources that are left.
async fn assert_nothing_added(service: &Service, before: &Traces) -> Result<()> {
    let mut left = Vec::new();
    let settled = until("nothing is left on the host", GENEROUS, async || {
        left = added(before, &Traces::of(service.dir())?);
        Ok(left.is_empty().then_some(()))
    })
    .await;
    settled.with_context(|| format!("left on the host: {left:?}"))
}

/// Number of concurrent clients.
const CLIENTS: usize = 8;

/// Creates, uses and destroys `count` sandboxes.
async fn churn(service: &Service, count: usize) -> Result<()> {
    stream::iter(0..count)
        .map(|_| async {
            let sandbox = service.create().await?;
            assert_eq!(sandbox.exec("true", &[]).await?.code, 0);
            sandbox.destroy().await
        })
        .buffer_unordered(CLIENTS)
        .try_collect()
        .await
}

#[tokio::test]
async fn creating_and_destroying_leaves_nothing() -> Result<()> {
    let service = Service::start().await?;
    // The first sandboxes create the resources that exist once per host and fill the connection
    // pools, so they are not counted.
    churn(&service, 16).await?;
    let before = Traces::of(service.dir())?;
    let files_before = open_files(service.pid());
    churn(&service, rounds(100)).await?;
    assert_nothing_added(&service, &before).await?;
    // Each of the eight clients may now keep a connection that it did not have before. One
    // connection per round would be a leak.
    let mut files_after = 0;
    let closed = until("descriptors are closed", GENEROUS, async || {
        files_after = open_files(service.pid());
        Ok((files_after <= files_before + CLIENTS).then_some(()))
    })
    .await;
    closed.with_context(|| format!("{files_before} -> {files_after} descriptors"))
}

#[tokio::test]
async fn disconnect_during_a_create_leaves_nothing() -> Result<()> {
    let service = Service::start().await?;
    service.create().await?.destroy().await?;
    let before = Traces::of(service.dir())?;
    for step in 0..rounds(100) {
        let body = json!({ "memory_mb": 256 });
        let create = service.json(Method::POST, "/v1/sandboxes", &body);
        let patience = Duration::from_millis(u64::try_from(step)? * 37 % 3500);
        // The client disconnects at a different step each time. A create that is faster than the
        // timeout is destroyed explicitly.
        if let Ok(reply) = tokio::time::timeout(patience, create).await {
            let (_, body) = reply?;
            let id = body["id"].as_str().unwrap_or_default();
            service
                .json(Method::DELETE, &format!("/v1/sandboxes/{id}"), &json!({}))
                .await?;
        }
    }
    assert_nothing_added(&service, &before).await
}
