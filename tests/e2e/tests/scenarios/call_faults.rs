//! Death of the service around a call of its control plane to its agent: the row says that the call
//! is in progress, and the agent has not begun it (`received`) or has completed it (`done`).

use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{
    Sandbox,
    wait::{GENEROUS, until},
};

use crate::pause_faults::{create, nothing_left, settled, the_agent_dies, warmed};

#[tokio::test]
async fn pause_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let points = [
        "self@rpc.PauseSandbox.received",
        "self@rpc.PauseSandbox.done",
    ];
    the_agent_dies(&points, None, "pause").await
}

#[tokio::test]
async fn resume_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let points = [
        "self@rpc.ResumeSandbox.received",
        "self@rpc.ResumeSandbox.done",
    ];
    the_agent_dies(&points, Some("pause"), "resume").await
}

#[tokio::test]
async fn create_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let (mut service, before) = warmed().await?;
    for (fault, expected) in [
        // The host has nothing of it.
        ("self@rpc.CreateSandbox.received", "error"),
        ("self@rpc.CreateSandbox.done", "running"),
    ] {
        service.restart_with_fault(Some(fault)).await?;
        let body = json!({ "timeout_sec": 0 });
        let _ = service.json(Method::POST, "/v1/sandboxes", &body).await;
        assert!(service.has_died().await?, "{fault}: not reached");
        service.restart_with_fault(None).await?;
        let (_, newest) = service.get("/v1/sandboxes?status=all&limit=1").await?;
        let id = newest[0]["id"].as_str().context("no id")?.to_owned();
        assert_eq!(settled(&service, &id).await?, expected, "{fault}");
        let sandbox = Sandbox::new(&service, id);
        if expected == "running" {
            assert_eq!(sandbox.exec("true", &[]).await?.code, 0, "{fault}");
        }
        sandbox.destroy().await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn destroy_is_completed_after_the_service_died_around_its_call() -> Result<()> {
    let (mut service, before) = warmed().await?;
    for fault in [
        "self@rpc.DestroySandbox.received",
        "self@agent.destroy.freed",
        "self@rpc.DestroySandbox.done",
    ] {
        let id = create(&service).await?;
        service.restart_with_fault(Some(fault)).await?;
        let path = format!("/v1/sandboxes/{id}");
        let _ = service.json(Method::DELETE, &path, &json!({})).await;
        assert!(service.has_died().await?, "{fault}: not reached");
        service.restart_with_fault(None).await?;
        // The client does not repeat its request.
        until("the sandbox is stopped", GENEROUS, async || {
            let record = Sandbox::new(&service, id.clone()).record().await?;
            Ok((record["status"] == "stopped").then_some(()))
        })
        .await
        .context(fault)?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}
