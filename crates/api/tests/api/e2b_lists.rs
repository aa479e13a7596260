//! Lists of the E2B API: filters, order, pages.

use proptest::prelude::*;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Control, FakeAgent, assert_e2b_failure};

/// Returns a page, and the token of the next one.
async fn page(control: &Control, query: &str) -> (Vec<String>, Option<String>) {
    let request = control.request(Method::GET, &format!("/v2/sandboxes?{query}"));
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "{query}");
    let token = response.headers().get("x-next-token");
    let token = token.map(|token| token.to_str().unwrap().to_owned());
    let body: Value = response.json().await.unwrap();
    let ids = body.as_array().unwrap().iter();
    (
        ids.map(|row| row["sandboxID"].as_str().unwrap().to_owned())
            .collect(),
        token,
    )
}

/// Returns the number of running sandboxes that a list of the second version reports.
async fn total_running(control: &Control, query: &str) -> Option<u64> {
    let request = control.request(Method::GET, &format!("/v2/sandboxes?{query}"));
    let response = request.send().await.unwrap();
    let total = response.headers().get("x-total-running")?;
    Some(total.to_str().unwrap().parse().unwrap())
}

#[tokio::test]
async fn list_reports_the_number_of_running_sandboxes() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for n in 0..3 {
        let metadata = json!({ "even": (n % 2 == 0).to_string() });
        control.e2b_id(json!({ "metadata": metadata })).await;
    }
    let paused = control.e2b_id(json!({})).await;
    let pause = format!("/sandboxes/{paused}/pause");
    let (status, _) = control.post(&pause, json!({})).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (_, token) = page(&control, "limit=1").await;
    let next = format!("limit=1&nextToken={}", token.unwrap());
    for (query, total) in [
        ("", Some(3)),
        ("limit=1", Some(3)),
        (&*next, Some(3)),
        ("state=running&order=asc", Some(3)),
        ("state=paused", None),
        ("metadata=even%3Dtrue&limit=1", Some(2)),
        ("template=minimal", Some(3)),
        ("template=other", Some(0)),
        ("startedAfter=2999-01-01T00:00:00Z", Some(0)),
    ] {
        assert_eq!(total_running(&control, query).await, total, "{query}");
    }
}

/// Returns the entries of all pages, in order.
async fn walk(control: &Control, query: &str) -> Vec<String> {
    let (mut all, mut token) = page(control, query).await;
    while let Some(next) = token {
        let (more, next) = page(control, &format!("{query}&nextToken={next}")).await;
        assert!(!more.is_empty(), "a page after the last");
        all.extend(more);
        token = next;
    }
    all
}

#[tokio::test]
async fn list_is_filtered_by_metadata_state_and_template() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let a = control
        .e2b_id(json!({ "metadata": { "a b": "c&d", "x": "1" } }))
        .await;
    let b = control.e2b_id(json!({ "metadata": { "x": "1" } })).await;
    let c = control.create().await;
    let (status, _) = control
        .post(&format!("/sandboxes/{b}/pause"), json!({}))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let ids = async |query: &str| page(&control, query).await.0;
    assert_eq!(ids("").await, [c.clone(), b.clone(), a.clone()]);
    assert_eq!(ids("metadata=a%252520b%3Dc%252526d").await, [a.as_str()]);
    assert_eq!(ids("metadata=x%3D1").await, [b.clone(), a.clone()]);
    assert_eq!(
        ids("metadata=x%3D1%26a%252520b%3Dc%252526d").await,
        [a.as_str()]
    );
    assert!(ids("metadata=x%3D2").await.is_empty());
    assert_eq!(ids("state=paused").await, [b.as_str()]);
    assert_eq!(ids("state=running").await, [c.clone(), a.clone()]);
    assert_eq!(
        ids("state=running%2Cpaused&order=asc").await,
        [a.clone(), b.clone(), c.clone()]
    );
    assert_eq!(ids("template=minimal").await.len(), 3);
    assert_eq!(ids("template=wrenn%2Fminimal%3Adefault").await.len(), 3);
    assert!(ids("template=other").await.is_empty());
    let (_, seen) = control.get(&format!("/sandboxes/{b}")).await;
    let from = seen["startedAt"].as_str().unwrap();
    assert_eq!(
        ids(&format!("startedAfter={from}&order=asc")).await,
        [b.clone(), c.clone()]
    );
    // Version 1 lists running sandboxes.
    let (_, first) = control.get("/sandboxes").await;
    assert_eq!(first.as_array().unwrap().len(), 2);
    for bad in [
        "limit=0",
        "order=up",
        "state=stopped",
        "nextToken=x",
        "startedAfter=x",
        "limit=x",
    ] {
        let got = control.get(&format!("/v2/sandboxes?{bad}")).await;
        assert_e2b_failure(&got, 400, &[]);
    }
}

/// Actions of a client before and between pages.
#[derive(Debug, Clone, Copy)]
enum Step {
    Create { marked: bool },
    Pause(usize),
    Kill(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<bool>().prop_map(|marked| Step::Create { marked }),
        2 => (0_usize..20).prop_map(Step::Pause),
        1 => (0_usize..20).prop_map(Step::Kill),
    ]
}

/// Checks that after any steps, pages of any size, in both orders and with any filter, contain each
/// entry of the list exactly once.
async fn pages_are_the_list(steps: Vec<Step>, limit: usize) {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    // Id, paused, marked.
    let mut alive: Vec<(String, bool, bool)> = Vec::new();
    for step in steps {
        match step {
            Step::Create { marked } => {
                let metadata = if marked {
                    json!({ "m": "1" })
                } else {
                    json!({})
                };
                let id = control.e2b_id(json!({ "metadata": metadata })).await;
                alive.push((id, false, marked));
            }
            Step::Pause(n) if n < alive.len() => {
                let (id, paused, _) = &mut alive[n];
                control
                    .post(&format!("/sandboxes/{id}/pause"), json!({}))
                    .await;
                *paused = true;
            }
            Step::Kill(n) if n < alive.len() => {
                let (id, ..) = alive.remove(n);
                control.delete(&format!("/sandboxes/{id}")).await;
            }
            Step::Pause(_) | Step::Kill(_) => {}
        }
    }
    let (whole, more) = page(&control, "limit=100&order=asc").await;
    assert_eq!(more, None);
    let mut sorted = whole.clone();
    sorted.sort();
    let mut ids: Vec<_> = alive.iter().map(|(id, ..)| id.clone()).collect();
    ids.sort();
    assert_eq!(sorted, ids);
    let only = |keep: &dyn Fn(bool, bool) -> bool| {
        let kept = |id: &&String| alive.iter().any(|(i, p, m)| i == *id && keep(*p, *m));
        whole.iter().filter(kept).cloned().collect::<Vec<_>>()
    };
    for (filter, wanted) in [
        ("", whole.clone()),
        ("&state=running", only(&|paused, _| !paused)),
        ("&state=paused", only(&|paused, _| paused)),
        ("&metadata=m%3D1", only(&|_, marked| marked)),
    ] {
        let mut back = wanted.clone();
        back.reverse();
        assert_eq!(
            walk(&control, &format!("limit={limit}&order=asc{filter}")).await,
            wanted
        );
        assert_eq!(
            walk(&control, &format!("limit={limit}{filter}")).await,
            back
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn pages_of_any_size_contain_every_entry_once(
        steps in prop::collection::vec(step(), 0..14), limit in 1_usize..5
    ) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(pages_are_the_list(steps, limit));
    }
}
