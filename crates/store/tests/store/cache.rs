//! The cache on the host's disk.

use std::{fs, path::Path};

use tempfile::TempDir;
use wrenn_store::{Artifact, ArtifactStore, Cache, RemoteStore};
use wrenn_test_s3::S3Server;

use crate::support::{CHUNK, artifact, bytes, settings};

/// Stores an artifact, and returns a store with a cache of a number of chunks.
fn stored(server: &S3Server, chunks: usize, limit: usize) -> (RemoteStore, Artifact, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), (limit * CHUNK) as u64, 0).unwrap();
    let store = RemoteStore::new(&settings(server), cache).unwrap();
    let content = bytes(chunks * CHUNK);
    let artifact = artifact("a", &content);
    store.put(&artifact, &content).unwrap();
    (store, artifact, dir)
}

/// Returns the files of all chunks with their sizes.
fn chunks(dir: &Path) -> Vec<(String, u64)> {
    let Ok(entries) = fs::read_dir(dir.join("chunks/mem/a")) else {
        return Vec::new();
    };
    let file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, entry.metadata().unwrap().len())
    };
    let mut files: Vec<_> = entries.flatten().map(file).collect();
    files.sort();
    files
}

#[test]
fn size_is_limited_and_chunks_in_use_stay_longest() {
    let server = S3Server::start();
    let (store, artifact, dir) = stored(&server, 40, 8);
    let mut byte = [0];
    for chunk in 0..40_u64 {
        // Opened again by another reader: the first chunk stays.
        let first = store.open(&artifact).unwrap();
        first.read_at(0, &mut byte).unwrap();
        let reader = store.open(&artifact).unwrap();
        reader.read_at(chunk * CHUNK as u64, &mut byte).unwrap();
        assert!(chunks(dir.path()).len() <= 8);
    }
    let left = chunks(dir.path());
    assert!(left.iter().any(|(name, _)| name == "0"), "{left:?}");
    assert!(left.iter().any(|(name, _)| name == "39"), "{left:?}");
    let counted = Cache::open(dir.path(), 1, 0)
        .unwrap()
        .usage_bytes()
        .unwrap();
    assert_eq!(counted, left.iter().map(|(_, len)| len).sum::<u64>());
}

#[test]
fn reader_of_a_removed_chunk_goes_on() {
    let server = S3Server::start();
    let (store, artifact, dir) = stored(&server, 3, 100);
    let reader = store.open(&artifact).unwrap();
    let mut before = [0; 10];
    reader.read_at(100, &mut before).unwrap();
    fs::remove_dir_all(dir.path().join("chunks")).unwrap();
    let mut after = [0; 10];
    reader.read_at(100, &mut after).unwrap();
    assert_eq!(before, after);
    // And others load it again.
    let reads = server.reads();
    let other = store.open(&artifact).unwrap();
    other.read_at(100, &mut after).unwrap();
    assert_eq!((before, server.reads()), (after, reads + 1));
}

#[test]
fn damaged_file_of_the_cache_is_loaded_again() {
    let server = S3Server::start();
    let (store, artifact, dir) = stored(&server, 2, 100);
    let mut byte = [0];
    store
        .open(&artifact)
        .unwrap()
        .read_at(5, &mut byte)
        .unwrap();
    let expected = byte;
    let file = dir.path().join("chunks/mem/a/0");
    for damage in [vec![9; CHUNK], vec![], bytes(CHUNK + 1)] {
        fs::write(&file, damage).unwrap();
        let reads = server.reads();
        store
            .open(&artifact)
            .unwrap()
            .read_at(5, &mut byte)
            .unwrap();
        assert_eq!((byte, server.reads()), (expected, reads + 1));
        assert_eq!(fs::metadata(&file).unwrap().len(), CHUNK as u64);
    }
}

#[test]
fn cache_that_cannot_be_written_to_costs_only_time() {
    let server = S3Server::start();
    let (store, artifact, dir) = stored(&server, 2, 100);
    // A file in the place of a directory.
    fs::create_dir_all(dir.path().join("chunks/mem")).unwrap();
    fs::write(dir.path().join("chunks/mem/a"), "").unwrap();
    let content = bytes(2 * CHUNK);
    let reader = store.open(&artifact).unwrap();
    for at in [0, CHUNK, 5] {
        let mut byte = [0];
        reader.read_at(at as u64, &mut byte).unwrap();
        assert_eq!(byte[0], content[at]);
    }
    assert_eq!(server.reads(), 2);
}

#[test]
fn nothing_is_added_while_the_disk_has_less_than_the_room_to_keep() {
    let server = S3Server::start();
    let (store, artifact, dir) = stored(&server, 2, 100);
    drop(store);
    let cache = Cache::open(dir.path(), u64::MAX, u64::MAX).unwrap();
    let store = RemoteStore::new(&settings(&server), cache).unwrap();
    let reader = store.open(&artifact).unwrap();
    let mut byte = [0];
    reader.read_at(0, &mut byte).unwrap();
    assert_eq!(byte[0], bytes(1)[0]);
    assert!(chunks(dir.path()).is_empty());
}
