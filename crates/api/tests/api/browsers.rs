//! Browser access to the E2B API, and responses of both API versions for a sandbox that requires no
//! token.

use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};
use sqlx::Connection as _;

use crate::support::{Control, FakeAgent, Options, assert_failure};

const ORIGIN: &str = "https://page.example";

/// Sends the preflight request of a browser. Preflight requests carry no key.
async fn preflight(control: &Control, path: &str, method: &str) -> Response {
    reqwest::Client::new()
        .request(Method::OPTIONS, control.url(path))
        .header("Origin", ORIGIN)
        .header("Access-Control-Request-Method", method)
        .header(
            "Access-Control-Request-Headers",
            "content-type,x-api-key,idempotency-key",
        )
        .send()
        .await
        .unwrap()
}

fn text(response: &Response, name: &str) -> String {
    let value = response.headers().get(name);
    value.map_or_else(String::new, |value| value.to_str().unwrap().to_owned())
}

fn has_cors(response: &Response) -> bool {
    let mut names = response.headers().keys();
    names.any(|name| name.as_str().starts_with("access-control-"))
}

#[tokio::test]
async fn a_preflight_of_the_e2b_api_is_answered_without_a_key() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for (path, method) in [
        ("/v2/sandboxes", "POST"),
        ("/sandboxes", "GET"),
        ("/sandboxes/i00000000000000000000", "DELETE"),
        ("/sandboxes/i00000000000000000000/network", "PUT"),
        ("/templates/a%2Fb", "PATCH"),
        ("/v2/sandboxes/i00000000000000000000/connect", "POST"),
    ] {
        let answer = preflight(&control, path, method).await;
        assert!(answer.status().is_success(), "{answer:?}");
        assert_eq!(text(&answer, "access-control-allow-origin"), "*");
        let methods = text(&answer, "access-control-allow-methods");
        assert!(methods.split(',').any(|got| got == method), "{methods}");
        assert_eq!(
            text(&answer, "access-control-allow-headers"),
            "content-type,x-api-key,idempotency-key"
        );
        assert_eq!(text(&answer, "access-control-max-age"), "7200");
    }
    // Any other `OPTIONS` request is an ordinary call.
    let other = reqwest::Client::new().request(Method::OPTIONS, control.url("/v2/sandboxes"));
    let answer = other.header("Origin", ORIGIN).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let answer = control.request(Method::OPTIONS, "/v2/sandboxes").send();
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn responses_and_next_page_token_are_readable_across_origins() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for _ in 0..2 {
        control.e2b_id(json!({})).await;
    }
    let ask = async |path: &str, key: &str| {
        let request = reqwest::Client::new().get(control.url(path));
        let request = request.header("Origin", ORIGIN).header("X-API-Key", key);
        request.send().await.unwrap()
    };
    let page = ask("/v2/sandboxes?limit=1", control.key()).await;
    assert_eq!(page.status(), StatusCode::OK);
    assert!(!text(&page, "x-next-token").is_empty());
    for (path, key, status) in [
        ("/v2/sandboxes?limit=1", control.key(), 200),
        ("/v2/sandboxes", "x", 401),
        ("/sandboxes/i00000000000000000000", control.key(), 404),
        ("/v2/nonesuch", control.key(), 404),
        ("/secrets", control.key(), 501),
    ] {
        let answer = ask(path, key).await;
        assert_eq!(answer.status(), status, "{path}");
        assert_eq!(text(&answer, "access-control-allow-origin"), "*", "{path}");
        assert_eq!(
            text(&answer, "access-control-expose-headers"),
            "x-next-token,x-total-running"
        );
    }
}

#[tokio::test]
async fn v1_api_is_not_readable_across_origins() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    for path in [
        "/v1/sandboxes",
        "/v1/api-keys",
        "/openapi.yaml",
        "/nonesuch",
    ] {
        let answer = preflight(&control, path, "GET").await;
        assert!(!has_cors(&answer), "{answer:?}");
        let status = answer.status();
        assert_failure(
            &(status, answer.json().await.unwrap()),
            401,
            "unauthorized",
            &[],
        );
        let request = control.request(Method::GET, path);
        let answer = request.header(header::ORIGIN, ORIGIN).send().await.unwrap();
        assert!(!has_cors(&answer), "{answer:?}");
    }
}

/// Makes the only sandbox one that needs no token, as a create of the first version did in earlier
/// releases.
async fn open_up(agent: &FakeAgent, control: Control) -> Control {
    let dir = control.stop().await;
    let rows = format!("sqlite://{}/wrenn.db", dir.path().display());
    let mut rows = sqlx::SqliteConnection::connect(&rows).await.unwrap();
    let open = "UPDATE sandboxes SET options = json_set(options, '$.open', json('true'))";
    let open = sqlx::query(open).execute(&mut rows).await.unwrap();
    assert_eq!(open.rows_affected(), 1);
    rows.close().await.unwrap();
    let options = Options {
        dir,
        ..Options::default()
    };
    Control::start_with(agent, options).await
}

#[tokio::test]
async fn second_version_returns_the_token_of_public_sandboxes() {
    for is_open in [false, true] {
        let agent = FakeAgent::start().await;
        let mut control = Control::start(&agent).await;
        let id = control.e2b_id(json!({ "timeout": 60 })).await;
        if is_open {
            control = open_up(&agent, control).await;
        }
        let token = json!(format!("token-of-{id}"));
        let told = (!is_open).then_some(&token);
        let seen = control.get(&format!("/sandboxes/{id}")).await.1;
        assert_eq!(seen.get("envdAccessToken"), told, "{seen}");
        // The traffic listener adds the token of an open sandbox.
        let request = reqwest::Client::new()
            .get(format!("http://{}/envs", control.traffic()))
            .header("E2b-Sandbox-Id", &id)
            .header("E2b-Sandbox-Port", 49983);
        let status = request.send().await.unwrap().status();
        assert_eq!(status.is_success(), is_open);
        let (first, second) = (
            format!("/sandboxes/{id}/connect"),
            format!("/v2/sandboxes/{id}/connect"),
        );
        for (paused, status) in [(false, StatusCode::OK), (true, StatusCode::CREATED)] {
            for (path, told) in [(&first, told), (&second, Some(&token))] {
                if paused {
                    let pause = format!("/sandboxes/{id}/pause");
                    let got = control.post(&pause, Value::Null).await;
                    assert_eq!(got.0, StatusCode::NO_CONTENT, "{}", got.1);
                }
                let (got, body) = control.post(path, json!({ "timeout": 60 })).await;
                assert_eq!(got, status, "{body}");
                assert_eq!(body.get("envdAccessToken"), told, "{path}: {body}");
            }
        }
        let (_, forked) = control
            .post(&format!("/sandboxes/{id}/fork"), json!({}))
            .await;
        let copy = &forked[0]["sandbox"];
        assert_eq!(copy.get("envdAccessToken").is_some(), !is_open, "{forked}");
    }
}
