//! Ends of commands: by themselves, by a limit, and by the end of their sandbox.

use reqwest::StatusCode;
use serde_json::{Value, json};
use wrenn_model::limits::MAX_EXEC_OUTPUT_BYTES;
use wrenn_proto::rpc::hostagent::v1::SandboxState;

use crate::{
    commands::{exec, sh},
    support::{Control, FakeAgent, Socket, assert_failure, until},
};

#[tokio::test]
async fn a_sandbox_that_ends_in_the_middle_of_a_command_ends_the_call() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let forever = json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 0 });
    for end in ["destroyed", "paused", "lost", "unreachable guest"] {
        let id = control.create().await;
        agent.state.list_gate.open();
        agent.heard();
        let call = exec(&control, &id, forever.clone());
        let ending = async {
            until("the command was sent", async || {
                agent
                    .heard()
                    .contains("process.Process/Start")
                    .then_some(())
            })
            .await;
            match end {
                "destroyed" => {
                    control.delete(&format!("/v1/sandboxes/{id}")).await;
                }
                "paused" => {
                    let path = format!("/v1/sandboxes/{id}/pause");
                    assert_eq!(control.post(&path, Value::Null).await.0, StatusCode::OK);
                }
                "lost" => {
                    // The reconciler must not see the loss before the call does.
                    agent.state.list_gate.shut();
                    agent.change(&id, |sandbox| {
                        sandbox.reason = "its VMM was killed".to_owned();
                        sandbox.state = SandboxState::SANDBOX_STATE_ERROR;
                    });
                }
                _ => agent.cut_tunnels(&id),
            }
        };
        let (got, ()) = tokio::join!(call, ending);
        let word = match end {
            "lost" => "its VMM was killed",
            "unreachable guest" => "the connection to the guest agent was lost",
            _ => "",
        };
        assert_failure(&got, 503, "unavailable", &[word]);
    }
}

#[tokio::test]
async fn a_pause_waits_for_a_command_that_ends_soon() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let call = exec(&control, &id, sh("sleep 0.5; echo done"));
    let pausing = async {
        until("the command was sent", async || {
            agent
                .heard()
                .contains("process.Process/Start")
                .then_some(())
        })
        .await;
        let path = format!("/v1/sandboxes/{id}/pause");
        control.post(&path, Value::Null).await
    };
    let (done, paused) = tokio::join!(call, pausing);
    assert_eq!(done.1["stdout"], "done\n", "{}", done.1);
    assert_eq!(paused.1["status"], "paused", "{}", paused.1);
}

#[tokio::test]
async fn collected_output_at_the_limit_is_whole() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let fits = format!("head -c {MAX_EXEC_OUTPUT_BYTES} /dev/zero");
    let (status, done) = exec(&control, &id, sh(&fits)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        done["stdout"].as_str().unwrap().len(),
        MAX_EXEC_OUTPUT_BYTES
    );
    assert_eq!(done.get("truncated"), None);
}

#[tokio::test]
async fn a_time_limit_ends_the_command_and_is_reported() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let body = json!({ "cmd": "sh", "args": ["-c", "echo out; echo err >&2; sleep 1000"], "timeout_sec": 1 });
    let (_, done) = exec(&control, &id, body).await;
    let details = &done["error"]["details"];
    assert_eq!(
        (&details["stdout"], &details["stderr"]),
        (&json!("out\n"), &json!("err\n"))
    );
    assert_eq!(
        (&details["exit_code"], &details["encoding"]),
        (&json!(-1), &json!("utf-8"))
    );
    let body = json!({ "cmd": "sleep", "args": ["1000"], "timeout_sec": 1 });
    let (status, done) = exec(&control, &id, body.clone()).await;
    assert_eq!(
        (status, &done["error"]["code"], &done["error"]["message"]),
        (
            StatusCode::GATEWAY_TIMEOUT,
            &json!("timeout"),
            &json!("`sleep` timed out after 1 s: signal: killed")
        )
    );
    let mut socket = Socket::open(&control, &format!("/v1/sandboxes/{id}/exec/stream")).await;
    let mut start = body;
    start["type"] = json!("start");
    socket.send(start).await;
    socket.expect("start").await;
    let exit = socket.expect("exit").await;
    assert_eq!(exit["error"], "timed out: signal: killed");
}

#[tokio::test]
async fn a_silent_command_keeps_its_sandbox_from_being_idle() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let body = json!({ "timeout_sec": 1, "on_timeout": "kill" });
    let (_, made) = control.post("/v1/sandboxes", body).await;
    let id = made["id"].as_str().unwrap();
    let (status, done) = exec(&control, id, sh("sleep 3")).await;
    assert_eq!(
        (status, &done["exit_code"]),
        (StatusCode::OK, &json!(0)),
        "{done}"
    );
    let row = control.until_status(id, "stopped").await;
    assert!(row["error"].as_str().unwrap().contains("idle"), "{row}");
    let time = |field: &str| {
        let time: jiff::Timestamp = row[field].as_str().unwrap().parse().unwrap();
        time
    };
    let lived = time("created_at").duration_until(time("last_active_at"));
    assert!(lived.as_secs() >= 2, "{row}");
}
