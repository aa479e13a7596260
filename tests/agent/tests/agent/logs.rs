//! Logs of sandboxes: readable while a sandbox exists, and after a failure.

use std::{fs, io::Write as _};

use connectrpc::ErrorCode;
use wrenn_proto::{
    rpc::hostagent::v1::{self as pb, LogSource},
    supervise::files,
};

use crate::agent::{self, TestAgent, on_private_host};

const ID: &str = "sb-1";

async fn log(agent: &TestAgent, source: LogSource) -> Result<String, ErrorCode> {
    let request = pb::GetSandboxLogRequest {
        id: ID.to_owned(),
        source: source.into(),
        ..Default::default()
    };
    let answer = agent.client.get_sandbox_log(request).await;
    let content = answer.map_err(|error| error.code)?.into_owned().content;
    Ok(String::from_utf8(content).expect("text"))
}

/// Appends a line to the sandbox's log, as its supervisor does.
fn write(agent: &TestAgent, line: &str) {
    let path = agent.sandbox_dir(ID).join(files::LOG);
    let log = fs::File::options().append(true).open(path);
    writeln!(log.expect("opened"), "{line}").expect("written");
}

#[test]
fn log_of_a_lost_sandbox_is_readable_after_it_was_removed() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let supervisor = LogSource::LOG_SOURCE_SUPERVISOR;
        assert_eq!(log(&agent, supervisor).await, Err(ErrorCode::NotFound));
        agent.create(ID).await.expect("created");
        write(&agent, "{\"n\":1}");
        let found = log(&agent, supervisor).await.expect("a log");
        assert!(found.ends_with("{\"n\":1}\n"), "{found}");
        let console = log(&agent, LogSource::LOG_SOURCE_CONSOLE).await;
        assert_eq!(console, Err(ErrorCode::NotFound));

        agent::kill_9(agent.supervisor_pid(ID));
        let lost = pb::SandboxState::SANDBOX_STATE_ERROR;
        agent.wait_for(ID, lost).await;
        agent.destroy(ID).await.expect("destroyed");
        assert!(!agent.sandbox_dir(ID).exists());
        assert_eq!(log(&agent, supervisor).await, Ok(found));
        agent.stop().await;
    });
}

#[test]
fn log_of_a_failed_create_is_kept_and_that_of_a_destroyed_sandbox_is_not() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let supervisor = LogSource::LOG_SOURCE_SUPERVISOR;
        agent.create(ID).await.expect("created");
        agent.destroy(ID).await.expect("destroyed");
        assert_eq!(log(&agent, supervisor).await, Err(ErrorCode::NotFound));
        let failed = agent.create_with(agent::faulty(ID, "die-in-boot")).await;
        failed.expect_err("the VM ends");
        assert!(log(&agent, supervisor).await.is_ok());
        agent.stop().await;
    });
}
