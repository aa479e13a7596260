//! The end of a lifetime, and destroys, wait for no guest.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::json;
use wrenn_proto::rpc::hostagent::v1::PauseEffort;

use crate::support::{Control, ErrorCode, FakeAgent, fake_agent::Gate, until};

/// Maximum time of a destroy on a busy machine. The operations that it must not wait for last until
/// the test ends them.
const QUICK: Duration = Duration::from_secs(5);

/// Returns the gate of the operation at the host.
fn gate<'a>(agent: &'a FakeAgent, operation: &str) -> &'a Gate {
    match operation {
        "pause" => &agent.state.pause_gate,
        "resume" => &agent.state.resume_gate,
        "snapshot" => &agent.state.snapshot_gate,
        _ => &agent.state.fork_gate,
    }
}

#[tokio::test]
async fn delete_does_not_wait_for_an_operation_in_progress() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for operation in ["pause", "resume", "snapshot", "fork"] {
        let id = control.create().await;
        let path = format!("/v1/sandboxes/{id}");
        if operation == "resume" {
            let paused = control.post(&format!("{path}/pause"), json!({})).await;
            assert_eq!(paused.0, StatusCode::OK, "{}", paused.1);
        }
        let gate = gate(&agent, operation);
        gate.shut();
        let request = match operation {
            "snapshot" => control
                .request(Method::POST, "/v1/snapshots")
                .json(&json!({ "sandbox_id": id, "name": "never" })),
            _ => control
                .request(Method::POST, &format!("{path}/{operation}"))
                .json(&json!({})),
        };
        let call = tokio::spawn(request.send());
        until("the host works on the call", async || {
            (gate.waiting() == 1).then_some(())
        })
        .await;
        let began = Instant::now();
        let (status, body) = control.delete(&path).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{operation}: {body}");
        assert!(
            began.elapsed() < QUICK,
            "{operation}: {:?}",
            began.elapsed()
        );
        assert_eq!(control.status(&id).await, "stopped", "{operation}");
        gate.open();
        let answered = call.await.unwrap().unwrap();
        assert!(!answered.status().is_success(), "{operation}");
        assert_eq!(control.status(&id).await, "stopped", "{operation}");
    }
    assert!(agent.ids().is_empty());
}

#[tokio::test]
async fn pause_at_the_end_of_a_lifetime_needs_no_guest_after_two_attempts() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let message = "the guest agent does not answer";
    agent.fail("PauseSandbox", ErrorCode::DeadlineExceeded, message);
    let idle = json!({ "timeout_sec": 1, "on_timeout": "pause" });
    let (_, made) = control.post("/v1/sandboxes", idle).await;
    let id = made["id"].as_str().unwrap();
    until("a pause without the guest", async || {
        (agent.efforts().len() == 3).then_some(())
    })
    .await;
    let expected = [
        PauseEffort::PAUSE_EFFORT_UNSPECIFIED,
        PauseEffort::PAUSE_EFFORT_UNSPECIFIED,
        PauseEffort::PAUSE_EFFORT_WITHOUT_GUEST,
    ];
    assert_eq!(agent.efforts(), expected);
    agent.mend("PauseSandbox");
    control.until_status(id, "paused").await;
    // A pause that a client requests is tried with the guest.
    let path = format!("/v1/sandboxes/{id}");
    let (status, body) = control.post(&format!("{path}/resume"), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let before = agent.efforts().len();
    let (status, body) = control.post(&format!("{path}/pause"), json!({})).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let last = agent.efforts().split_off(before);
    assert_eq!(last, [PauseEffort::PAUSE_EFFORT_UNSPECIFIED]);
}
