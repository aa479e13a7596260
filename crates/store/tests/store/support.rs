//! Artifacts and stores of the tests.

use std::time::Duration;

use tempfile::TempDir;
use wrenn_store::{Artifact, ArtifactId, Cache, Content, Kind, RemoteSettings, RemoteStore};
use wrenn_test_s3::{ACCESS_KEY, BUCKET, S3Server, SECRET_KEY};

/// Size of a chunk, as a length of slices.
pub(crate) const CHUNK: usize = 1024 * 1024;

/// Returns content with different bytes in each chunk.
pub(crate) fn bytes(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at / 7 + at / CHUNK * 31) % 255).unwrap() + 1)
        .collect()
}

/// Returns the artifact with this content.
pub(crate) fn artifact(key: &str, bytes: &Vec<u8>) -> Artifact {
    Artifact {
        id: ArtifactId::new(Kind::Memory, key).unwrap(),
        content: Content::of(bytes).unwrap(),
    }
}

pub(crate) fn settings(server: &S3Server) -> RemoteSettings {
    RemoteSettings {
        url: format!("s3://{BUCKET}/a/prefix"),
        endpoint: Some(server.endpoint()),
        region: None,
        credentials: Some((ACCESS_KEY.to_owned(), SECRET_KEY.to_owned())),
        retry: Duration::from_secs(20),
    }
}

/// Returns a store with a cache of its own.
pub(crate) fn remote(server: &S3Server) -> (RemoteStore, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path(), 1 << 30, 0).unwrap();
    (RemoteStore::new(&settings(server), cache).unwrap(), dir)
}
