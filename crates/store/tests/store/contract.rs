//! Behavior that all stores have in common.

use wrenn_store::{ArtifactStore, Content, Kind, LocalStore, StoreError};
use wrenn_test_s3::S3Server;

use crate::support::{CHUNK, artifact, bytes, remote};

fn keeps_the_contract(store: &dyn ArtifactStore) {
    // Empty, less than a chunk, whole chunks, with a chunk of zeros, several parts of an upload.
    let mut holes = bytes(4 * CHUNK + 9);
    holes[CHUNK..3 * CHUNK].fill(0);
    let contents = [
        Vec::new(),
        bytes(5),
        bytes(2 * CHUNK),
        holes,
        vec![0; 3 * CHUNK],
        bytes(150 * CHUNK + 1),
    ];
    for (number, content) in contents.iter().enumerate() {
        let stored = artifact(&format!("a{number}"), content);
        assert!(!store.contains(&stored.id).unwrap());
        store.put(&stored, content).unwrap();
        // Again, as after a crash of the writer.
        store.put(&stored, content).unwrap();
        assert!(store.contains(&stored.id).unwrap());
        let reader = store.open(&stored).unwrap();
        assert_eq!(reader.len().unwrap(), content.len() as u64);
        let mut read = vec![7; content.len()];
        reader.read_at(0, &mut read).unwrap();
        assert!(read == *content, "artifact {number}");
        assert_eq!(Content::of(&*reader).unwrap(), stored.content);
        if content.len() > 2 * CHUNK {
            let mut part = [0; 100];
            reader.read_at(2 * CHUNK as u64 - 50, &mut part).unwrap();
            assert_eq!(part[..], content[2 * CHUNK - 50..][..100]);
        }
        let error = reader.read_at(content.len() as u64, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    }
    let mut ids = store.list(Kind::Memory).unwrap();
    ids.sort();
    let keys: Vec<_> = ids.iter().map(|id| id.key()).collect();
    assert_eq!(keys, ["a0", "a1", "a2", "a3", "a4", "a5"]);
    assert!(store.list(Kind::Disk).unwrap().is_empty());
    // Content that does not match is not stored.
    let mut other = bytes(2 * CHUNK);
    let wrong = artifact("wrong", &other);
    other[CHUNK + 1] ^= 1;
    let error = store.put(&wrong, &other).unwrap_err();
    assert!(
        matches!(error, StoreError::Damaged { chunk: 1, .. }),
        "{error}"
    );
    assert!(!store.contains(&wrong.id).unwrap());
    assert_eq!(store.list(Kind::Memory).unwrap().len(), 6);
    for id in ids {
        assert!(store.remove(&id).unwrap());
        assert!(!store.remove(&id).unwrap());
    }
    assert!(store.list(Kind::Memory).unwrap().is_empty());
}

#[test]
fn directory_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let store = LocalStore::open(dir.path()).unwrap();
    keeps_the_contract(&store);
    let missing = artifact("missing", &bytes(1));
    assert!(matches!(store.open(&missing), Err(StoreError::NotFound(_))));
    let left = std::fs::read_dir(dir.path().join("mem")).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn object_store_keeps_the_contract() {
    let server = S3Server::start();
    let (store, _cache) = remote(&server);
    keeps_the_contract(&store);
    let missing = store.open(&artifact("missing", &bytes(1))).unwrap();
    let error = missing.read_at(0, &mut [0]).unwrap_err().to_string();
    assert!(error.contains("chunk 0 of artifact mem/missing"), "{error}");
}
