//! The life of a sandbox in the E2B API: deadlines, pause, connect, end.

use std::{
    ops::RangeInclusive,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use wrenn_control::Limits;

use crate::support::{Control, ErrorCode, FakeAgent, Options, assert_e2b_failure, until};

async fn end_at(control: &Control, id: &str) -> jiff::Timestamp {
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    seen["endAt"].as_str().unwrap().parse().unwrap()
}

/// Returns the possible deadlines, in milliseconds since 1970, of a lifetime that was set between
/// `begun` and now.
fn end_since(begun: jiff::Timestamp, seconds: i64) -> RangeInclusive<i64> {
    let (begun, now) = (
        begun.as_millisecond(),
        jiff::Timestamp::now().as_millisecond(),
    );
    begun + seconds * 1000..=now + seconds * 1000
}

async fn state(control: &Control, id: &str) -> Option<String> {
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    seen["state"].as_str().map(str::to_owned)
}

async fn act(control: &Control, id: &str, what: &str, body: Value) -> (StatusCode, Value) {
    control.post(&format!("/sandboxes/{id}/{what}"), body).await
}

#[tokio::test]
async fn killed_sandbox_is_not_found() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let path = format!("/sandboxes/{id}");
    assert_eq!(control.delete(&path).await.0, StatusCode::NO_CONTENT);
    assert_e2b_failure(&control.delete(&path).await, 404, &[&id]);
    assert_e2b_failure(&control.get(&path).await, 404, &[&id]);
    assert_e2b_failure(&control.get(&format!("{path}/metrics")).await, 404, &[]);
    for what in [
        "timeout",
        "refreshes",
        "pause",
        "resume",
        "connect",
        "snapshots",
        "fork",
    ] {
        let got = act(&control, &id, what, json!({ "timeout": 10 })).await;
        assert_e2b_failure(&got, 404, &[]);
    }
    let network = format!("{path}/network");
    assert_e2b_failure(
        &control.call(Method::PUT, &network, &json!({})).await,
        404,
        &[],
    );
    let got = control
        .post(&format!("/v2/sandboxes/{id}/connect"), json!({}))
        .await;
    assert_e2b_failure(&got, 404, &[]);
    assert_eq!(control.get("/v2/sandboxes").await.1, json!([]));
    for unknown in [
        "nonexistingsandbox",
        "i00000000000000000000",
        "sb-none",
        "a%2Fb",
    ] {
        let path = format!("/sandboxes/{unknown}");
        assert_e2b_failure(&control.delete(&path).await, 404, &["was not found"]);
        assert_e2b_failure(&control.get(&path).await, 404, &["was not found"]);
    }
}

#[tokio::test]
async fn deadline_kills_within_a_second_regardless_of_activity() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let far = control.e2b_id(json!({ "timeout": 600 })).await;
    let id = control.e2b_id(json!({ "timeout": 2 })).await;
    until("the sandbox is killed", async || {
        state(&control, &id).await.is_none().then_some(())
    })
    .await;
    let row = control.until_status(&id, "stopped").await;
    let time = |field: &str| -> jiff::Timestamp { row[field].as_str().unwrap().parse().unwrap() };
    let late_ms = time("last_updated").as_millisecond() - time("expires_at").as_millisecond();
    // A deadline without a notification is noticed after 30 s only.
    assert!((0..10_000).contains(&late_ms), "{late_ms}");
    assert_eq!(row["error"], "lifetime expired");
    assert_eq!(state(&control, &far).await.as_deref(), Some("running"));
}

#[tokio::test]
async fn deadline_pauses_a_sandbox_that_is_shown_as_paused_meanwhile() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.state.pause_gate.shut();
    let made = control
        .e2b_create(json!({ "timeout": 1, "autoPause": true }))
        .await;
    let id = made["sandboxID"].as_str().unwrap();
    until("the sandbox is paused", async || {
        (state(&control, id).await.as_deref() == Some("paused")).then_some(())
    })
    .await;
    assert_eq!(control.status(id).await, "pausing");
    // A connect during the pause waits for its end.
    let path = format!("/v2/sandboxes/{id}/connect");
    let begun = jiff::Timestamp::now();
    let ((status, back), ()) =
        tokio::join!(control.post(&path, json!({ "timeout": 100 })), async {
            until("the host receives the pause", async || {
                (agent.state.pause_gate.waiting() == 1).then_some(())
            })
            .await;
            agent.state.pause_gate.open();
        });
    assert_eq!((status, &back), (StatusCode::CREATED, &made));
    assert_eq!(state(&control, id).await.as_deref(), Some("running"));
    let end = end_at(&control, id).await;
    assert!(
        end_since(begun, 100).contains(&end.as_millisecond()),
        "{begun} {end}"
    );
}

#[tokio::test]
async fn failed_pause_at_the_deadline_is_repeated() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    agent.fail(
        "PauseSandbox",
        ErrorCode::ResourceExhausted,
        "the disk is full",
    );
    let id = control
        .e2b_id(json!({ "timeout": 1, "autoPause": true }))
        .await;
    let row = until("the pause has failed", async || {
        let (_, row) = control.get(&format!("/v1/sandboxes/{id}")).await;
        row["warning"].is_string().then_some(row)
    })
    .await;
    assert!(
        row["warning"]
            .as_str()
            .unwrap()
            .contains("the disk is full"),
        "{row}"
    );
    agent.mend("PauseSandbox");
    control.until_status(&id, "paused").await;
}

#[tokio::test]
async fn deadline_that_passed_during_a_downtime_is_applied() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({ "timeout": 2 })).await;
    let dir = control.stop().await;
    let over = jiff::Timestamp::now().as_millisecond() + 2000;
    until("the lifetime is over", async || {
        (jiff::Timestamp::now().as_millisecond() > over).then_some(())
    })
    .await;
    let options = Options {
        dir,
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    control.until_status(&id, "stopped").await;
}

#[tokio::test]
async fn a_timeout_moves_the_deadline_both_ways_and_zero_ends_it_at_once() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({ "timeout": 100 })).await;
    for seconds in [1000, 50] {
        let begun = jiff::Timestamp::now();
        let got = act(&control, &id, "timeout", json!({ "timeout": seconds })).await;
        assert_eq!(got, (StatusCode::NO_CONTENT, Value::Null));
        let end = end_at(&control, &id).await;
        assert!(
            end_since(begun, seconds).contains(&end.as_millisecond()),
            "{begun} {end}"
        );
    }
    for bad in [
        json!({}),
        json!({ "timeout": -1 }),
        json!({ "timeout": 30 * 86_400 + 1 }),
    ] {
        assert_e2b_failure(&act(&control, &id, "timeout", bad).await, 400, &["timeout"]);
    }
    let got = act(&control, &id, "timeout", json!({ "timeout": 0 })).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
    assert_eq!(state(&control, &id).await, None);

    let id = control.e2b_id(json!({ "autoPause": true })).await;
    let got = act(&control, &id, "timeout", json!({ "timeout": 0 })).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
    assert_eq!(state(&control, &id).await.as_deref(), Some("paused"));
    let got = act(&control, &id, "timeout", json!({ "timeout": 10 })).await;
    assert_e2b_failure(&got, 404, &[]);
}

#[tokio::test]
async fn deadline_is_limited_by_the_setting() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    // 30 days by default.
    for (timeout, status) in [(2_592_000, 201), (2_592_001, 400)] {
        let body = json!({ "templateID": "minimal", "timeout": timeout });
        let got = control.post("/v2/sandboxes", body).await;
        assert_eq!(got.0.as_u16(), status, "{}", got.1);
    }
    let limits = Limits {
        max_lifetime_sec: 86_400,
        ..Limits::default()
    };
    let agent = FakeAgent::start().await;
    let options = Options {
        limits,
        ..Options::default()
    };
    let control = Control::start_with(&agent, options).await;
    let id = control.e2b_id(json!({ "timeout": 86_400 })).await;
    let before = end_at(&control, &id).await;
    let far = 86_401;
    for path in ["/v2/sandboxes", "/sandboxes"] {
        let body = json!({ "templateID": "minimal", "timeout": far });
        let got = control.post(path, body).await;
        assert_e2b_failure(&got, 400, &["timeout", "86400"]);
    }
    for (path, field) in [
        (format!("/v2/sandboxes/{id}/connect"), "timeout"),
        (format!("/sandboxes/{id}/connect"), "timeout"),
        (format!("/sandboxes/{id}/resume"), "timeout"),
        (format!("/sandboxes/{id}/timeout"), "timeout"),
        (format!("/sandboxes/{id}/fork"), "timeout"),
        (format!("/sandboxes/{id}/refreshes"), "duration"),
    ] {
        let got = control.post(&path, json!({ field: far })).await;
        assert_e2b_failure(&got, 400, &[field]);
    }
    assert_eq!(end_at(&control, &id).await, before);
    assert_eq!(agent.calls("CreateSandbox"), 1);
    let got = act(&control, &id, "timeout", json!({ "timeout": 86_400 })).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn connect_and_refresh_never_shorten_the_lifetime() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let made = control.e2b_create(json!({ "timeout": 200 })).await;
    let id = made["sandboxID"].as_str().unwrap();
    let before = end_at(&control, id).await;
    for path in [
        format!("/v2/sandboxes/{id}/connect"),
        format!("/sandboxes/{id}/connect"),
    ] {
        let (status, back) = control.post(&path, json!({ "timeout": 10 })).await;
        assert_eq!((status, &back), (StatusCode::OK, &made));
    }
    let got = act(&control, id, "refreshes", json!({ "duration": 10 })).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
    assert_eq!(end_at(&control, id).await, before);
    let (status, _) = control
        .post(&format!("/v2/sandboxes/{id}/connect"), json!({}))
        .await;
    assert_eq!(status, StatusCode::OK);
    let left = end_at(&control, id).await.as_second() - before.as_second();
    assert!((99..=130).contains(&left), "{left}");
    let got = act(&control, id, "refreshes", json!({ "duration": 3601 })).await;
    assert_e2b_failure(&got, 400, &["duration"]);
    // A sandbox without a deadline gets none.
    let plain = control.create().await;
    let (status, _) = act(&control, &plain, "connect", json!({ "timeout": 1 })).await;
    assert_eq!(status, StatusCode::OK);
    let (_, row) = control.get(&format!("/v1/sandboxes/{plain}")).await;
    assert!(row.get("expires_at").is_none_or(Value::is_null), "{row}");
}

#[tokio::test]
async fn a_sandbox_is_paused_once_and_resumed_with_the_same_token() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let made = control.e2b_create(json!({ "timeout": 100 })).await;
    let id = made["sandboxID"].as_str().unwrap();
    assert_eq!(
        act(&control, id, "pause", json!({})).await.0,
        StatusCode::NO_CONTENT
    );
    assert_e2b_failure(
        &act(&control, id, "pause", json!({})).await,
        409,
        &["paused"],
    );
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(
        (&seen["state"], &seen["pauseMode"]),
        (&json!("paused"), &json!("full"))
    );
    let (status, back) = act(&control, id, "resume", json!({ "autoPause": true })).await;
    assert_eq!((status, &back), (StatusCode::CREATED, &made));
    assert!(!agent.state.cold_boot.load(Ordering::SeqCst));
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["lifecycle"]["onTimeout"], "pause");
    assert!(seen.get("pauseMode").is_none(), "{seen}");
    assert_e2b_failure(
        &act(&control, id, "resume", json!({})).await,
        409,
        &["running"],
    );
    assert_eq!(
        act(&control, id, "pause", json!({})).await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        control.delete(&format!("/sandboxes/{id}")).await.0,
        StatusCode::NO_CONTENT
    );
}

#[tokio::test]
async fn a_pause_of_the_disk_only_boots_when_it_is_resumed() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let booted = || agent.state.cold_boot.load(Ordering::SeqCst);
    let id = control.e2b_id(json!({})).await;
    let got = act(&control, &id, "pause", json!({ "memory": false })).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["pauseMode"], "filesystem");
    assert_eq!(
        act(&control, &id, "connect", json!({})).await.0,
        StatusCode::CREATED
    );
    assert!(booted());
    assert_eq!(
        act(&control, &id, "pause", json!({})).await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        act(&control, &id, "connect", json!({})).await.0,
        StatusCode::CREATED
    );
    assert!(!booted());
    assert_eq!(
        act(&control, &id, "pause", json!({})).await.0,
        StatusCode::NO_CONTENT
    );
    let got = act(&control, &id, "connect", json!({ "memory": false })).await;
    assert_eq!(got.0, StatusCode::CREATED);
    assert!(booted());

    let id = control
        .e2b_id(json!({ "timeout": 1, "autoPause": true, "autoPauseMemory": false }))
        .await;
    control.until_status(&id, "paused").await;
    agent.state.cold_boot.store(false, Ordering::SeqCst);
    assert_eq!(
        act(&control, &id, "connect", json!({})).await.0,
        StatusCode::CREATED
    );
    assert!(booted());
}

#[tokio::test]
async fn unhealthy_guest_is_not_paused_if_health_is_required() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    agent.fail(
        "GetMetrics",
        ErrorCode::Unavailable,
        "the guest does not answer",
    );
    let body = json!({ "requireHealthyGuest": true });
    let got = act(&control, &id, "pause", body.clone()).await;
    assert_e2b_failure(&got, 503, &[&id]);
    assert_eq!(
        got.1["error_code"],
        "sandbox_snapshot_guest_agent_unresponsive"
    );
    assert_eq!(state(&control, &id).await.as_deref(), Some("running"));
    agent.mend("GetMetrics");
    assert_eq!(
        act(&control, &id, "pause", body).await.0,
        StatusCode::NO_CONTENT
    );
}

#[tokio::test]
async fn a_deadline_that_is_moved_while_a_pause_begins_is_never_lost() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "timeout": 1, "autoPause": true }))
        .await;
    // Connects repeatedly around the deadline. Each response must hold, in any order of connect and
    // pause.
    for _ in 0..60 {
        let path = format!("/v2/sandboxes/{id}/connect");
        let begun = Instant::now();
        let (status, body) = control.post(&path, json!({ "timeout": 1 })).await;
        assert!(status.is_success(), "{body}");
        let seen = state(&control, &id).await;
        // On a slow machine, the new deadline may already have passed.
        assert!(
            seen.as_deref() == Some("running") || begun.elapsed() > Duration::from_secs(1),
            "{seen:?}"
        );
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert_eq!(agent.overlaps(), 0);
}

#[tokio::test]
async fn a_network_is_replaced_at_the_host_and_what_is_omitted_is_cleared() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control
        .e2b_id(json!({ "network": { "denyOut": ["8.8.8.8"] } }))
        .await;
    let path = format!("/sandboxes/{id}/network");
    let body = json!({ "allowOut": ["1.1.1.0/24"], "allow_internet_access": true });
    let got = control.call(Method::PUT, &path, &body).await;
    assert_eq!(got, (StatusCode::NO_CONTENT, Value::Null));
    let asked = agent.last_network();
    let lists = asked.network.into_option().unwrap();
    assert_eq!(
        (lists.allow, lists.deny),
        (vec!["1.1.1.0/24".to_owned()], vec![])
    );
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["allowInternetAccess"], true);
    assert_eq!(seen["network"]["denyOut"], json!([]));
    let got = control.call(Method::PUT, &path, &json!({})).await;
    assert_eq!(got.0, StatusCode::NO_CONTENT);
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["allowInternetAccess"], Value::Null);
    assert_eq!(seen["network"]["allowOut"], json!([]));
    for (body, status) in [
        (json!({ "rules": { "x": [] } }), 501),
        (json!({ "denyOut": ["x.org"] }), 400),
    ] {
        assert_e2b_failure(&control.call(Method::PUT, &path, &body).await, status, &[]);
    }
    agent.fail(
        "UpdateNetwork",
        ErrorCode::Internal,
        "the rules were rejected",
    );
    let got = control
        .call(Method::PUT, &path, &json!({ "denyOut": ["1.1.1.1"] }))
        .await;
    assert_e2b_failure(&got, 500, &["rejected"]);
    let (_, seen) = control.get(&format!("/sandboxes/{id}")).await;
    assert_eq!(seen["network"]["denyOut"], json!([]));
}

#[tokio::test]
async fn metrics_have_a_sample_at_once_and_keep_it_over_a_pause() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let path = format!("/sandboxes/{id}/metrics");
    let (status, samples) = control.get(&path).await;
    assert_eq!(status, StatusCode::OK);
    let sample = &samples[0];
    let second = sample["timestampUnix"].as_i64().unwrap();
    for (field, wanted) in [
        ("cpuCount", json!(2)),
        ("cpuUsedPct", json!(12.5)),
        ("memUsed", json!(400)),
        ("memTotal", json!(1000)),
        ("memCache", json!(100)),
        ("diskUsed", json!(600)),
        ("diskTotal", json!(5000)),
    ] {
        assert_eq!(sample[field], wanted, "{field}");
    }
    let (_, inside) = control
        .get(&format!("{path}?start={second}&end={}", second + 1))
        .await;
    assert_eq!(inside[0], *sample);
    let (_, before) = control.get(&format!("{path}?end={}", second - 1)).await;
    assert_eq!(before, json!([]));
    let got = control.get(&format!("{path}?start=2&end=1")).await;
    assert_e2b_failure(&got, 400, &["start"]);
    assert_eq!(
        act(&control, &id, "pause", json!({})).await.0,
        StatusCode::NO_CONTENT
    );
    let (_, paused) = control.get(&path).await;
    assert_eq!(paused[0], *sample);
    let (_, many) = control
        .get(&format!("/sandboxes/metrics?sandbox_ids={id},unknown"))
        .await;
    assert_eq!(many["sandboxes"][&id]["memUsed"], 400);
    assert_eq!(many["sandboxes"].as_object().unwrap().len(), 1);
}

#[tokio::test]
async fn first_sample_is_taken_automatically_and_samples_respect_the_range() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let path = format!("/sandboxes/{id}/metrics");
    let many = format!("/sandboxes/metrics?sandbox_ids={id}");
    let first = until("a sample exists without a request", async || {
        let (_, seen) = control.get(&many).await;
        seen["sandboxes"].get(&id).cloned()
    })
    .await;
    let taken: jiff::Timestamp = first["timestamp"].as_str().unwrap().parse().unwrap();
    let (floor, next) = (taken.as_second(), taken.as_second() + 1);
    // The request of a client whose clock is in the second of the sample, rounded down.
    let asked = agent.calls("GetMetrics");
    let (_, seen) = control.get(&format!("{path}?end={floor}")).await;
    let wanted = match taken.as_millisecond() % 1000 {
        0 => json!([first]),
        _ => json!([]),
    };
    assert_eq!(seen, wanted);
    assert_eq!(
        agent.calls("GetMetrics"),
        asked,
        "a request for the past takes no sample"
    );
    let (_, seen) = control
        .get(&format!("{path}?start={floor}&end={next}"))
        .await;
    assert_eq!(seen[0], first);
    let (_, seen) = control.get(&format!("{path}?start={next}")).await;
    for sample in seen.as_array().unwrap() {
        assert!(sample["timestampUnix"].as_i64().unwrap() >= next, "{seen}");
    }
    // A guest that does not answer has no sample. Its create still succeeds.
    agent.fail(
        "GetMetrics",
        ErrorCode::Unavailable,
        "the guest does not answer",
    );
    let deaf = control.e2b_id(json!({})).await;
    assert_eq!(state(&control, &deaf).await.as_deref(), Some("running"));
}
