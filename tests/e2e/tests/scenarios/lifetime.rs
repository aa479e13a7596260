//! Ends of sandboxes whose guest agent does not answer.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{
    Sandbox, Service,
    wait::{GENEROUS, until},
};

/// Maximum time from the end of the lifetime until the sandbox is paused: three attempts, of which
/// two wait 11 s for the guest, and the delays between them. Twice as long on a busy machine.
const PAUSED_WITHIN: Duration = Duration::from_secs(90);

/// Stops the guest agent from inside the guest, and waits until it does not answer.
async fn stop_guest_agent(service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    // In the background, because the guest agent cannot report the end of the command.
    let script = "for p in /proc/[0-9]*; do \
                  [ \"$(cat $p/comm)\" = envd ] && kill -STOP ${p#/proc/}; done";
    let body = json!({ "cmd": "sh", "args": ["-c", script], "background": true });
    // The agent may be stopped before its response is sent.
    let request = service.request(Method::POST, &sandbox.path("/exec"));
    let _ = request
        .json(&body)
        .timeout(Duration::from_secs(5))
        .send()
        .await;
    until("the guest agent is stopped", GENEROUS, async || {
        let request = service.request(Method::GET, &sandbox.path("/processes"));
        let answer = request.timeout(Duration::from_secs(2)).send().await;
        Ok(answer.is_err().then_some(()))
    })
    .await
}

#[tokio::test]
async fn sandbox_whose_guest_agent_is_stopped_does_not_outlive_its_lifetime() -> Result<()> {
    let service = Service::start().await?;
    let body = json!({ "timeout_sec": 5, "on_timeout": "pause" });
    let sandbox = service.create_with(body).await?;
    sandbox.script("echo kept >/root/kept; sync").await?;
    stop_guest_agent(&service, &sandbox).await?;
    let record = until("the sandbox is paused", PAUSED_WITHIN, async || {
        let record = sandbox.record().await?;
        Ok((record["status"] == "paused").then_some(record))
    })
    .await?;
    let warning = record["warning"].as_str().unwrap_or_default();
    assert!(warning.contains("guest agent"), "{record}");
    // In its memory, the agent is still stopped.
    sandbox.boot().await?;
    assert_eq!(sandbox.shell("cat /root/kept").await?.stdout, "kept\n");
    sandbox.destroy().await
}

#[tokio::test]
async fn delete_is_quick_while_a_pause_waits_for_the_guest_agent() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    stop_guest_agent(&service, &sandbox).await?;
    let path = sandbox.path("/pause");
    let body = json!({});
    let pause = service.json(Method::POST, &path, &body);
    let destroy = async {
        until("the pause is in progress", GENEROUS, async || {
            let record = sandbox.record().await?;
            Ok((record["status"] == "pausing").then_some(()))
        })
        .await?;
        let began = Instant::now();
        sandbox.destroy().await?;
        anyhow::Ok(began.elapsed())
    };
    let (paused, took) = tokio::join!(pause, destroy);
    let took = took?;
    assert!(took < Duration::from_secs(8), "the destroy took {took:?}");
    let (status, reply) = paused?;
    ensure!(!status.is_success(), "{reply}");
    assert_eq!(sandbox.record().await?["status"], "stopped");
    Ok(())
}
