#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path as UrlPath, RawQuery, WebSocketUpgrade, ws::Message},
    http::{HeaderMap, StatusCode},
    routing::{any, delete, get, post},
};
use futures::TryStreamExt;
use parking_lot::Mutex;
use wrenn_api_types::FilePath;

use super::*;
use crate::config::{self, Layer};

/// Starts a server for one test on its own port. It ends with the test's runtime.
async fn serve(router: Router) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

fn client(address: SocketAddr) -> Client {
    with_url(&format!("http://{address}")).unwrap()
}

fn with_url(url: &str) -> Result<Client, ClientError> {
    let layer = Layer {
        api_url: Some(url.to_owned()),
        api_key: Some("wrn_test".to_owned()),
        ..Layer::default()
    };
    let settings = config::load(layer, Some(Path::new("/dev/null")), |_| None).unwrap();
    Client::new(&settings)
}

fn id() -> SandboxId {
    "sb-1".parse().unwrap()
}

/// Returns the error of `GET /v1/sandboxes` for this response.
async fn list_error(status: StatusCode, body: &'static str) -> ClientError {
    let router = Router::new().route("/v1/sandboxes", get(move || async move { (status, body) }));
    client(serve(router).await)
        .list(&SandboxStatus::ALL)
        .await
        .unwrap_err()
}

#[tokio::test]
async fn unreachable_server_is_reported_with_a_fix() {
    // A port that was free a moment ago.
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let text = client(gone)
        .list(&SandboxStatus::ALL)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        text.contains(&format!("http://{gone}: Connection refused")),
        "{text}"
    );
    assert!(
        text.contains("`wrenn up`") && text.contains("WRENN_API_URL"),
        "{text}"
    );
}

#[tokio::test]
async fn rejection_is_reported_with_the_message_of_the_server() {
    let body = r#"{"error":{"code":"invalid_request","message":"`vcpus` must be 1 to 4"}}"#;
    let error = list_error(StatusCode::BAD_REQUEST, body).await;
    assert_eq!(error.to_string(), "`vcpus` must be 1 to 4");
    assert!(!error.is_not_found());

    let body = r#"{"error":{"code":"not_found","message":"no sandbox sb-1"}}"#;
    assert!(list_error(StatusCode::NOT_FOUND, body).await.is_not_found());
}

#[tokio::test]
async fn wrong_key_is_reported_with_the_variable_to_set() {
    let body = r#"{"error":{"code":"unauthorized","message":"unknown key"}}"#;
    let text = list_error(StatusCode::UNAUTHORIZED, body).await.to_string();
    assert!(
        text.contains("unknown key") && text.contains("WRENN_API_KEY"),
        "{text}"
    );
}

#[tokio::test]
async fn response_of_another_server_is_recognized() {
    let text = list_error(StatusCode::BAD_GATEWAY, "<html>\nnginx")
        .await
        .to_string();
    assert!(
        text.contains("502") && text.contains("<html> nginx"),
        "{text}"
    );
    let text = list_error(StatusCode::OK, "<html>").await.to_string();
    assert!(text.contains("failed to parse"), "{text}");
}

#[test]
fn invalid_urls_are_rejected_at_once() {
    for url in ["", "localhost:8000", "ftp://a", "https://a", "http://"] {
        assert!(
            matches!(with_url(url), Err(ClientError::BadUrl { .. })),
            "{url}"
        );
    }
}

#[test]
fn missing_key_is_reported_with_the_searched_places() {
    let layer = Layer {
        dir: Some("/no/such/dir".into()),
        ..Layer::default()
    };
    let settings = config::load(layer, Some(Path::new("/dev/null")), |_| None).unwrap();
    let text = Client::new(&settings).unwrap_err().to_string();
    assert!(
        text.contains("/no/such/dir/api-key") && text.contains("WRENN_API_KEY"),
        "{text}"
    );
}

#[tokio::test]
async fn key_is_sent_with_every_call_and_names_are_escaped() {
    let router = Router::new().route(
        "/v1/sandboxes/{id}/processes/{process}",
        delete(
            |UrlPath((id, process)): UrlPath<(String, String)>,
             RawQuery(query),
             headers: HeaderMap| async move {
                let good = id == "sb-1"
                    && process == "a/b c"
                    && query.as_deref() == Some("signal=SIGKILL")
                    && headers["X-API-Key"] == "wrn_test";
                if good {
                    StatusCode::NO_CONTENT
                } else {
                    StatusCode::IM_A_TEAPOT
                }
            },
        ),
    );
    client(serve(router).await)
        .kill(&id(), "a/b c", "SIGKILL")
        .await
        .unwrap();
}

#[tokio::test]
async fn an_upload_sends_the_path_before_the_file() {
    let seen = Arc::new(Mutex::new(Bytes::new()));
    let keep = Arc::clone(&seen);
    let router = Router::new().route(
        "/v1/sandboxes/{id}/files/stream/write",
        post(move |body: Bytes| async move {
            *keep.lock() = body;
            StatusCode::NO_CONTENT
        }),
    );
    let sent = Arc::new(Mutex::new(0));
    let count = Arc::clone(&sent);
    let upload = Upload {
        reader: &b"CONTENT"[..],
        len_bytes: Some(7),
        progress: Box::new(move |n| *count.lock() += n),
    };
    let to = FilePath {
        path: "/root/PATH".into(),
        user: Some("USER".into()),
    };
    client(serve(router).await)
        .upload(&id(), &to, upload)
        .await
        .unwrap();
    let body = String::from_utf8(seen.lock().to_vec()).unwrap();
    let at = |word: &str| {
        body.find(word)
            .unwrap_or_else(|| panic!("{word} in {body}"))
    };
    assert!(
        at("/root/PATH") < at("CONTENT") && at("USER") < at("CONTENT"),
        "{body}"
    );
    assert_eq!(*sent.lock(), 7);
}

#[tokio::test]
async fn interrupted_download_is_an_error() {
    let router = Router::new().route(
        "/v1/sandboxes/{id}/files/stream/read",
        post(|| async {
            let chunks = [
                Ok(Bytes::from_static(b"half")),
                Err(std::io::Error::other("gone")),
            ];
            Body::from_stream(futures::stream::iter(chunks))
        }),
    );
    let from = FilePath {
        path: "/x".into(),
        user: None,
    };
    let client = client(serve(router).await);
    // The server may fail before or after the first byte was sent.
    let result: Result<Vec<Bytes>, ClientError> = async {
        let (_, chunks) = client.download(&id(), &from).await?;
        Box::pin(chunks).try_collect().await
    }
    .await;
    assert!(
        matches!(result, Err(ClientError::Broken { .. })),
        "{result:?}"
    );
}

fn exec_server(answers: &'static [&'static str]) -> Router {
    Router::new().route(
        "/v1/sandboxes/{id}/exec/stream",
        any(
            move |upgrade: WebSocketUpgrade, headers: HeaderMap| async move {
                assert_eq!(headers["X-API-Key"], "wrn_test");
                upgrade.on_upgrade(move |mut socket| async move {
                    let start = socket.recv().await.unwrap().unwrap();
                    assert!(start.to_text().unwrap().contains(r#""cmd":"true""#));
                    for answer in answers {
                        socket.send(Message::text(*answer)).await.unwrap();
                    }
                })
            },
        ),
    )
}

async fn open(router: Router) -> Result<Receiver, ClientError> {
    let start = Start {
        cmd: "true".into(),
        ..Start::default()
    };
    let client = client(serve(router).await);
    let socket = client.open(&id(), StreamKind::Exec, &start).await?;
    Ok(socket.receiver)
}

#[tokio::test]
async fn a_stream_is_read_to_its_exit() {
    let mut stream = open(exec_server(&[
        r#"{"type":"start","pid":7}"#,
        r#"{"type":"ping"}"#,
        r#"{"type":"stdout","data":"hi\n"}"#,
        r#"{"type":"exit","exit_code":3}"#,
    ]))
    .await
    .unwrap();
    assert_eq!(
        stream.next().await.unwrap(),
        Some(Event::Started { pid: 7 })
    );
    assert_eq!(
        stream.next().await.unwrap(),
        Some(Event::Stdout(b"hi\n".to_vec()))
    );
    let exit = Event::Exit {
        code: 3,
        error: None,
    };
    assert_eq!(stream.next().await.unwrap(), Some(exit));
}

#[tokio::test]
async fn rejected_stream_is_reported_with_the_message_of_the_server() {
    let body = r#"{"error":{"code":"not_found","message":"no sandbox sb-1"}}"#;
    let router = Router::new().route(
        "/v1/sandboxes/{id}/exec/stream",
        any(move || async move { (StatusCode::NOT_FOUND, body) }),
    );
    let error = open(router).await.err().unwrap();
    assert_eq!(error.to_string(), "no sandbox sb-1");
}
