//! Files and directories: whole or an error, of any size, in constant memory.

use std::fs;

use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use futures::{Stream, StreamExt as _, stream};
use wrenn_model::limits::FILE_CHUNK_BYTES;

use crate::support::{Guest, peak_memory_kib, stub, until};

/// Content of a test file from a given offset.
fn pattern(start: u64, length: usize) -> Vec<u8> {
    (start..)
        .take(length)
        .map(|n| (n % 251).to_le_bytes()[0])
        .collect()
}

fn pieces(size: u64) -> impl Iterator<Item = Bytes> + Send {
    let chunk = FILE_CHUNK_BYTES as u64;
    (0..size).step_by(FILE_CHUNK_BYTES).map(move |start| {
        let length = usize::try_from(chunk.min(size - start)).unwrap();
        pattern(start, length).into()
    })
}

async fn upload(
    guest: &Guest,
    path: &str,
    content: impl Stream<Item = Bytes> + Send + 'static,
) -> Result<(), ConnectError> {
    guest.client.upload(path, "", content.map(Ok)).await
}

#[tokio::test]
async fn files_of_any_size_are_complete_in_both_directions() {
    let guest = Guest::start().await;
    let chunk = FILE_CHUNK_BYTES as u64;
    for size in [0, 1, chunk - 1, chunk, chunk + 1, 3_000_000] {
        let path = guest.path("file");
        upload(&guest, &path, stream::iter(pieces(size)))
            .await
            .unwrap();
        let expected: Vec<u8> = pieces(size).flatten().collect();
        assert_eq!(fs::read(&path).unwrap(), expected);
        let mut download = guest.client.download(&path, "").await.unwrap();
        let mut content = Vec::new();
        while let Some(piece) = download.next().await.unwrap() {
            assert!(piece.len() <= FILE_CHUNK_BYTES);
            content.extend_from_slice(&piece);
        }
        assert_eq!(content, expected);
    }
}

#[tokio::test]
async fn a_large_file_passes_through_in_constant_memory() {
    const SIZE: u64 = 200_000_000;
    let guest = Guest::start().await;
    let path = guest.path("large");
    let before = peak_memory_kib();
    upload(&guest, &path, stream::iter(pieces(SIZE)))
        .await
        .unwrap();
    let mut download = guest.client.download(&path, "").await.unwrap();
    let mut received = 0;
    while let Some(piece) = download.next().await.unwrap() {
        assert!(
            piece == pattern(received, piece.len()),
            "differs after {received}"
        );
        received += piece.len() as u64;
    }
    assert_eq!(received, SIZE);
    let grown = peak_memory_kib() - before;
    assert!(grown < 32 * 1024, "memory grew by {grown} KiB");
}

#[tokio::test]
async fn an_interrupted_download_is_an_error_and_never_short() {
    let client = stub(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf").await;
    let mut download = client.download("/file", "").await.unwrap();
    assert_eq!(download.next().await.unwrap().unwrap(), "half");
    let error = download.next().await.expect_err("broke off");
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    assert!(std::error::Error::source(&error).is_some(), "{error}");
}

#[tokio::test]
async fn an_abandoned_upload_leaves_the_previous_file() {
    let guest = Guest::start().await;
    let path = guest.path("file");
    fs::write(&path, "previous").unwrap();
    let beginning = stream::iter(pieces(1_000_000)).chain(stream::pending());
    let call = upload(&guest, &path, beginning);
    let files = || fs::read_dir(guest.dir.path()).unwrap().count();
    tokio::select! {
        _ = call => panic!("the upload must not complete"),
        () = until("the guest writes a draft", async || files() == 2) => {}
    }
    until("the draft is gone", async || files() == 1).await;
    assert_eq!(fs::read_to_string(&path).unwrap(), "previous");
}

#[tokio::test]
async fn the_guests_errors_keep_their_codes() {
    let guest = Guest::start().await;
    let client = &guest.client;
    let read = async |path: &str, user: &str| {
        let opened = client.download(path, user).await;
        opened.expect_err(path)
    };
    let error = read("/no/such/file", "").await;
    assert_eq!(error.code, ErrorCode::NotFound, "{error}");
    assert!(error.to_string().contains("/no/such/file"), "{error}");
    assert_eq!(read("/tmp", "").await.code, ErrorCode::InvalidArgument);
    let error = read("/tmp/x", "no-such-user").await;
    assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
    let full =
        b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 25\r\nConnection: close\r\n\r\n\
                 {\"message\":\"disk is full\"}";
    let error = stub(full).await;
    let error = error
        .upload("/f", "", stream::iter(pieces(1)).map(Ok))
        .await;
    let error = error.expect_err("full");
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
}

#[tokio::test]
async fn directories_are_created_listed_and_removed() {
    let guest = Guest::start().await;
    let client = &guest.client;
    let path = guest.path("dir");
    assert_eq!(client.make_dir(&path, "").await.unwrap().path, path);
    let error = client.make_dir(&path, "").await.expect_err("exists");
    assert_eq!(error.code, ErrorCode::AlreadyExists, "{error}");
    let listed = client.list_dir(&guest.path(""), 1, "").await.unwrap();
    assert_eq!(listed[0].name, "dir");
    client.remove(&path, "").await.unwrap();
    assert_eq!(client.list_dir(&guest.path(""), 1, "").await.unwrap(), []);
}
