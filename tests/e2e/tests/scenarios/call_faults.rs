//! Death of the service around a call of its control plane to its agent: the row says that the call
//! is in progress, and the agent has not begun it (`received`) or has completed it (`done`).

use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::{Value, json};
use wrenn_e2e::{
    Sandbox, Service,
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

/// Rows of all sandboxes that have not ended on request.
async fn rows(service: &Service) -> Result<Vec<Value>> {
    let (_, all) = service.get("/v1/sandboxes?status=all&limit=1000").await?;
    let all = all.as_array().context("not a list")?.clone();
    Ok(all
        .into_iter()
        .filter(|row| row["status"] != "stopped")
        .collect())
}

#[tokio::test]
async fn fork_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let (mut service, before) = warmed().await?;
    for fault in ["self@rpc.ForkSandbox.received", "self@rpc.ForkSandbox.done"] {
        let id = create(&service).await?;
        let sandbox = Sandbox::new(&service, id.clone());
        sandbox.shell("echo kept >/dev/shm/mark").await?;
        service.restart_with_fault(Some(fault)).await?;
        let path = format!("/v1/sandboxes/{id}/fork");
        let _ = service
            .json(Method::POST, &path, &json!({ "count": 2 }))
            .await;
        assert!(service.has_died().await?, "{fault}: not reached");
        service.restart_with_fault(None).await?;
        assert_eq!(settled(&service, &id).await?, "running", "{fault}");
        let rows = rows(&service).await?;
        assert!(rows.len() <= 3, "{fault}: {rows:?}");
        for row in &rows {
            let each = row["id"].as_str().context("no id")?.to_owned();
            // A copy runs with the state of its source, or has failed with a reason.
            let status = settled(&service, &each).await?;
            let sandbox = Sandbox::new(&service, each);
            if status == "running" {
                let mark = sandbox.shell("cat /dev/shm/mark").await?.stdout;
                assert_eq!(mark, "kept\n", "{fault}");
            } else {
                assert_eq!(status, "error", "{fault}: {row}");
            }
            sandbox.destroy().await?;
        }
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn snapshot_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let (mut service, before) = warmed().await?;
    for (fault, exists) in [
        ("self@rpc.CreateSnapshot.received", false),
        ("self@rpc.CreateSnapshot.done", true),
    ] {
        let id = create(&service).await?;
        service.restart_with_fault(Some(fault)).await?;
        let body = json!({ "sandbox_id": id, "name": "taken" });
        let _ = service.json(Method::POST, "/v1/snapshots", &body).await;
        assert!(service.has_died().await?, "{fault}: not reached");
        service.restart_with_fault(None).await?;
        assert_eq!(settled(&service, &id).await?, "running", "{fault}");
        let (_, listed) = service.get("/v1/snapshots").await?;
        let names: Vec<_> = listed.as_array().context("not a list")?.iter().collect();
        let found = names.iter().any(|snapshot| snapshot["name"] == "taken");
        assert_eq!(found, exists, "{fault}: {names:?}");
        if exists {
            let path = "/v1/snapshots/taken";
            let (status, answer) = service.json(Method::DELETE, path, &json!({})).await?;
            assert!(status.is_success(), "{answer}");
        }
        Sandbox::new(&service, id).destroy().await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}

#[tokio::test]
async fn change_of_the_network_is_settled_after_the_service_died_around_its_call() -> Result<()> {
    let (mut service, before) = warmed().await?;
    for fault in [
        "self@rpc.UpdateNetwork.received",
        "self@rpc.UpdateNetwork.done",
    ] {
        let id = create(&service).await?;
        service.restart_with_fault(Some(fault)).await?;
        let path = format!("/sandboxes/{id}/network");
        let change = |range: &str| json!({ "denyOut": [range] });
        let first = change("203.0.113.0/24");
        let _ = service.json(Method::PUT, &path, &first).await;
        assert!(service.has_died().await?, "{fault}: not reached");
        service.restart_with_fault(None).await?;
        assert_eq!(settled(&service, &id).await?, "running", "{fault}");
        let sandbox = Sandbox::new(&service, id.clone());
        assert_eq!(sandbox.exec("true", &[]).await?.code, 0, "{fault}");
        // The host and the row agree again after the next change.
        let second = change("198.51.100.0/24");
        let (status, answer) = service.json(Method::PUT, &path, &second).await?;
        assert!(status.is_success(), "{answer}");
        let spec = service.dir().join("sandboxes").join(&id).join("spec.json");
        let spec: Value = serde_json::from_slice(&std::fs::read(spec)?)?;
        assert_eq!(
            spec["network"]["deny"],
            json!(["198.51.100.0/24"]),
            "{fault}"
        );
        sandbox.destroy().await?;
        nothing_left(&service, &before, fault).await?;
    }
    Ok(())
}
