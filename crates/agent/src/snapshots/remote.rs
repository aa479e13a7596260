//! Snapshots in an object store.
//!
//! A push writes the artifacts of a named snapshot, then its manifest, then the record of its name:
//! a name always refers to a complete snapshot. A pull takes the small files, the disk layers and
//! the files of the image, and leaves the memory where it is: supervisors load only the chunks that
//! their guests touch ([`RemoteSpec`]). The memory files must therefore stay in the object store as
//! long as a snapshot of this host depends on them.
//!
//! | step of a pull                  | failure                    | what is left                   |
//! |---------------------------------|----------------------------|--------------------------------|
//! | read the record of the name     | unknown, store unreachable | nothing                        |
//! | read and check the manifest     | damaged, not for this host | nothing                        |
//! | load the files of the image     | damaged, disk full         | complete files, collected      |
//! | load the other files            | damaged, disk full         | staging directory, collected   |
//! | publish and name the snapshot   | name taken, disk full      | snapshot without name, collected |
//!
//! | step of a push                  | failure                    | what is left                   |
//! |---------------------------------|----------------------------|--------------------------------|
//! | write artifacts                 | store unreachable          | complete artifacts, used by the next push |
//! | write manifest, record          | store unreachable          | the former record of the name  |

use std::{
    collections::HashSet,
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use thiserror_ext::AsReport as _;
use wrenn_model::TemplateName;
use wrenn_proto::supervise::RemoteSpec;
use wrenn_snapshot::{Manifest, SnapshotId, StoreError, layout};
use wrenn_store::{
    Artifact, ArtifactId, ArtifactStore as _, Cache, Content, Kind, ReadAt, RemoteSettings,
    RemoteStore, write_file,
};

use super::{LocatedSnapshot, Pins, SnapshotError, Snapshots, TaggedSnapshot};

/// Version of the record of a name.
const VERSION: u32 = 1;

/// Maximum size of a manifest, in bytes.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// Settings of the object store of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectStoreConfig {
    /// Bucket and prefix: `s3://bucket/prefix`.
    pub url: String,
    /// URL of the server; `None` for that of AWS.
    pub endpoint: Option<String>,
    /// Region; `None` for the default.
    pub region: Option<String>,
    /// Time for which a failed request is repeated.
    pub retry: Duration,
    /// Maximum size of the cache on this host, in bytes.
    pub cache_bytes: u64,
}

/// Maximum time for which the check of an object store repeats a failed request.
const CHECK_RETRY: Duration = Duration::from_secs(3);

/// Checks that an object store answers and accepts the credentials in the environment. Only reads.
/// Blocks, and must not be called by a thread of a runtime. `scratch` is a directory for a cache,
/// which is not used.
///
/// # Errors
/// The reason why the store cannot be used.
pub fn check_object_store(
    config: &ObjectStoreConfig,
    scratch: &Path,
) -> Result<(), wrenn_store::StoreError> {
    let config = ObjectStoreConfig {
        retry: config.retry.min(CHECK_RETRY),
        ..config.clone()
    };
    let remote = Remote::open(&config, scratch, 0)?;
    // A name that may not exist: an answer is all that is needed.
    remote.store.name("check").map(drop)
}

/// Object store of this host.
#[derive(Debug)]
pub(super) struct Remote {
    store: RemoteStore,
    /// What supervisors need to read from the store.
    pub(super) spec: RemoteSpec,
    /// Artifacts that it has.
    known: Mutex<HashSet<ArtifactId>>,
}

/// Record of a name.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    build: SnapshotId,
    manifest: Artifact,
}

/// Failure to use the object store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RemoteError {
    /// There is no object store.
    #[error("this host has no object store: set WRENN_STORE_URL")]
    NotConfigured,
    /// The object store has no snapshot of this name.
    #[error("the object store has no snapshot `{0}`")]
    Unknown(TemplateName),
    /// No snapshot of this host has this name.
    #[error("there is no snapshot `{0}`")]
    NotHere(TemplateName),
    /// A record or manifest cannot be used.
    #[error("{what} in the object store cannot be used: {reason}")]
    Invalid { what: String, reason: String },
    #[error(transparent)]
    Store(#[from] wrenn_store::StoreError),
    /// A file of the snapshot cannot be read or written.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl From<StoreError> for RemoteError {
    fn from(error: StoreError) -> Self {
        Self::Snapshot(error.into())
    }
}

impl Remote {
    pub(super) fn open(
        config: &ObjectStoreConfig,
        cache: &Path,
        room_bytes: u64,
    ) -> Result<Self, wrenn_store::StoreError> {
        let settings = RemoteSettings {
            url: config.url.clone(),
            endpoint: config.endpoint.clone(),
            region: config.region.clone(),
            credentials: None,
            retry: config.retry,
        };
        Ok(Self {
            known: Mutex::default(),
            store: RemoteStore::new(
                &settings,
                Cache::open(cache, config.cache_bytes, room_bytes)?,
            )?,
            spec: RemoteSpec {
                url: config.url.clone(),
                endpoint: config.endpoint.clone(),
                region: config.region.clone(),
                retry_sec: config.retry.as_secs(),
                cache: cache.to_owned(),
                cache_bytes: config.cache_bytes,
                room_bytes,
            },
        })
    }

    /// True if the object store has an artifact. It is asked once: objects are not removed.
    pub(super) fn has(&self, artifact: &Artifact) -> bool {
        if self.known.lock().contains(&artifact.id) {
            return true;
        }
        let has = self.store.contains(&artifact.id).unwrap_or_else(|error| {
            tracing::warn!(error = error.to_report_string(), "object store not reached");
            false
        });
        if has {
            self.known.lock().insert(artifact.id.clone());
        }
        has
    }

    /// Opens a memory diff of a manifest; `None` if the manifest does not describe it.
    pub(super) fn diff(
        &self,
        manifest: &Manifest,
        build: SnapshotId,
    ) -> std::io::Result<Option<Box<dyn ReadAt>>> {
        let id = build.artifact(Kind::Memory);
        let found = manifest.memory.iter().find(|artifact| artifact.id == id);
        let opened = found.map(|artifact| self.store.open(artifact));
        opened.transpose().map_err(std::io::Error::other)
    }

    /// Reads a snapshot by its name.
    fn find(&self, name: &TemplateName) -> Result<Manifest, RemoteError> {
        let invalid = |what: String| move |reason: String| RemoteError::Invalid { what, reason };
        let record = self.store.name(name.as_str())?;
        let record = record.ok_or_else(|| RemoteError::Unknown(name.clone()))?;
        let of_name = || format!("the record of `{name}`");
        let record: Record = serde_json::from_slice(&record)
            .map_err(|error| invalid(of_name())(error.to_string()))?;
        if record.version != VERSION {
            let reason = format!("version {} is not supported", record.version);
            return Err(invalid(of_name())(reason));
        }
        let of_manifest = || format!("manifest {}", record.manifest.id);
        let len = record.manifest.content.len();
        if len > MAX_MANIFEST_BYTES {
            return Err(invalid(of_manifest())(format!("{len} bytes")));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let read = self.store.open(&record.manifest)?.read_at(0, &mut bytes);
        read.map_err(|error| invalid(of_manifest())(error.to_string()))?;
        let manifest = Manifest::parse(&bytes);
        let manifest = manifest.map_err(|error| invalid(of_manifest())(error.to_string()))?;
        match manifest.build == record.build && manifest.is_complete() {
            true => Ok(manifest),
            false => Err(invalid(of_manifest())(
                "it does not describe all files".to_owned(),
            )),
        }
    }

    /// Writes a file of the object store to a new file.
    fn load(&self, artifact: &Artifact, path: &Path) -> Result<(), RemoteError> {
        let content = self.store.open(artifact)?;
        Ok(write_file(path, artifact, &*content)?)
    }
}

impl Snapshots {
    fn remote(&self) -> Result<&Remote, RemoteError> {
        self.remote.as_deref().ok_or(RemoteError::NotConfigured)
    }

    /// Writes a named snapshot of this host to the object store, under the same name. Blocks until
    /// that is done.
    pub(crate) fn push(&self, name: &TemplateName) -> Result<(), RemoteError> {
        let remote = self.remote()?;
        let pin = self.named(name)?;
        let pin = pin.ok_or_else(|| RemoteError::NotHere(name.clone()))?;
        let located = self.locate_files(&pin)?;
        let manifest = self.complete_manifest(&located)?;
        for artifact in manifest.artifacts() {
            let path = self.file_of(&located, &artifact);
            match File::open(&path) {
                Ok(file) => remote.store.put(&artifact, &file)?,
                // A part that came from there.
                Err(_) if remote.store.contains(&artifact.id)? => {}
                Err(source) => {
                    return Err(StoreError::Io {
                        step: "open",
                        path,
                        source,
                    }
                    .into());
                }
            }
        }
        let bytes = serde_json::to_vec(&manifest).map_err(SnapshotError::from_json)?;
        let artifact = Artifact {
            id: manifest.build.artifact(Kind::Manifest),
            content: Content::of(&bytes).map_err(SnapshotError::Io)?,
        };
        remote.store.put(&artifact, &bytes)?;
        let record = Record {
            version: VERSION,
            build: manifest.build,
            manifest: artifact,
        };
        let record = serde_json::to_vec(&record).map_err(SnapshotError::from_json)?;
        Ok(remote.store.put_name(name.as_str(), record)?)
    }

    /// Takes a snapshot from the object store, under the same name. Its memory stays there. Blocks
    /// until that is done.
    pub(crate) fn pull(
        &self,
        name: &TemplateName,
        overwrite: bool,
    ) -> Result<TaggedSnapshot, RemoteError> {
        let remote = self.remote()?;
        let manifest = remote.find(name)?;
        // Before anything is loaded.
        let here = self.vmms.current();
        manifest.check(&here).map_err(SnapshotError::from)?;
        let build = manifest.build;
        let pin = Pins::pin(&self.pins, build);
        // The files of the image are kept until the snapshot that needs them exists.
        let _pull = self.pulls.read();
        if self.own.snapshot(build).is_err() {
            self.load_image(remote, &manifest)?;
            self.load_snapshot(remote, &manifest)?;
        }
        Ok(self.name(name, &pin, overwrite)?)
    }

    /// Removes the files of images that were loaded for snapshots that are gone. Nothing is removed
    /// during a pull, or if a snapshot cannot be read.
    pub(super) fn collect_images(&self) -> Result<(), RemoteError> {
        let Some(_no_pull) = self
            .pulls
            .try_write()
            .filter(|_| self.image_files.has_loaded())
        else {
            return Ok(());
        };
        let mut needed = HashSet::new();
        for build in self.own.list()? {
            let manifest = self.own.snapshot(build)?.manifest;
            needed.extend(manifest.artifacts().map(|artifact| artifact.id));
        }
        let loaded = self.image_files.loaded()?;
        for kind in [Kind::Kernel, Kind::Initrd, Kind::Rootfs] {
            for id in loaded.list(kind)? {
                if !needed.contains(&id) {
                    loaded.remove(&id)?;
                }
            }
        }
        Ok(())
    }

    /// Loads the files of the image that this host does not have.
    fn load_image(&self, remote: &Remote, manifest: &Manifest) -> Result<(), RemoteError> {
        for file in [&manifest.kernel, &manifest.initrd, &manifest.base_disk] {
            let Some(artifact) = &file.artifact else {
                continue;
            };
            if self.image_files.find(file, artifact.id.kind()).is_none() {
                let content = remote.store.open(artifact)?;
                self.image_files.loaded()?.put(artifact, &*content)?;
            }
        }
        Ok(())
    }

    fn load_snapshot(&self, remote: &Remote, manifest: &Manifest) -> Result<(), RemoteError> {
        let stage = self.own.stage(manifest.build)?;
        let mut layers = Vec::new();
        for layer in &manifest.disk_layers {
            let Some(artifact) = layer
                .artifact()
                .filter(|_| !self.own.layer(layer.build).exists())
            else {
                continue;
            };
            let path = stage.path().join(format!("layer-{}", layer.build));
            remote.load(&artifact, &path)?;
            layers.push((layer.build, path));
        }
        let state = [
            (&manifest.header, layout::HEADER),
            (&manifest.device, layout::DEVICE),
        ];
        for (artifact, name) in state {
            if let Some(artifact) = artifact {
                remote.load(artifact, &stage.path().join(name))?;
            }
        }
        Ok(stage.publish_loaded(manifest, layers)?)
    }

    /// Returns the manifest of a snapshot with the content of all files, which are read if it does
    /// not know them.
    fn complete_manifest(&self, located: &LocatedSnapshot) -> Result<Manifest, SnapshotError> {
        let mut manifest = located.manifest().clone();
        self.image_files.describe(&mut manifest);
        if manifest.is_complete() {
            return Ok(manifest);
        }
        let memory = located.restore(false).memory;
        Ok(located
            .snapshot()
            .complete(manifest, &memory, &located.disk_layers())?)
    }

    /// Returns the file with an artifact of a snapshot. It need not exist.
    fn file_of(&self, located: &LocatedSnapshot, artifact: &Artifact) -> PathBuf {
        let manifest = located.manifest();
        let snapshot = located.snapshot();
        match artifact.id.kind() {
            Kind::Header => snapshot.dir.join(layout::HEADER),
            Kind::Device => snapshot.dir.join(layout::DEVICE),
            Kind::Manifest => snapshot.dir.join(layout::MANIFEST),
            Kind::Kernel => manifest.kernel.path.clone(),
            Kind::Initrd => manifest.initrd.path.clone(),
            Kind::Rootfs => manifest.base_disk.path.clone(),
            Kind::Disk => {
                let mut layers = manifest.layers().zip(located.disk_layers());
                let layer = layers.find(|(build, _)| build.artifact(Kind::Disk) == artifact.id);
                layer.map(|(_, path)| path).unwrap_or_default()
            }
            Kind::Memory => {
                let name = format!("{}.mem", artifact.id.key());
                let dirs = located.restore(false).memory;
                let mut paths = dirs.iter().map(|dir| dir.join(&name));
                paths.find(|path| path.exists()).unwrap_or_default()
            }
        }
    }
}
