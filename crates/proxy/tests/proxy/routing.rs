//! Routing, access checks, and the responses that the proxy generates itself.

use std::sync::atomic::Ordering;

use wrenn_proto::Grant;
use wrenn_proxy::{ProxyConfig, Rejected, Target};

use crate::support::{ID, OTHER, Setup, get, request};

const ECHO: fn(&str) -> String = |head| {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}",
        head.len()
    )
};

#[tokio::test]
async fn a_request_reaches_its_port_by_headers_and_by_host_name() {
    let setup = Setup::new().await;
    setup.open(ID, 3000).serve(ECHO);
    setup
        .open(OTHER, 3000)
        .serve(|_| "HTTP/1.1 204 other\r\n\r\n".to_owned());
    let by_headers = setup.ask(&get("/a", ID, 3000)).await;
    assert!(
        by_headers.body.starts_with("GET /a HTTP/1.1\r\n"),
        "{by_headers:?}"
    );
    let by_name = format!("GET /b HTTP/1.1\r\nHost: 3000-{ID}.example.com\r\n\r\n");
    let by_name = setup.ask(&by_name).await;
    assert!(
        by_name.body.starts_with("GET /b HTTP/1.1\r\n"),
        "{by_name:?}"
    );
    assert!(
        by_name
            .body
            .contains(&format!("Host: 3000-{ID}.example.com\r\n"))
    );
    let other = format!("GET / HTTP/1.1\r\nHost: 3000-{OTHER}.localhost:8001\r\n\r\n");
    let mut client = setup.client().await;
    client.send(&other).await;
    assert!(client.head().await.starts_with("HTTP/1.1 204"));
}

#[tokio::test]
async fn paths_and_queries_are_forwarded_unchanged() {
    let setup = Setup::new().await;
    setup.open(ID, 80).serve(ECHO);
    for path in [
        "/",
        "//",
        "/a/",
        "//evil.example/x",
        "/a%2Fb/",
        "/a/../b",
        "/%7Euser?q=%20+&",
        "/?",
        "/a?http://x/",
    ] {
        let answer = setup.ask(&get(path, ID, 80)).await;
        assert!(
            answer.body.starts_with(&format!("GET {path} HTTP/1.1\r\n")),
            "{path}: {answer:?}"
        );
    }
    let answer = setup.ask(&request("OPTIONS *", ID, 80, "")).await;
    assert!(
        answer.body.starts_with("OPTIONS * HTTP/1.1\r\n"),
        "{answer:?}"
    );
    let absolute = format!("GET http://80-{ID}.example.com/x HTTP/1.1\r\nHost: nothing\r\n\r\n");
    let answer = setup.ask(&absolute).await;
    assert!(answer.body.starts_with("GET /x HTTP/1.1\r\n"), "{answer:?}");
    assert!(
        answer.body.contains(&format!("80-{ID}.example.com\r\n")),
        "{answer:?}"
    );
}

#[tokio::test]
async fn missing_sandbox_or_port_has_the_response_of_the_contract() {
    let setup = Setup::new().await;
    let closed = setup.ask(&get("/", ID, 81)).await;
    assert_eq!(closed.status(), 502);
    let text = format!(
        r#"{{"sandboxId":"{ID}","message":"The sandbox is running but port is not open","code":502,"port":81}}"#
    );
    assert_eq!(closed.body, text);
    for unknown in ["i00000000000000000000", "nonexistingsandbox"] {
        let gone = setup.ask(&get("/health", unknown, 49983)).await;
        assert_eq!(gone.status(), 502);
        let text = format!(
            r#"{{"sandboxId":"{unknown}","message":"The sandbox was not found","code":502}}"#
        );
        assert_eq!(gone.body, text);
    }
    for (refused, status) in [
        (Rejected::Changing, 409),
        (Rejected::ResumeDenied("full".to_owned()), 403),
        (Rejected::Unavailable("no agent".to_owned()), 502),
    ] {
        setup.change(ID, |sandbox| sandbox.refused = Some(refused));
        assert_eq!(setup.ask(&get("/", ID, 80)).await.status(), status);
    }
    let browser = request(
        "GET /",
        "i00000000000000000000",
        80,
        "User-Agent: Mozilla/5.0\r\n",
    );
    let page = setup.ask(&browser).await;
    assert!(
        page.status() == 502 && page.body.contains("<h1>The sandbox was not found</h1>"),
        "{page:?}"
    );
}

#[tokio::test]
async fn unaddressed_request_is_rejected_as_text() {
    let setup = Setup::with(ProxyConfig {
        shared_names: vec!["box".to_owned()],
        ..ProxyConfig::default()
    })
    .await;
    setup.open(ID, 80).serve(ECHO);
    for headers in [
        "Host: localhost\r\n".to_owned(),
        format!("Host: localhost\r\nE2b-Sandbox-Id: {ID}\r\n"),
        "Host: localhost\r\nE2b-Sandbox-Port: 80\r\n".to_owned(),
        format!("Host: localhost\r\nE2b-Sandbox-Id: {ID}\r\nE2b-Sandbox-Port: 99999\r\n"),
        "Host: localhost\r\nE2b-Sandbox-Id: ../x\r\nE2b-Sandbox-Port: 80\r\n".to_owned(),
        format!("Host: example.com\r\nE2b-Sandbox-Id: {ID}\r\nE2b-Sandbox-Port: 80\r\n"),
        String::new(),
    ] {
        let answer = setup.ask(&format!("GET / HTTP/1.1\r\n{headers}\r\n")).await;
        assert_eq!(answer.status(), 400, "{headers}");
        assert!(
            answer.head.contains("text/plain") && !answer.body.is_empty(),
            "{answer:?}"
        );
    }
    let tunnel = format!("CONNECT 80-{ID}.x:80 HTTP/1.1\r\nHost: 80-{ID}.x:80\r\n\r\n");
    assert_eq!(setup.ask(&tunnel).await.status(), 400);
    let shared = get("/", ID, 80).replace("localhost", "box:8001");
    assert_eq!(setup.ask(&shared).await.status(), 200);
}

#[tokio::test]
async fn host_calls_do_not_reach_the_guest_agent() {
    let setup = Setup::new().await;
    let mut envd = setup.open(ID, 49983);
    setup.open(ID, 80).serve(ECHO);
    for path in [
        "/init",
        "/%69nit",
        "//init/",
        "/x/../init",
        "/snapshot/prepare",
        "/freeze",
        "/upgrade",
        "/%2569nit",
    ] {
        let answer = setup
            .ask(&request(&format!("POST {path}"), ID, 49983, ""))
            .await;
        assert_eq!(answer.status(), 404, "{path}");
        assert!(envd.is_quiet(), "{path}");
        // A server of the user may have such a path.
        assert_eq!(setup.ask(&get(path, ID, 80)).await.status(), 200);
    }
}

#[tokio::test]
async fn private_sandbox_requires_its_traffic_token() {
    let setup = Setup::new().await;
    setup.open(ID, 80).serve(ECHO);
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| {
        sandbox.target.traffic_token = Some("secret".to_owned())
    });
    assert_eq!(setup.ask(&get("/", ID, 80)).await.status(), 403);
    let with = |token: &str| {
        request(
            "GET /",
            ID,
            80,
            &format!("E2B-Traffic-Access-Token: {token}\r\n"),
        )
    };
    assert_eq!(setup.ask(&with("secreT")).await.status(), 403);
    let answer = setup.ask(&with("secret")).await;
    assert!(
        answer.status() == 200 && !answer.body.contains("secret"),
        "{answer:?}"
    );
    assert_eq!(setup.ask(&get("/", ID, 49983)).await.status(), 200);
}

#[tokio::test]
async fn request_without_access_resumes_no_sandbox() {
    let setup = Setup::new().await;
    setup.open(ID, 80).serve(ECHO);
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| {
        sandbox.token = "its token".to_owned();
        sandbox.target.traffic_token = Some("secret".to_owned());
        sandbox.paused = true;
    });
    let resolved = || setup.world.resolved.load(Ordering::SeqCst);
    let with = |line: &str, port, headers: &str| request(line, ID, port, headers);
    let bad = sign("another", None);
    let old = sign("its token", Some(1_000_000_000));
    for (request, status, text) in [
        (with("GET /", 80, ""), 403, "is missing"),
        (
            with("GET /", 80, "E2B-Traffic-Access-Token: x\r\n"),
            403,
            "invalid",
        ),
        (
            with("POST /process.Process/List", 49983, ""),
            401,
            "X-Access-Token",
        ),
        (
            with("POST /process.Process/List", 49983, "X-Access-Token: x\r\n"),
            401,
            "X-Access-Token",
        ),
        (with("GET /files?path=/a", 49983, ""), 401, "X-Access-Token"),
        (with(&format!("GET {bad}"), 49983, ""), 401, "signature"),
        (with(&format!("GET {old}"), 49983, ""), 401, "expired"),
        (with("GET /health", 49983, ""), 502, "was not found"),
        (
            with("GET /health", 49983, "X-Access-Token: x\r\n"),
            502,
            "was not found",
        ),
        (with("OPTIONS /files", 49983, ""), 401, "X-Access-Token"),
    ] {
        let answer = setup.ask(&request).await;
        assert_eq!(answer.status(), status, "{request}");
        assert!(answer.body.contains(text), "{answer:?}");
        assert_eq!(resolved(), 0, "{request}");
    }
    let good = sign("its token", None);
    for request in [
        with("GET /", 80, "E2B-Traffic-Access-Token: secret\r\n"),
        with(
            "POST /process.Process/List",
            49983,
            "X-Access-Token: its token\r\n",
        ),
        with(&format!("GET {good}"), 49983, ""),
        with("GET /health", 49983, "X-Access-Token: its token\r\n"),
    ] {
        setup.change(ID, |sandbox| sandbox.paused = true);
        let before = resolved();
        assert_eq!(setup.ask(&request).await.status(), 200, "{request}");
        assert_eq!(resolved(), before + 1, "{request}");
    }
    // A running sandbox is asked, and need not be resolved.
    let before = resolved();
    let asked = with("POST /process.Process/List", 49983, "X-Access-Token: x\r\n");
    assert_eq!(setup.ask(&asked).await.status(), 200);
    assert_eq!(resolved(), before);
}

/// Returns path and query of a link to `/a` that a token signed.
fn sign(token: &str, expires: Option<i64>) -> String {
    let grant = Grant {
        path: "/a",
        operation: "read",
        user: "",
        expires,
    };
    let signature = grant.sign(token).replace('+', "%2B").replace('/', "%2F");
    let expires = expires.map_or_else(String::new, |at| format!("&signature_expiration={at}"));
    format!("/files?path=/a&signature={signature}{expires}")
}

#[tokio::test]
async fn signed_link_is_routed_to_its_sandbox() {
    let setup = Setup::new().await;
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| sandbox.token = "its token".to_owned());
    setup.change(OTHER, |sandbox| sandbox.token = "another".to_owned());
    let grant = Grant {
        path: "/home/user/a b",
        operation: "read",
        user: "root",
        expires: Some(4_102_444_800),
    };
    let signature = grant
        .sign("its token")
        .replace('+', "%2B")
        .replace('/', "%2F");
    let path = format!(
        "/files?path=%2Fhome%2Fuser%2Fa+b&username=root&signature={signature}&signature_expiration=4102444800"
    );
    let link = |method: &str, path: &str| {
        format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:8001\r\n\r\n")
    };
    let answer = setup.ask(&link("GET", &path)).await;
    assert!(
        answer.body.starts_with(&format!("GET {path} ")),
        "{answer:?}"
    );
    assert_eq!(setup.ask(&link("POST", &path)).await.status(), 400);
    assert_eq!(
        setup
            .ask(&link("GET", &path.replace("a+b", "b")))
            .await
            .status(),
        400
    );
}

#[tokio::test]
async fn unaddressed_request_is_routed_by_its_token() {
    let setup = Setup::new().await;
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| sandbox.token = "its token".to_owned());
    let ask = async |line: &str, headers: &str| {
        let request = format!("{line} HTTP/1.1\r\nHost: 127.0.0.1:8001\r\n{headers}\r\n");
        setup.ask(&request).await
    };
    let token = "X-Access-Token: its token\r\n";
    let answer = ask("POST /process.Process/List", token).await;
    assert!(
        answer.body.starts_with("POST /process.Process/List "),
        "{answer:?}"
    );
    assert_eq!(ask("POST /init", token).await.status(), 404);
    // A sandbox that has ended, or a token that never was: what clients take for a dead sandbox.
    let gone = ask("GET /health", "X-Access-Token: another\r\n").await;
    assert_eq!(gone.status(), 502);
    assert_eq!(
        gone.body,
        r#"{"message":"The sandbox was not found","code":502}"#
    );
    let half = format!("{token}E2b-Sandbox-Id: {ID}\r\n");
    assert_eq!(ask("GET /health", &half).await.status(), 400);
    let none = ask("GET /health", "").await;
    assert!(
        none.status() == 400 && none.body.contains("x-access-token"),
        "{none:?}"
    );
}

#[tokio::test]
async fn link_beyond_the_search_budget_is_answered_429() {
    let setup = Setup::new().await;
    setup.world.is_overloaded.store(true, Ordering::SeqCst);
    let link = format!(
        "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        sign("x", None)
    );
    let answer = setup.ask(&link).await;
    assert_eq!(answer.status(), 429);
    assert!(answer.body.contains("sandbox_id"), "{answer:?}");
}

#[tokio::test]
async fn expired_link_is_rejected() {
    let setup = Setup::new().await;
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| sandbox.token = "its token".to_owned());
    let ask = async |token: &str, headers: &str| {
        let grant = Grant {
            path: "/a",
            operation: "read",
            user: "",
            expires: Some(1_000_000_000),
        };
        let signature = grant.sign(token).replace('+', "%2B").replace('/', "%2F");
        let path = format!("/files?path=/a&signature={signature}&signature_expiration=1000000000");
        setup
            .ask(&format!(
                "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"
            ))
            .await
    };
    let addressed = format!("E2b-Sandbox-Id: {ID}\r\nE2b-Sandbox-Port: 49983\r\n");
    for headers in ["", &addressed] {
        let answer = ask("its token", headers).await;
        assert_eq!(answer.status(), 401);
        assert_eq!(
            answer.body,
            r#"{"message":"signature is already expired","code":401}"#
        );
    }
    // The guest agent checks the signature first, so the proxy forwards a wrong one. With a token
    // no signature is needed.
    assert_eq!(ask("another", &addressed).await.status(), 200);
    let with_token = format!("{addressed}X-Access-Token: its token\r\n");
    assert_eq!(ask("its token", &with_token).await.status(), 200);
}

#[tokio::test]
async fn token_and_masked_host_are_injected() {
    let setup = Setup::new().await;
    setup.open(ID, 49983).serve(ECHO);
    setup.open(ID, 80).serve(ECHO);
    setup.change(ID, |sandbox| {
        sandbox.target = Target {
            guest_token: Some("t0ken".to_owned()),
            is_open: true,
            mask_host: Some("localhost:${PORT}".to_owned()),
            ..Target::default()
        };
    });
    let envd = setup
        .ask(&get("/health", ID, 49983))
        .await
        .body
        .to_ascii_lowercase();
    assert!(
        envd.contains("x-access-token: t0ken\r\n") && envd.contains("host: localhost\r\n"),
        "{envd}"
    );
    let server = setup.ask(&get("/", ID, 80)).await.body.to_ascii_lowercase();
    assert!(
        !server.contains("x-access-token") && server.contains("host: localhost:80\r\n"),
        "{server}"
    );
    assert!(
        server.contains("x-forwarded-host: localhost\r\n")
            && server.contains("x-forwarded-for: 127.0.0.1\r\n")
    );
}

#[tokio::test]
async fn head_that_is_too_long_is_rejected() {
    let setup = Setup::new().await;
    let long = format!("X-Long: {}\r\n", "x".repeat(200 * 1024));
    let mut client = setup.client().await;
    client.send(&request("GET /", ID, 80, &long)).await;
    let head = client.try_head().await;
    assert!(head.is_none_or(|head| head.starts_with("HTTP/1.1 431")));
}
