//! Snapshots, forks and templates of the E2B API.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, ErrorCode, FakeAgent, assert_e2b_failure};

#[tokio::test]
async fn snapshot_is_created_used_listed_and_deleted_by_its_id() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.e2b_id(json!({})).await;
    let path = format!("/sandboxes/{id}/snapshots");
    let (status, made) = control.post(&path, json!({})).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(made["names"], json!([]));
    let unnamed = made["snapshotID"].as_str().unwrap().to_owned();
    assert!(unnamed.ends_with(":default"), "{unnamed}");
    let mut all = vec![(unnamed, None)];
    for name in ["mine", "wrenn/mine:v1", "mine:v2"] {
        let (status, made) = control.post(&path, json!({ "name": name })).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        assert_eq!(made["names"], json!(["wrenn/mine"]));
        all.push((made["snapshotID"].as_str().unwrap().to_owned(), Some(name)));
    }
    assert_eq!(all[1].0, "wrenn/mine:default");
    assert_eq!(all[3].0, "wrenn/mine:v2");
    // The source keeps running.
    assert_eq!(control.status(&id).await, "running");
    let escaped = |text: &str| text.replace('/', "%2F").replace(':', "%3A");
    for (snapshot, name) in &all {
        let made = control.e2b_create(json!({ "templateID": snapshot })).await;
        if let Some(name) = name {
            assert_eq!(made["alias"], "mine", "{made}");
            let (status, alias) = control
                .get(&format!("/templates/aliases/{}", escaped(name)))
                .await;
            assert_eq!(status, StatusCode::OK);
            assert_eq!(alias["templateID"], made["templateID"]);
        }
        let by_id = json!({ "templateID": made["templateID"] });
        let (status, _) = control.post("/v2/sandboxes", by_id).await;
        assert_eq!(status, StatusCode::CREATED);
    }
    let (_, of_sandbox) = control.get(&format!("/snapshots?sandboxID={id}")).await;
    assert_eq!(of_sandbox.as_array().unwrap().len(), 4);
    let (_, of_other) = control.get("/snapshots?sandboxID=i0").await;
    assert_eq!(of_other, json!([]));
    let (_, named) = control.get("/snapshots?name=mine").await;
    assert_eq!(named.as_array().unwrap().len(), 3);
    let (_, tagged) = control.get("/snapshots?name=wrenn%2Fmine%3Av1").await;
    assert_eq!(tagged[0]["snapshotID"], "wrenn/mine:v1");
    let mut walked = Vec::new();
    let mut next = String::new();
    loop {
        let url = format!("/snapshots?limit=1&nextToken={next}");
        let response = control.request(Method::GET, &url).send().await.unwrap();
        let token = response.headers().get("x-next-token").cloned();
        let body: Value = response.json().await.unwrap();
        walked.push(body[0]["snapshotID"].as_str().unwrap().to_owned());
        match token {
            Some(token) => next = token.to_str().unwrap().to_owned(),
            None => break,
        }
    }
    walked.sort();
    let mut ids: Vec<_> = all.iter().map(|(id, _)| id.clone()).collect();
    ids.sort();
    assert_eq!(walked, ids);
    for (snapshot, _) in &all {
        let path = format!("/templates/{}", escaped(snapshot));
        assert_eq!(
            control.delete(&path).await.0,
            StatusCode::NO_CONTENT,
            "{snapshot}"
        );
        assert_e2b_failure(&control.delete(&path).await, 404, &[]);
    }
    assert_eq!(agent.template_names(), ["minimal"]);
}

#[tokio::test]
async fn named_snapshot_replaces_the_previous_one_but_never_an_image() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (a, b) = (
        control.e2b_id(json!({})).await,
        control.e2b_id(json!({})).await,
    );
    for id in [&a, &b] {
        let (status, _) = control
            .post(
                &format!("/sandboxes/{id}/snapshots"),
                json!({ "name": "n" }),
            )
            .await;
        assert_eq!(status, StatusCode::CREATED);
    }
    let (_, of_first) = control.get(&format!("/snapshots?sandboxID={a}")).await;
    assert_eq!(of_first, json!([]));
    let (_, of_second) = control.get(&format!("/snapshots?sandboxID={b}")).await;
    assert_eq!(of_second[0]["snapshotID"], "wrenn/n:default");
    for (body, status) in [
        (json!({ "name": "other/n" }), 400),
        (json!({ "name": "a b" }), 400),
        (json!({ "name": "a..b" }), 400),
        (json!({ "memory": false }), 501),
        (json!({ "name": "minimal" }), 409),
        (json!({ "name": "wrenn/minimal:default" }), 409),
    ] {
        let got = control
            .post(&format!("/sandboxes/{a}/snapshots"), body)
            .await;
        assert_e2b_failure(&got, status, &[]);
    }
    assert_e2b_failure(&control.delete("/templates/minimal").await, 409, &["image"]);
}

#[tokio::test]
async fn templates_are_listed_and_found_by_their_names() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for path in ["/templates", "/v2/templates"] {
        let (status, list) = control.get(path).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(list[0]["templateID"], "minimal");
        assert_eq!(list[0]["names"], json!(["wrenn/minimal"]));
        assert_eq!(list[0]["buildID"].as_str().unwrap().len(), 36);
    }
    let (status, alias) = control.get("/templates/aliases/minimal").await;
    assert_eq!(
        (status, alias),
        (
            StatusCode::OK,
            json!({ "templateID": "minimal", "public": false })
        )
    );
    for unknown in ["nonesuch", "minimal%3Av1", "other%2Fminimal", "a%20b"] {
        let got = control.get(&format!("/templates/aliases/{unknown}")).await;
        assert_e2b_failure(&got, 404, &[]);
    }
}

#[tokio::test]
async fn copies_have_ids_tokens_and_deadlines_of_their_own() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let source = control
        .e2b_create(json!({ "metadata": { "a": "b" }, "network": { "allowPublicTraffic": false } }))
        .await;
    let id = source["sandboxID"].as_str().unwrap();
    let path = format!("/sandboxes/{id}/fork");
    let (status, forked) = control
        .post(&path, json!({ "count": 3, "timeout": 60 }))
        .await;
    assert_eq!(status, StatusCode::CREATED, "{forked}");
    let forked = forked.as_array().unwrap();
    assert_eq!(forked.len(), 3);
    for entry in forked {
        let copy = &entry["sandbox"];
        let copy_id = copy["sandboxID"].as_str().unwrap();
        assert!(copy_id != id && copy_id.starts_with('i'));
        assert_eq!(copy["envdAccessToken"], format!("token-of-{copy_id}"));
        assert_ne!(copy["trafficAccessToken"], source["trafficAccessToken"]);
        let (_, seen) = control.get(&format!("/sandboxes/{copy_id}")).await;
        assert_eq!(seen["metadata"], json!({ "a": "b" }));
        let time = |field: &str| {
            seen[field]
                .as_str()
                .unwrap()
                .parse::<jiff::Timestamp>()
                .unwrap()
        };
        let lives = time("endAt").as_second() - time("startedAt").as_second();
        assert!((59..=61).contains(&lives), "{lives}");
    }
    // Copies of a `/v1` sandbox belong to the E2B API.
    let plain = control.create().await;
    let (_, forked) = control
        .post(&format!("/sandboxes/{plain}/fork"), Value::Null)
        .await;
    assert!(
        forked[0]["sandbox"]["sandboxID"]
            .as_str()
            .unwrap()
            .starts_with('i')
    );
    for bad in [
        json!({ "count": 0 }),
        json!({ "count": 101 }),
        json!({ "timeout": 0 }),
    ] {
        assert_e2b_failure(&control.post(&path, bad).await, 400, &[]);
    }
    agent.fail(
        "ForkSandbox",
        ErrorCode::ResourceExhausted,
        "no memory left",
    );
    let request = control.request(Method::POST, &path).send().await.unwrap();
    assert_eq!(request.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(request.headers()["should-retry"], "false");
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_e2b_failure(&control.post(&path, json!({})).await, 409, &["paused"]);
    let (status, _) = control
        .post(&format!("/sandboxes/{id}/snapshots"), json!({}))
        .await;
    assert_eq!(status, StatusCode::CREATED);
}
