//! Installations that may command a sandbox, and sandboxes of an earlier release.

use std::fs;

use connectrpc::ErrorCode;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::agent::{Client, TestAgent, client_of, on_private_host, request};

async fn destroy(client: &Client, id: &str) -> Result<(), connectrpc::ConnectError> {
    let request = pb::DestroySandboxRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    client.destroy_sandbox(request).await.map(drop)
}

async fn pause(client: &Client, id: &str) -> Result<(), connectrpc::ConnectError> {
    let request = pb::PauseSandboxRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    client.pause_sandbox(request).await.map(drop)
}

async fn adopt(client: &Client, id: &str) -> Result<(), connectrpc::ConnectError> {
    let request = pb::AdoptSandboxRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    client.adopt_sandbox(request).await.map(drop)
}

async fn host_id(agent: &TestAgent) -> String {
    let host = agent.client.get_host(pb::GetHostRequest::default()).await;
    host.expect("a host").into_owned().host_id
}

#[test]
fn only_the_installation_that_created_or_adopted_a_sandbox_commands_it() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let (right, wrong) = (client_of(&agent, "right"), client_of(&agent, "wrong"));
        right.create_sandbox(request("sb-1")).await.expect("made");
        for refused in [destroy(&wrong, "sb-1").await, pause(&wrong, "sb-1").await] {
            let error = refused.expect_err("another installation's");
            assert_eq!(error.code, ErrorCode::FailedPrecondition);
            let text = error.to_string();
            assert!(text.contains("right") && text.contains("adopt"), "{text}");
        }
        let found = agent.find("sb-1").await.expect("there");
        assert_eq!(found.installation_id, "right");
        assert_eq!(
            found.state.as_known(),
            Some(pb::SandboxState::SANDBOX_STATE_RUNNING)
        );

        adopt(&wrong, "sb-1").await.expect("adopted");
        let host = host_id(&agent).await;
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        assert_eq!(host_id(&agent).await, host);
        let (right, wrong) = (client_of(&agent, "right"), client_of(&agent, "wrong"));
        let error = destroy(&right, "sb-1").await.expect_err("given away");
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        destroy(&wrong, "sb-1").await.expect("destroyed");
        let error = adopt(&wrong, "sb-1").await.expect_err("gone");
        assert_eq!(error.code, ErrorCode::NotFound);
        agent.stop().await;
    });
}

/// Release 0.1.0 wrote neither a host id nor an installation.
#[test]
fn a_sandbox_of_the_first_release_is_adopted_and_obeys_any_installation() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        agent.stop().await;
        fs::remove_file(data.path().join("host-id")).expect("removed");
        let record = data.path().join("sandboxes/sb-1/installation.json");
        fs::remove_file(record).expect("removed");

        let agent = TestAgent::start(data.path()).await;
        assert_eq!(host_id(&agent).await.len(), 32);
        let found = agent.find("sb-1").await.expect("adopted");
        assert_eq!(found.installation_id, "");
        let client = client_of(&agent, "any");
        pause(&client, "sb-1").await.expect("paused");
        destroy(&client, "sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}
