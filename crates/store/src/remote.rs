//! Artifacts in an object store: S3 and stores with the same protocol.
//!
//! The object of an artifact is `<prefix>/<kind>/<key>`. It has the chunks of the artifact one after
//! the other, except those of zeros, which are not stored. An object appears when it is complete.

mod file;
mod http;
mod packed;

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{TryStreamExt as _, future::try_join_all};
use object_store::{
    BackoffConfig, ObjectStore, ObjectStoreExt as _, PutPayload, RetryConfig, aws::AmazonS3Builder,
    path::Path,
};

use crate::{
    Artifact, ArtifactId, ArtifactStore, Cache, Kind, ReadAt, StoreError, local::read_chunk,
};
use file::RemoteFile;
use packed::Packed;

/// Size of a part of an upload, in chunks. S3 requires 5 MiB, except for the last part, and permits
/// 10 000 parts.
const PART_CHUNKS: u64 = 64;

/// Maximum number of parts of one artifact that are sent at the same time.
const PARTS_AT_ONCE: usize = 4;

/// Maximum size of the record of a name.
const MAX_DOCUMENT_BYTES: u64 = 64 * 1024;

/// Settings of an object store.
#[derive(Debug, Clone)]
pub struct RemoteSettings {
    /// Bucket, and the first part of the names of all objects: `s3://bucket/prefix`.
    pub url: String,
    /// URL of the server; `None` for that of AWS. Plain HTTP is used if the URL says so.
    pub endpoint: Option<String>,
    /// Region; `None` for `us-east-1`.
    pub region: Option<String>,
    /// Access key and its secret; `None` to look for credentials in the environment and on the
    /// instance, as AWS's own tools do.
    pub credentials: Option<(String, String)>,
    /// Time for which a request that fails is repeated.
    pub retry: Duration,
}

/// Store in an object store.
#[derive(Debug)]
pub struct RemoteStore {
    inner: Arc<Inner>,
}

/// Connection to the object store.
#[derive(Debug)]
struct Inner {
    objects: Box<dyn ObjectStore>,
    prefix: Path,
    cache: Cache,
    runtime: Runtime,
}

/// Runtime of the client. Callers block until it has answered.
#[derive(Debug)]
struct Runtime(Option<tokio::runtime::Runtime>);

impl Drop for Runtime {
    fn drop(&mut self) {
        // A drop would wait for all tasks, and must not happen in asynchronous code.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl RemoteStore {
    /// Returns a store. Does not connect yet.
    ///
    /// # Errors
    /// `Setting`
    pub fn new(settings: &RemoteSettings, cache: Cache) -> Result<Self, StoreError> {
        let (bucket, prefix) = parse_url(&settings.url)?;
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: usize::MAX,
            retry_timeout: settings.retry,
        };
        let mut s3 = match &settings.credentials {
            Some((key, secret)) => AmazonS3Builder::new()
                .with_access_key_id(key)
                .with_secret_access_key(secret),
            None => AmazonS3Builder::from_env(),
        };
        s3 = s3
            .with_bucket_name(bucket)
            .with_http_connector(http::Connector)
            .with_retry(retry);
        if let Some(endpoint) = &settings.endpoint {
            s3 = s3
                .with_endpoint(endpoint)
                .with_allow_http(endpoint.starts_with("http://"));
        }
        if let Some(region) = &settings.region {
            s3 = s3.with_region(region);
        }
        let objects = s3
            .build()
            .map_err(|error| StoreError::Setting(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("object-store")
            .enable_all()
            .build()
            .map_err(|error| StoreError::Setting(format!("failed to start threads: {error}")))?;
        let inner = Inner {
            objects: Box::new(objects),
            prefix,
            cache,
            runtime: Runtime(Some(runtime)),
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }
}

impl RemoteStore {
    /// Returns the record of a name; `None` if it does not exist.
    ///
    /// # Errors
    /// The store cannot be reached.
    pub fn name(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        self.inner.document(&self.inner.name_path(name))
    }

    /// Writes the record of a name. Replaces an earlier one.
    ///
    /// # Errors
    /// The store cannot be reached or written to.
    pub fn put_name(&self, name: &str, record: Vec<u8>) -> Result<(), StoreError> {
        let path = self.inner.name_path(name);
        let put = self.inner.objects.put(&path, record.into());
        self.inner.run(|| format!("write {path}"), put).map(drop)
    }
}

impl Inner {
    /// Returns the object of a name: `<prefix>/names/<name>`.
    fn name_path(&self, name: &str) -> Path {
        self.prefix.clone().join("names").join(name)
    }

    fn path(&self, id: &ArtifactId) -> Path {
        let kind = self.prefix.clone().join(id.kind().name());
        kind.join(id.key())
    }

    /// Runs a request to its end.
    fn run<T: Send>(
        &self,
        step: impl FnOnce() -> String,
        request: impl Future<Output = object_store::Result<T>> + Send,
    ) -> Result<T, StoreError> {
        let closed = || StoreError::Setting("the store is closed".to_owned());
        let runtime = self.runtime.0.as_ref().ok_or_else(closed)?;
        let wait = || runtime.block_on(request);
        // A thread of another runtime cannot wait for this one.
        let answer = match tokio::runtime::Handle::try_current() {
            Err(_) => wait(),
            Ok(_) => std::thread::scope(|scope| scope.spawn(wait).join()).map_err(|_| closed())?,
        };
        answer.map_err(|source| StoreError::Remote {
            step: step(),
            source,
        })
    }

    /// Returns the size of an object; `None` if it does not exist.
    fn size(&self, id: &ArtifactId) -> Result<Option<u64>, StoreError> {
        let path = self.path(id);
        let found = self.run(|| format!("find {path}"), self.objects.head(&path));
        match found {
            Ok(meta) => Ok(Some(meta.size)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn load(&self, id: &ArtifactId, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        let path = self.path(id);
        let step = || format!("read bytes {} to {} of {path}", range.start, range.end);
        self.run(step, self.objects.get_range(&path, range.clone()))
    }

    fn upload(&self, artifact: &Artifact, content: &dyn ReadAt) -> Result<(), StoreError> {
        let path = self.path(&artifact.id);
        let mut parts = Parts::new(artifact, content);
        let first = parts.next().transpose()?.unwrap_or_default();
        let Some(second) = parts.next().transpose()? else {
            let put = self.objects.put(&path, PutPayload::from(first));
            return self.run(|| format!("write {path}"), put).map(drop);
        };
        let begin = self.objects.put_multipart(&path);
        let mut upload = self.run(|| format!("begin to write {path}"), begin)?;
        let mut waiting = vec![
            upload.put_part(first.into()),
            upload.put_part(second.into()),
        ];
        let send_all = || {
            for part in parts {
                waiting.push(upload.put_part(part?.into()));
                if waiting.len() >= PARTS_AT_ONCE {
                    let sent = try_join_all(std::mem::take(&mut waiting));
                    self.run(|| format!("write {path}"), sent)?;
                }
            }
            let sent = try_join_all(std::mem::take(&mut waiting));
            self.run(|| format!("write {path}"), sent)?;
            self.run(|| format!("complete {path}"), upload.complete())
                .map(drop)
        };
        let outcome = send_all();
        if outcome.is_err() {
            // The parts would be kept, and paid for.
            let _ = self.run(|| format!("give up {path}"), upload.abort());
        }
        outcome
    }

    /// Returns a small object; `None` if it does not exist.
    fn document(&self, path: &Path) -> Result<Option<Bytes>, StoreError> {
        let get = async {
            let found = self.objects.get(path).await?;
            match found.meta.size > MAX_DOCUMENT_BYTES {
                true => Err(object_store::Error::Generic {
                    store: "S3",
                    source: format!("{} bytes, expected a small object", found.meta.size).into(),
                }),
                false => found.bytes().await,
            }
        };
        match self.run(|| format!("read {path}"), get) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Parts of an upload.
struct Parts<'a> {
    artifact: &'a Artifact,
    content: &'a dyn ReadAt,
    next: u64,
}

impl<'a> Parts<'a> {
    fn new(artifact: &'a Artifact, content: &'a dyn ReadAt) -> Self {
        Self {
            artifact,
            content,
            next: 0,
        }
    }

    /// Reads and verifies the next chunks that are not zero.
    fn read(&mut self) -> Result<Bytes, StoreError> {
        let mut part = Vec::new();
        let mut count = 0;
        let content = &self.artifact.content;
        while self.next < content.chunks() && count < PART_CHUNKS {
            let chunk = self.next;
            self.next += 1;
            if content.is_zero(chunk) {
                continue;
            }
            let begin = part.len();
            part.resize(begin + content.chunk_len(chunk), 0);
            read_chunk(self.artifact, self.content, chunk, &mut part[begin..])?;
            count += 1;
        }
        Ok(part.into())
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Bytes, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.read() {
            Ok(part) if part.is_empty() => None,
            read => Some(read),
        }
    }
}

impl ArtifactStore for RemoteStore {
    fn open(&self, artifact: &Artifact) -> Result<Box<dyn ReadAt>, StoreError> {
        let packed = Packed::of(&artifact.content);
        let file = RemoteFile::new(self.inner.clone(), artifact.clone(), packed);
        Ok(Box::new(file))
    }

    fn put(&self, artifact: &Artifact, content: &dyn ReadAt) -> Result<(), StoreError> {
        match self.contains(&artifact.id)? {
            true => Ok(()),
            false => self.inner.upload(artifact, content),
        }
    }

    fn contains(&self, id: &ArtifactId) -> Result<bool, StoreError> {
        Ok(self.inner.size(id)?.is_some())
    }

    fn remove(&self, id: &ArtifactId) -> Result<bool, StoreError> {
        if !self.contains(id)? {
            return Ok(false);
        }
        let path = self.inner.path(id);
        let removed = self.inner.run(
            || format!("remove {path}"),
            self.inner.objects.delete(&path),
        );
        match removed {
            Err(error) if is_not_found(&error) => Ok(false),
            removed => removed.map(|()| true),
        }
    }

    fn list(&self, kind: Kind) -> Result<Vec<ArtifactId>, StoreError> {
        let prefix = self.inner.prefix.clone().join(kind.name());
        let listed = self
            .inner
            .objects
            .list(Some(&prefix))
            .try_collect::<Vec<_>>();
        let objects = self.inner.run(|| format!("list {prefix}"), listed)?;
        let ids = objects
            .iter()
            .filter_map(|object| object.location.filename());
        Ok(ids
            .filter_map(|key| ArtifactId::new(kind, key).ok())
            .collect())
    }
}

fn is_not_found(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Remote {
            source: object_store::Error::NotFound { .. },
            ..
        }
    )
}

/// Returns bucket and prefix of a URL.
fn parse_url(url: &str) -> Result<(&str, Path), StoreError> {
    let invalid = || StoreError::Setting(format!("`{url}` is not of the form s3://BUCKET/PREFIX"));
    let rest = url.strip_prefix("s3://").ok_or_else(invalid)?;
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(invalid());
    }
    let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| invalid())?;
    Ok((bucket, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_names_bucket_and_prefix() {
        for (url, bucket, prefix) in [
            ("s3://b", "b", ""),
            ("s3://b/", "b", ""),
            ("s3://b/a/c/", "b", "a/c"),
        ] {
            let parsed = parse_url(url).expect("valid");
            assert_eq!((parsed.0, parsed.1.as_ref()), (bucket, prefix));
        }
        for url in [
            "",
            "b",
            "http://b/a",
            "s3://",
            "s3:///a",
            "s3://b/a//c",
            "s3://b/..",
        ] {
            assert!(parse_url(url).is_err(), "{url}");
        }
    }
}
