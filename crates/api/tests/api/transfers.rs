//! Uploads and downloads of files.

use std::sync::atomic::Ordering;

use futures::{StreamExt, stream};
use reqwest::{Method, StatusCode, multipart};
use serde_json::json;

use crate::support::{Control, FakeAgent, answer, assert_failure, until};

/// Name and content of a form part.
type Part<'a> = (&'a str, &'a [u8]);

const BOUNDARY: &str = "xxBOUNDARYxx";

/// Encodes parts as a form.
fn form(parts: &[Part<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, content) in parts {
        let file = if *name == "file" {
            "; filename=\"f\""
        } else {
            ""
        };
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    body
}

fn upload(
    control: &Control,
    id: &str,
    route: &str,
    body: impl Into<reqwest::Body>,
) -> reqwest::RequestBuilder {
    control
        .request(Method::POST, &format!("/v1/sandboxes/{id}/files/{route}"))
        .header(
            "Content-Type",
            format!("multipart/form-data; boundary={BOUNDARY}"),
        )
        .body(body)
}

#[tokio::test]
async fn files_of_all_sizes_round_trip_by_both_routes() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    for (up, down) in [("write", "read"), ("stream/write", "stream/read")] {
        for length in [0, 1, 65_535, 65_536, 65_537, 1_000_000] {
            let content: Vec<u8> = (0..length)
                .map(|n: u32| n.to_le_bytes()[n as usize % 4] ^ 0x5a)
                .collect();
            let target = agent.path("f");
            let body = form(&[("path", target.as_bytes()), ("file", &content)]);
            let (status, body) = answer(upload(&control, &id, up, body)).await;
            assert_eq!(status, StatusCode::NO_CONTENT, "{up} {length}: {body}");
            let path = format!("/v1/sandboxes/{id}/files/{down}");
            let request = control
                .request(Method::POST, &path)
                .json(&json!({ "path": target }));
            let got = request.send().await.unwrap().bytes().await.unwrap();
            assert!(got == content, "{down} {length}");
        }
    }
}

#[tokio::test]
async fn a_form_out_of_order_or_with_parts_missing_stores_nothing() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let (target, directory) = (agent.path("f"), agent.path("d"));
    std::fs::create_dir(&directory).unwrap();
    for route in ["write", "stream/write"] {
        let cases: [(&[Part<'_>], &str); 8] = [
            (
                &[("file", b"content"), ("path", target.as_bytes())],
                "`path`",
            ),
            (&[("file", b"content")], "`path`"),
            (&[("path", target.as_bytes())], "`file`"),
            (&[], "`file`"),
            (&[("path", b""), ("file", b"x")], "`path`"),
            (&[("path", b"\xff"), ("file", b"x")], "`path`"),
            (
                &[
                    ("path", target.as_bytes()),
                    ("color", b"red"),
                    ("file", b"x"),
                ],
                "`color`",
            ),
            (
                &[
                    ("path", target.as_bytes()),
                    ("file", b"x"),
                    ("user", b"joe"),
                ],
                "`user`",
            ),
        ];
        for (parts, field) in cases {
            let got = answer(upload(&control, &id, route, form(parts))).await;
            assert_failure(&got, 400, "invalid_request", &[field]);
        }
        let path = format!("/v1/sandboxes/{id}/files/{route}");
        let request = control
            .request(Method::POST, &path)
            .json(&json!({ "path": "/f" }));
        assert_failure(
            &answer(request).await,
            415,
            "invalid_request",
            &["multipart/form-data"],
        );
        let got = answer(upload(
            &control,
            &id,
            route,
            form(&[("path", directory.as_bytes()), ("file", b"x")]),
        ))
        .await;
        assert_failure(&got, 400, "invalid_request", &["is a directory"]);
    }
    until("the guest has given up all uploads", async || {
        (agent.files() == ["d"]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn interrupted_upload_is_never_complete() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let target = agent.path("f");
    std::fs::write(&target, "before").unwrap();
    let whole = form(&[("path", target.as_bytes()), ("file", &[b'x'; 300_000])]);
    // The form lacks its final boundary.
    for route in ["write", "stream/write"] {
        let cut = whole[..200_000].to_vec();
        let got = answer(upload(&control, &id, route, cut)).await;
        assert_failure(&got, 400, "invalid_request", &[]);
        // The client disconnects after a part of the upload has arrived.
        let cut = whole[..200_000].to_vec();
        let before = agent.state.upload_bytes.load(Ordering::SeqCst);
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        let dies = async move {
            let _ = told.await;
            Err(std::io::Error::other("died"))
        };
        let pieces = stream::iter([Ok(cut)]).chain(stream::once(dies));
        let body = reqwest::Body::wrap_stream(pieces);
        let arrived = async {
            until("a part of the upload has arrived", async || {
                let arrived = agent.state.upload_bytes.load(Ordering::SeqCst);
                (arrived > before + 100_000).then_some(())
            })
            .await;
            tell.send(()).unwrap();
        };
        let (sent, ()) = tokio::join!(upload(&control, &id, route, body).send(), arrived);
        assert!(sent.is_err());
    }
    until("the guest has given up all four uploads", async || {
        (agent.files() == ["f"]).then_some(())
    })
    .await;
    assert_eq!(std::fs::read(&target).unwrap(), b"before");
}

#[tokio::test]
async fn only_buffered_files_have_a_size_limit() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let limit = 100 << 20;
    let big = || {
        let pieces = stream::iter(
            (0..limit / (1 << 20) + 1).map(|_| Ok::<_, std::io::Error>(vec![0_u8; 1 << 20])),
        );
        multipart::Form::new().text("path", agent.path("big")).part(
            "file",
            multipart::Part::stream(reqwest::Body::wrap_stream(pieces)).file_name("f"),
        )
    };
    let path = format!("/v1/sandboxes/{id}/files");
    let request = control
        .request(Method::POST, &format!("{path}/write"))
        .multipart(big());
    assert_failure(&answer(request).await, 413, "too_large", &["the file"]);
    let request = control
        .request(Method::POST, &format!("{path}/stream/write"))
        .multipart(big());
    assert_eq!(answer(request).await.0, StatusCode::NO_CONTENT);
    let length = limit + (1 << 20);
    assert_eq!(std::fs::metadata(agent.path("big")).unwrap().len(), length);
    let zeros = json!({ "path": agent.zeros(length) });
    let got = control.post(&format!("{path}/read"), zeros.clone()).await;
    assert_failure(&got, 413, "too_large", &["files/stream/read"]);
    let request = control
        .request(Method::POST, &format!("{path}/stream/read"))
        .json(&zeros);
    let mut body = request.send().await.unwrap().bytes_stream();
    let mut got = 0;
    while let Some(piece) = body.next().await {
        got += piece.unwrap().len() as u64;
    }
    assert_eq!(got, length);
}

#[tokio::test]
async fn interrupted_download_is_an_error() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let (id, other) = (control.create().await, control.create().await);
    let zeros = json!({ "path": agent.zeros(50_000_000) });
    let path = format!("/v1/sandboxes/{id}/files/stream/read");
    let got = control.post(&path, json!({ "path": "/nonesuch" })).await;
    assert_failure(&got, 404, "not_found", &["/nonesuch"]);
    // The VMs are lost in the middle of the transfers. The calls must notice that before the
    // reconciler does.
    agent.state.list_gate.shut();
    agent.state.lost_after.store(500_000, Ordering::SeqCst);
    let request = control.request(Method::POST, &path).json(&zeros);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        response.bytes().await.is_err(),
        "a truncated file must not look complete"
    );
    // The collecting call can still report the failure.
    let got = control
        .post(&format!("/v1/sandboxes/{other}/files/read"), zeros)
        .await;
    assert_failure(&got, 503, "unavailable", &["the machine is gone"]);
}

#[tokio::test]
async fn slow_peers_apply_back_pressure_without_buffering() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    // Download: a client that does not read.
    let path = format!("/v1/sandboxes/{id}/files/stream/read");
    let length = 64 << 20;
    let request = control
        .request(Method::POST, &path)
        .json(&json!({ "path": agent.zeros(length as u64) }));
    let response = request.send().await.unwrap();
    let given = || agent.state.download_bytes.load(Ordering::SeqCst);
    let stood = until("the download stops", async || {
        let before = given();
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        (before > 0 && before == given()).then_some(before)
    })
    .await;
    assert!(stood < length, "{stood} bytes are buffered");
    drop(response);
    // Upload: a guest that does not write.
    let target = agent.path("f");
    let before = agent.state.upload_bytes.load(Ordering::SeqCst);
    agent.state.upload_gate.shut();
    let body = form(&[("path", target.as_bytes()), ("file", &vec![b'x'; 64 << 20])]);
    let sending = tokio::spawn(upload(&control, &id, "stream/write", body).send());
    until("the upload waits at the gate", async || {
        (agent.state.upload_gate.waiting() == 1).then_some(())
    })
    .await;
    assert_eq!(agent.state.upload_bytes.load(Ordering::SeqCst), before);
    assert!(!sending.is_finished());
    agent.state.upload_gate.open();
    assert_eq!(
        sending.await.unwrap().unwrap().status(),
        StatusCode::NO_CONTENT
    );
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 64 << 20);
}

#[tokio::test]
async fn directories_are_created_listed_and_removed() {
    let agent = FakeAgent::start().await;
    let control = Control::start(&agent).await;
    let id = control.create().await;
    let post = async |route: &str, path: &str| {
        let route = format!("/v1/capsules/{id}/files/{route}");
        let path = agent.path(path);
        control.post(&route, json!({ "path": path })).await
    };
    let (status, made) = post("mkdir", "new/below").await;
    assert_eq!(
        (status, &made["entry"]["path"]),
        (StatusCode::OK, &json!(agent.path("new/below"))),
        "{made}"
    );
    assert_failure(&post("mkdir", "new").await, 409, "conflict", &[]);
    let (_, list) = post("list", "new").await;
    assert_eq!(list["entries"][0]["name"], "below", "{list}");
    assert_eq!(list["entries"][0]["type"], "directory", "{list}");
    for _ in 0..2 {
        assert_eq!(post("remove", "new").await.0, StatusCode::NO_CONTENT);
    }
    assert_failure(&post("list", "new").await, 404, "not_found", &["new"]);
    assert_eq!(post("list", "").await.1, json!({ "entries": [] }));
}
