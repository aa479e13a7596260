//! Files of all sizes, uploaded and downloaded, whole and streamed.

use anyhow::{Result, ensure};
use futures::StreamExt as _;
use reqwest::{Method, StatusCode, multipart};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use wrenn_e2e::{Sandbox, Service, host::resident_kb};

const MIB: usize = 1024 * 1024;

/// Returns bytes that do not repeat within the size of any buffer.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

async fn upload_stream(
    service: &Service,
    sandbox: &Sandbox<'_>,
    path: &str,
    bytes: Vec<u8>,
) -> Result<()> {
    let chunks: Vec<_> = bytes.chunks(100_000).map(<[u8]>::to_vec).collect();
    let body = reqwest::Body::wrap_stream(futures::stream::iter(
        chunks.into_iter().map(Ok::<_, std::io::Error>),
    ));
    let form = multipart::Form::new()
        .text("path", path.to_owned())
        .part("file", multipart::Part::stream(body).file_name("f"));
    let request = service.request(Method::POST, &sandbox.path("/files/stream/write"));
    let response = request.multipart(form).send().await?;
    let status = response.status();
    ensure!(
        status == StatusCode::NO_CONTENT,
        "{status}: {}",
        response.text().await?
    );
    Ok(())
}

async fn download_hash(
    service: &Service,
    sandbox: &Sandbox<'_>,
    path: &str,
) -> Result<(usize, String)> {
    let request = service.request(Method::POST, &sandbox.path("/files/stream/read"));
    let response = request
        .json(&json!({ "path": path }))
        .send()
        .await?
        .error_for_status()?;
    let (mut hash, mut len) = (Sha256::new(), 0);
    let mut body = response.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk?;
        len += chunk.len();
        hash.update(&chunk);
    }
    Ok((len, hex::encode(hash.finalize())))
}

#[tokio::test]
async fn files_of_any_size_round_trip() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    for len in [0, 1, 65_535, 65_536, 65_537, 3 * MIB + 17] {
        let bytes = pattern(len);
        sandbox.write("/home/user/a", bytes.clone()).await?;
        assert_eq!(sandbox.read("/home/user/a").await?, bytes, "{len} whole");
        upload_stream(&service, &sandbox, "/home/user/b", bytes.clone()).await?;
        let expected = (len, hex::encode(Sha256::digest(&bytes)));
        assert_eq!(
            download_hash(&service, &sandbox, "/home/user/b").await?,
            expected,
            "{len} streamed"
        );
    }
    sandbox.destroy().await
}

#[tokio::test]
async fn two_hundred_megabytes_stream_through_with_constant_memory() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let bytes = pattern(200 * MIB);
    let expected = hex::encode(Sha256::digest(&bytes));
    sandbox.write("/home/user/warm", pattern(MIB)).await?;
    let before = resident_kb(service.pid())?;
    upload_stream(&service, &sandbox, "/home/user/big", bytes).await?;
    let sum = sandbox.exec("sha256sum", &["/home/user/big"]).await?;
    assert!(sum.stdout.starts_with(&expected), "{sum:?}");
    assert_eq!(
        download_hash(&service, &sandbox, "/home/user/big").await?,
        (200 * MIB, expected)
    );
    let after = resident_kb(service.pid())?;
    assert!(
        after < before + 32 * 1024,
        "the service grew from {before} to {after} kB"
    );
    let envd = sandbox
        .shell("awk '/VmHWM/{print $2}' /proc/$(pgrep -xo envd)/status")
        .await?;
    let peak: u64 = envd.stdout.trim().parse()?;
    assert!(peak < 24 * 1024, "envd's peak is {peak} kB");
    sandbox.destroy().await
}

#[tokio::test]
async fn interrupted_upload_keeps_the_old_file() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    sandbox.write("/home/user/f", b"before".to_vec()).await?;
    let pieces = futures::stream::iter([
        Ok(pattern(3 * MIB)),
        Err(std::io::Error::other("the client dies")),
    ]);
    let part = multipart::Part::stream(reqwest::Body::wrap_stream(pieces)).file_name("f");
    let form = multipart::Form::new()
        .text("path", "/home/user/f")
        .part("file", part);
    let request = service.request(Method::POST, &sandbox.path("/files/stream/write"));
    ensure!(request.multipart(form).send().await.is_err());
    // The guest removes the partial upload after it detects the disconnect.
    let tidy = "until [ \"$(ls -A /home/user | grep -c envd-draft)\" = 0 ]; do sleep 0.1; done";
    assert_eq!(sandbox.shell(tidy).await?.code, 0);
    assert_eq!(sandbox.read("/home/user/f").await?, b"before");
    sandbox.destroy().await
}

#[tokio::test]
async fn only_regular_files_are_read() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    sandbox.shell("mkfifo /tmp/pipe; mkdir /tmp/dir").await?;
    for path in ["/dev/zero", "/tmp/pipe", "/tmp/dir"] {
        for route in ["/files/read", "/files/stream/read"] {
            let (status, body) = service
                .json(Method::POST, &sandbox.path(route), &json!({ "path": path }))
                .await?;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{route} {path}: {body}");
        }
    }
    let (status, body) = service
        .json(
            Method::POST,
            &sandbox.path("/files/read"),
            &json!({ "path": "/no/such" }),
        )
        .await?;
    assert_eq!(
        (status, body["error"]["code"].as_str()),
        (StatusCode::NOT_FOUND, Some("not_found"))
    );
    sandbox.destroy().await
}

#[tokio::test]
async fn directories_are_created_listed_and_removed() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    let call = async |route: &str, body: serde_json::Value| {
        service
            .json(Method::POST, &sandbox.path(route), &body)
            .await
    };
    let (status, made) = call("/files/mkdir", json!({ "path": "/home/user/d/e" })).await?;
    assert!(status.is_success(), "{made}");
    assert_eq!(made["entry"]["type"], "directory");
    let (status, again) = call("/files/mkdir", json!({ "path": "/home/user/d/e" })).await?;
    assert_eq!(
        (status, again["error"]["code"].as_str()),
        (StatusCode::CONFLICT, Some("conflict"))
    );
    sandbox.write("/home/user/d/e/f", "hello").await?;
    let (_, list) = call("/files/list", json!({ "path": "/home/user/d", "depth": 2 })).await?;
    let found: Vec<_> = list["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["path"].as_str().unwrap(), e["size"].as_i64().unwrap()))
        .collect();
    assert_eq!(found.last(), Some(&("/home/user/d/e/f", 5)), "{list}");
    let (status, _) = call("/files/remove", json!({ "path": "/home/user/d" })).await?;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, _) = call("/files/list", json!({ "path": "/home/user/d" })).await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    sandbox.destroy().await
}

#[tokio::test]
async fn upload_with_the_path_after_the_file_is_rejected() -> Result<()> {
    let service = Service::start().await?;
    let sandbox = service.create().await?;
    for route in ["/files/write", "/files/stream/write"] {
        let form = multipart::Form::new()
            .part("file", multipart::Part::bytes(&b"x"[..]).file_name("f"))
            .text("path", "/home/user/x");
        let request = service.request(Method::POST, &sandbox.path(route));
        let status = request.multipart(form).send().await?.status();
        assert_eq!(status, StatusCode::BAD_REQUEST, "{route}");
    }
    sandbox.destroy().await
}
