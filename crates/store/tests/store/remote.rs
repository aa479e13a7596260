//! The object store: what is loaded, and failures.

use std::fs;

use wrenn_store::{ArtifactStore, Cache, RemoteSettings, RemoteStore, StoreError};
use wrenn_test_s3::S3Server;

use crate::support::{CHUNK, artifact, bytes, remote, settings};

#[test]
fn only_touched_chunks_are_loaded_and_each_once_for_all_readers_of_the_host() {
    let server = S3Server::start();
    let content = bytes(20 * CHUNK);
    let stored = artifact("a", &content);
    let (store, cache) = remote(&server);
    store.put(&stored, &content).unwrap();
    assert_eq!(server.reads(), 0);
    let reader = store.open(&stored).unwrap();
    let mut page = [0; 4096];
    for chunk in [3, 7, 3] {
        reader
            .read_at((chunk * CHUNK) as u64 + 8192, &mut page)
            .unwrap();
        assert_eq!(page[..], content[chunk * CHUNK + 8192..][..4096]);
    }
    assert_eq!((server.reads(), server.read_bytes()), (2, 2 * CHUNK as u64));
    // Another process of the host has its own store on the same cache.
    let same = Cache::open(cache.path(), 1 << 30, 0).unwrap();
    let other = RemoteStore::new(&settings(&server), same).unwrap();
    let other = other.open(&stored).unwrap();
    other.read_at(7 * CHUNK as u64, &mut page).unwrap();
    assert_eq!(server.reads(), 2);
    // Many readers of one chunk cause one request.
    std::thread::scope(|scope| {
        for reader in [&reader, &other].into_iter().cycle().take(16) {
            scope.spawn(|| {
                let mut page = [0; 4096];
                reader.read_at(11 * CHUNK as u64, &mut page).unwrap();
                assert_eq!(page[..], content[11 * CHUNK..][..4096]);
            });
        }
    });
    assert_eq!(server.reads(), 3);
}

#[test]
fn chunks_of_zeros_are_neither_stored_nor_loaded() {
    let server = S3Server::start();
    let mut content = vec![0; 100 * CHUNK];
    content[50 * CHUNK] = 1;
    let stored = artifact("a", &content);
    let (store, _cache) = remote(&server);
    store.put(&stored, &content).unwrap();
    let object = server.object("a/prefix/mem/a");
    assert_eq!(fs::metadata(object).unwrap().len(), CHUNK as u64);
    let reader = store.open(&stored).unwrap();
    let mut read = vec![1; 20 * CHUNK];
    reader.read_at(10 * CHUNK as u64, &mut read).unwrap();
    assert!(read.iter().all(|byte| *byte == 0));
    assert_eq!(server.reads(), 0);
}

#[test]
fn failed_requests_are_repeated_and_a_longer_failure_is_an_error() {
    let server = S3Server::start();
    let content = bytes(3 * CHUNK);
    let stored = artifact("a", &content);
    let (store, _cache) = remote(&server);
    server.refuse(2);
    store.put(&stored, &content).unwrap();
    server.refuse(2);
    let mut byte = [0];
    store.open(&stored).unwrap().read_at(0, &mut byte).unwrap();
    assert_eq!((byte[0], server.refusals()), (content[0], 0));
    let impatient = RemoteSettings {
        retry: std::time::Duration::from_secs(1),
        ..settings(&server)
    };
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), 1 << 30, 0).unwrap();
    let store = RemoteStore::new(&impatient, cache).unwrap();
    let reader = store.open(&stored).unwrap();
    server.refuse(u64::MAX);
    let error = reader
        .read_at(CHUNK as u64, &mut byte)
        .unwrap_err()
        .to_string();
    assert!(error.contains("chunk 1 of artifact mem/a"), "{error}");
    assert!(error.contains("503"), "{error}");
    // Nothing was kept of the failure.
    server.refuse(0);
    reader.read_at(CHUNK as u64, &mut byte).unwrap();
    assert_eq!(byte[0], content[CHUNK]);
}

#[test]
fn damaged_object_gives_an_error_and_never_other_content() {
    let server = S3Server::start();
    let content = bytes(3 * CHUNK);
    let stored = artifact("a", &content);
    let (store, _cache) = remote(&server);
    store.put(&stored, &content).unwrap();
    let object = server.object("a/prefix/mem/a");
    let mut damaged = content.clone();
    damaged[CHUNK + 5] ^= 1;
    fs::write(&object, &damaged).unwrap();
    let reader = store.open(&stored).unwrap();
    let mut byte = [0];
    let error = reader
        .read_at(CHUNK as u64, &mut byte)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("chunk 1 of artifact mem/a is damaged"),
        "{error}"
    );
    reader.read_at(0, &mut byte).unwrap();
    // An object that ends too early.
    fs::write(&object, &content[..2 * CHUNK + 100]).unwrap();
    let error = reader
        .read_at(2 * CHUNK as u64, &mut byte)
        .unwrap_err()
        .to_string();
    assert!(error.contains("chunk 2 of artifact mem/a"), "{error}");
    fs::write(&object, &content).unwrap();
    reader.read_at(CHUNK as u64 + 5, &mut byte).unwrap();
    assert_eq!(byte[0], content[CHUNK + 5]);
}

#[test]
fn names_are_small_records() {
    let server = S3Server::start();
    let (store, _cache) = remote(&server);
    assert_eq!(store.name("mine").unwrap(), None);
    store.put_name("mine", b"first".to_vec()).unwrap();
    store.put_name("mine", b"second".to_vec()).unwrap();
    assert_eq!(store.name("mine").unwrap().unwrap(), b"second"[..]);
    assert_eq!(server.objects("a/prefix"), ["a/prefix/names/mine"]);
}

/// A store is used by threads that run asynchronous code, too.
#[tokio::test]
async fn requests_work_within_another_runtime() {
    let server = S3Server::start();
    let (store, _cache) = remote(&server);
    let content = bytes(5);
    let stored = artifact("a", &content);
    store.put(&stored, &content).unwrap();
    let mut read = [0; 5];
    store.open(&stored).unwrap().read_at(0, &mut read).unwrap();
    assert_eq!(read[..], content);
    drop(store);
}

#[test]
fn wrong_credentials_are_reported_without_a_delay() {
    let server = S3Server::start();
    let dir = tempfile::tempdir().unwrap();
    let wrong = RemoteSettings {
        credentials: Some(("test-key".to_owned(), "wrong".to_owned())),
        ..settings(&server)
    };
    let cache = Cache::open(dir.path(), 1 << 30, 0).unwrap();
    let store = RemoteStore::new(&wrong, cache).unwrap();
    let began = std::time::Instant::now();
    let error = store.name("mine").unwrap_err();
    assert!(matches!(error, StoreError::Remote { .. }), "{error}");
    assert!(began.elapsed() < std::time::Duration::from_secs(10));
}
