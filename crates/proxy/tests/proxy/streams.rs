//! Streaming bodies: forwarded piece by piece, complete or not at all, and only for as long as the
//! client wants them.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;

use crate::support::{ID, OTHER, Setup, get, request};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn bodies_stream_in_both_directions() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 49983);
    let mut client = setup.client().await;
    client
        .send(&request(
            "POST /process.Process/StreamInput",
            ID,
            49983,
            "Transfer-Encoding: chunked\r\n",
        ))
        .await;
    let mut guest = port.accept().await;
    let head = guest.head().await.to_ascii_lowercase();
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    for piece in ["one", "two"] {
        client.send(&format!("3\r\n{piece}\r\n")).await;
        guest.until(&format!("{piece}\r\n")).await;
    }
    guest.send(CHUNKED).await;
    client.head().await;
    for piece in ["uno", "dos"] {
        guest.send(&format!("3\r\n{piece}\r\n")).await;
        client.until(&format!("{piece}\r\n")).await;
    }
    client.send("0\r\n\r\n").await;
    guest.until("0\r\n\r\n").await;
    guest.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn trailers_are_forwarded_in_both_directions() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    let rest = "TE: trailers\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n";
    client.send(&request("POST /", ID, 80, rest)).await;
    client.send("1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n").await;
    let mut guest = port.accept().await;
    let head = guest.head().await.to_ascii_lowercase();
    assert!(
        head.contains("te: trailers\r\n") && head.contains("trailer: x-sum\r\n"),
        "{head}"
    );
    let body = guest.head().await.to_ascii_lowercase();
    assert!(body.ends_with("0\r\nx-sum: 1\r\n\r\n"), "{body}");
    guest.send("HTTP/1.1 200 OK\r\nTrailer: X-End\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nb\r\n0\r\nX-End: 2\r\n\r\n").await;
    client.head().await;
    let body = client.head().await.to_ascii_lowercase();
    assert!(body.ends_with("0\r\nx-end: 2\r\n\r\n"), "{body}");
}

#[tokio::test]
async fn disconnected_client_ends_the_request() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    // Before a response, and in the middle of one that is silent.
    for is_answering in [false, true] {
        let mut client = setup.client().await;
        client.send(&get("/", ID, 80)).await;
        let mut guest = port.accept().await;
        guest.head().await;
        if is_answering {
            guest.send(CHUNKED).await;
            client.head().await;
        }
        drop(client);
        assert!(guest.is_ended().await);
        setup.until_unused().await;
    }
    // In the middle of the client's own body.
    let mut client = setup.client().await;
    client
        .send(&request("POST /", ID, 80, "Content-Length: 10\r\n"))
        .await;
    client.send("12345").await;
    let mut guest = port.accept().await;
    guest.until("\r\n\r\n12345").await;
    drop(client);
    assert!(guest.is_ended().await);
    setup.until_unused().await;
}

#[tokio::test]
async fn truncated_response_is_never_complete() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    for head in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345",
        &format!("{CHUNKED}5\r\n12345\r\n"),
    ] {
        let mut client = setup.client().await;
        client.send(&get("/", ID, 80)).await;
        let mut guest = port.accept().await;
        guest.head().await;
        guest.send(head).await;
        drop(guest);
        let answer = client.answer().await;
        assert!(!answer.is_complete && answer.body == "12345", "{answer:?}");
        assert!(client.is_ended().await);
    }
}

#[tokio::test]
async fn response_without_a_body_keeps_its_headers() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&request("HEAD /", ID, 80, "")).await;
    let mut guest = port.accept().await;
    guest.head().await;
    guest.send("HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nX-Mixed-Case: Yes\r\n\r\n").await;
    let head = client.head().await;
    assert!(
        head.contains("Content-Length: 5000\r\n") && head.contains("X-Mixed-Case: Yes\r\n"),
        "{head}"
    );
    assert!(!head.to_ascii_lowercase().contains("keep-alive"), "{head}");
    client.send(&get("/", ID, 80)).await;
    guest.head().await;
    guest
        .send("HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n")
        .await;
    let head = client.head().await;
    assert!(
        head.starts_with("HTTP/1.1 304") && head.contains("\"a\""),
        "{head}"
    );
}

#[tokio::test]
async fn a_client_that_waits_for_100_gets_it() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client
        .send(&request(
            "POST /",
            ID,
            80,
            "Content-Length: 2\r\nExpect: 100-continue\r\n",
        ))
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 100"));
    client.send("hi").await;
    let mut guest = port.accept().await;
    guest.until("\r\n\r\nhi").await;
    guest
        .send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn slow_client_applies_back_pressure() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&get("/", ID, 80)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    let size = 256 * 1024 * 1024;
    guest
        .send(&format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n"
        ))
        .await;
    client.head().await;
    let piece = vec![b'x'; 64 * 1024];
    let mut written = 0;
    // Socket buffers are a few MiB; anything beyond that would be buffered by the proxy.
    while written < size {
        let writing = tokio::time::timeout(Duration::from_millis(500), guest.io.write_all(&piece));
        if writing.await.is_err() {
            break;
        }
        written += piece.len();
    }
    assert!(written < 32 * 1024 * 1024, "{written} bytes were taken");
}

#[tokio::test]
async fn a_sandbox_that_hangs_does_not_delay_another() {
    let setup = Setup::new().await;
    let mut stuck = setup.open(ID, 80);
    setup
        .open(OTHER, 80)
        .serve(|_| "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_owned());
    let mut waiting = Vec::new();
    for _ in 0..64 {
        let mut client = setup.client().await;
        client.send(&get("/", ID, 80)).await;
        waiting.push((client, stuck.accept().await));
    }
    for _ in 0..64 {
        // Reading has a deadline, see `support`.
        assert_eq!(setup.ask(&get("/", OTHER, 80)).await.status(), 200);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// For any split into pieces, the bytes that arrive equal the bytes that were sent, in both
    /// directions.
    #[test]
    fn bodies_are_complete(pieces in prop::collection::vec("[a-z]{1,3000}", 1..20), is_chunked: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let whole = pieces.concat();
        let (there, back) = runtime.block_on(async {
            let setup = Setup::new().await;
            let mut port = setup.open(ID, 80);
            let mut client = setup.client().await;
            let framing = if is_chunked { "Transfer-Encoding: chunked\r\n".to_owned() } else { format!("Content-Length: {}\r\n", whole.len()) };
            let frame = |piece: &String| if is_chunked { format!("{:x}\r\n{piece}\r\n", piece.len()) } else { piece.clone() };
            let end = if is_chunked { "0\r\n\r\n" } else { "" };
            client.send(&request("POST /", ID, 80, &framing)).await;
            for piece in &pieces {
                client.send(&frame(piece)).await;
            }
            client.send(end).await;
            let mut guest = port.accept().await;
            // A request is read like a response: by its length or its chunks.
            let there = guest.answer().await;
            guest.send(&format!("HTTP/1.1 200 OK\r\n{framing}\r\n")).await;
            for piece in &pieces {
                guest.send(&frame(piece)).await;
            }
            guest.send(end).await;
            (there, client.answer().await)
        });
        prop_assert!(there.is_complete && back.is_complete);
        prop_assert_eq!(&there.body, &whole);
        prop_assert_eq!(&back.body, &whole);
    }
}
