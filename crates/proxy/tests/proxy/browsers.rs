//! Pages that use sandboxes from a browser: the preflights before their requests, and the responses
//! that their scripts may read.

use std::sync::atomic::Ordering;

use wrenn_proto::Grant;

use crate::support::{Answer, ID, Setup, get, request};

const ECHO: fn(&str) -> String = |head| {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}",
        head.len()
    )
};

/// Headers that a browser sends before a page's call of the guest agent.
const PREFLIGHT: &str = "Origin: https://page.example\r\nUser-Agent: Mozilla/5.0\r\n\
     Access-Control-Request-Method: POST\r\n\
     Access-Control-Request-Headers: authorization,content-type,e2b-sandbox-id,e2b-sandbox-port\r\n";

fn has(answer: &Answer, line: &str) -> bool {
    answer
        .head
        .lines()
        .any(|got| got.eq_ignore_ascii_case(line))
}

async fn head(setup: &Setup, request: &str) -> Answer {
    let mut client = setup.client().await;
    client.send(request).await;
    Answer {
        head: client.head().await,
        body: String::new(),
        is_complete: true,
    }
}

#[tokio::test]
async fn unaddressed_preflight_is_answered_by_the_proxy() {
    let setup = Setup::new().await;
    let mut envd = setup.open(ID, 49983);
    for host in ["localhost:8001", "127.0.0.1:8001", "sandbox.example.com"] {
        let asked =
            format!("OPTIONS /process.Process/Start HTTP/1.1\r\nHost: {host}\r\n{PREFLIGHT}\r\n");
        let answer = head(&setup, &asked).await;
        assert_eq!(answer.status(), 204, "{answer:?}");
        for line in [
            "access-control-allow-origin: *",
            "access-control-allow-methods: POST",
            "access-control-allow-headers: authorization,content-type,e2b-sandbox-id,e2b-sandbox-port",
            "access-control-max-age: 7200",
        ] {
            assert!(has(&answer, line), "{line}: {answer:?}");
        }
    }
    assert!(envd.is_quiet());
    // A preflight that names no headers gets no `allow-headers`.
    let plain =
        "OPTIONS / HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: DELETE\r\n\r\n";
    let answer = head(&setup, plain).await;
    assert!(has(&answer, "access-control-allow-methods: DELETE"));
    assert!(!answer.head.contains("allow-headers"), "{answer:?}");
}

#[tokio::test]
async fn preflight_of_a_paused_sandboxs_agent_is_answered_without_it() {
    let setup = Setup::new().await;
    setup.open(ID, 49983).serve(ECHO);
    setup.change(ID, |sandbox| sandbox.paused = true);
    let asked = request("OPTIONS /files", ID, 49983, PREFLIGHT);
    let answer = head(&setup, &asked).await;
    assert_eq!(answer.status(), 204, "{answer:?}");
    assert!(has(&answer, "access-control-allow-origin: *"), "{answer:?}");
    assert_eq!(setup.world.resolved.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn addressed_preflight_is_forwarded() {
    let setup = Setup::new().await;
    setup.open(ID, 80).serve(ECHO);
    let by_name = format!("OPTIONS /a HTTP/1.1\r\nHost: 80-{ID}.example.com\r\n{PREFLIGHT}\r\n");
    let by_headers = request("OPTIONS /a", ID, 80, PREFLIGHT);
    for asked in [by_name, by_headers] {
        let answer = setup.ask(&asked).await;
        assert_eq!(answer.status(), 200, "{answer:?}");
        assert!(answer.body.starts_with("OPTIONS /a HTTP/1.1\r\n"));
        assert!(!answer.head.contains("access-control"), "{answer:?}");
    }
    // An `OPTIONS` request that is not a preflight has no target.
    let answer = setup
        .ask("OPTIONS / HTTP/1.1\r\nHost: localhost\r\nOrigin: https://page.example\r\n\r\n")
        .await;
    assert_eq!(answer.status(), 400);
}

#[tokio::test]
async fn error_responses_are_readable_across_origins() {
    let setup = Setup::new().await;
    for (asked, status) in [
        ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(), 400),
        (get("/", ID, 81), 502),
        (get("/health", "i00000000000000000000", 49983), 502),
        (get("/init", ID, 49983), 404),
    ] {
        let answer = setup.ask(&asked).await;
        assert_eq!(answer.status(), status, "{answer:?}");
        assert!(has(&answer, "access-control-allow-origin: *"), "{answer:?}");
    }
    // A sandbox's response is not changed.
    setup.open(ID, 80).serve(ECHO);
    let answer = setup.ask(&get("/", ID, 80)).await;
    assert!(!answer.head.contains("access-control"), "{answer:?}");
}

#[tokio::test]
async fn expired_link_is_rejected_as_json_in_browsers() {
    let setup = Setup::new().await;
    setup.change(ID, |sandbox| sandbox.token = "its token".to_owned());
    let grant = Grant {
        path: "/a",
        operation: "read",
        user: "",
        expires: Some(1_000_000_000),
    };
    let signature = grant
        .sign("its token")
        .replace('+', "%2B")
        .replace('/', "%2F");
    for host in ["localhost".to_owned(), format!("49983-{ID}.example.com")] {
        let answer = setup
            .ask(&format!(
                "GET /files?path=/a&signature={signature}&signature_expiration=1000000000 HTTP/1.1\r\nHost: {host}\r\n\
                 User-Agent: Mozilla/5.0\r\nAccept: text/html,*/*;q=0.8\r\nSec-Fetch-Mode: navigate\r\n\r\n"
            ))
            .await;
        assert_eq!(answer.status(), 401);
        assert!(has(&answer, "content-type: application/json"));
        assert_eq!(
            answer.body,
            r#"{"message":"signature is already expired","code":401}"#
        );
    }
}
