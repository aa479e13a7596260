//! Removal of the rows of sandboxes that have ended.

use std::{sync::Arc, time::Duration};

use reqwest::StatusCode;
use serde_json::Value;
use wrenn_control::Limits;
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::support::{Control, FakeAgent, Options, until};

/// Options of a control plane that removes rows right after their end.
fn removing(dir: Arc<tempfile::TempDir>) -> Options {
    Options {
        dir,
        limits: Limits {
            retention: Some(Duration::from_millis(1)),
            ..Limits::default()
        },
        ..Options::default()
    }
}

async fn is_found(control: &Control, id: &str) -> bool {
    let (status, _) = control.get(&format!("/v1/sandboxes/{id}")).await;
    status == StatusCode::OK
}

#[tokio::test]
async fn only_rows_that_ended_are_removed() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let [ended, lost, kept, running, paused] = [
        control.create().await,
        control.create().await,
        control.create().await,
        control.create().await,
        control.create().await,
    ];
    let (status, _) = control.delete(&format!("/v1/sandboxes/{ended}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    for id in [&lost, &kept] {
        agent.change(id, |sandbox| {
            sandbox.state = SandboxState::SANDBOX_STATE_ERROR;
        });
        control.until_status(id, "error").await;
        until("the host has forgotten the sandbox", async || {
            agent.sandbox(id).is_none().then_some(())
        })
        .await;
    }
    let pause = format!("/v1/sandboxes/{paused}/pause");
    assert_eq!(control.post(&pause, Value::Null).await.0, StatusCode::OK);
    // By default, rows are kept for a month.
    for id in [&ended, &lost, &kept] {
        assert!(is_found(&control, id).await);
    }
    let dir = control.stop().await;
    // The files of a sandbox that was lost are there again.
    agent.plant(&kept, SandboxState::SANDBOX_STATE_PAUSED);

    let control = Control::start_with(&agent, removing(dir)).await;
    for id in [&ended, &lost] {
        until("the row is removed", async || {
            (!is_found(&control, id).await).then_some(())
        })
        .await;
    }
    for id in [&kept, &running, &paused] {
        assert!(is_found(&control, id).await, "{id}");
    }
    let (status, _) = control.delete(&format!("/v1/sandboxes/{running}")).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    until("the row is removed", async || {
        (!is_found(&control, &running).await).then_some(())
    })
    .await;
}
