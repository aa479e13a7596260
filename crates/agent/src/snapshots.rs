//! Snapshots stored on this host: their files, their names, and the references that keep them.
//!
//! Owns the data directory's snapshot store, the names that users gave to snapshots, and the memory
//! files of the snapshots that VMs currently run from. The image directory has a second store,
//! which holds the template snapshots; this module only reads it.
//!
//! A snapshot is kept as long as a name or a [`SnapshotRef`] refers to it. [`Snapshots::collect`]
//! removes all others. A sandbox's actor holds a reference to every snapshot that the sandbox runs
//! on or may be restored from.

mod compact;
mod image_files;
mod located;
mod memory;
mod names;
mod pins;
mod remote;
mod tagged;
mod template;
mod verify;

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use thiserror_ext::AsReport as _;
use wrenn_disk::{DiskError, ToolJails};
use wrenn_model::{CpuModel, TemplateName};
use wrenn_proto::supervise::SupervisorSpec;
use wrenn_snapshot::{
    ChainError, DiffError, Earlier, HostVmms, ImageFile, Incompatible, Layer, Manifest, NewLayer,
    Requirements, Staging, Store, StoreError, VmmVersion,
};
use wrenn_store::Artifact;
use wrenn_sys::failpoint;

pub(crate) use compact::Depth;
use image_files::{Holder, ImageFiles};
pub(crate) use located::LocatedSnapshot;
pub(crate) use memory::ImageMemory;
use memory::Memories;
use names::{NameError, Names};
use pins::Pins;
pub(crate) use pins::SnapshotRef;
use remote::Remote;
pub(crate) use remote::RemoteError;
pub use remote::{ObjectStoreConfig, check_object_store};
pub(crate) use tagged::TaggedSnapshot;
use tagged::TaggedSnapshots;
use template::ColdTemplates;
pub(crate) use template::{
    TemplateSnapshotState, VARIANTS, examine, template_snapshot_name, variant,
};
use verify::Verified;
pub(crate) use wrenn_snapshot::SnapshotId;

use crate::vmms::Vmms;

/// Failure to store, find, name or compact a snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SnapshotError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Name(#[from] NameError),
    /// A memory file of the snapshot is missing or damaged.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The memory files of the snapshot could not be merged.
    #[error("failed to merge memory files")]
    Merge(#[from] DiffError),
    /// The disk layers of the snapshot could not be merged.
    #[error("failed to merge disk layers")]
    Disk(#[source] DiskError),
    /// Collection is skipped, because the set of references is not known.
    #[error("snapshot collection skipped, references are not known")]
    NotNow,
    /// A file of the snapshot could not be written.
    #[error("failed to write a snapshot")]
    Io(#[from] std::io::Error),
    /// The memory file of the snapshot could not be created.
    #[error("failed to create the memory file of a snapshot")]
    Memory(#[source] std::io::Error),
    /// There is no disk space for a compacted copy.
    #[error("failed to reserve disk space for the compacted copy: {0}")]
    Space(String),
    /// This host cannot load the snapshot's device state.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    /// A memory file is neither on this host nor in its object store, or the store does not answer.
    #[error(
        "memory file {0} is neither on this host nor in the object store, or the store does not answer"
    )]
    NotStored(String),
    /// The object store cannot be used.
    #[error(transparent)]
    Remote(wrenn_store::StoreError),
    /// A memory file is missing on this host, which uses no object store.
    #[error(
        "memory file {0} is missing; if the snapshot was taken from an object store, set WRENN_STORE_URL"
    )]
    Elsewhere(String),
}

impl SnapshotError {
    fn from_json(error: serde_json::Error) -> Self {
        Self::Io(error.into())
    }

    /// True if the host's disk is full.
    pub(crate) fn is_out_of_space(&self) -> bool {
        match self {
            Self::Store(StoreError::Io { source, .. })
            | Self::Name(NameError::Io { source, .. })
            | Self::Merge(DiffError::Write { source, .. })
            | Self::Io(source) => crate::host::is_out_of_space(source),
            Self::Disk(error) => error.is_out_of_space(),
            _ => false,
        }
    }
}

/// Disk of a VM whose state was saved.
#[derive(Debug)]
pub(crate) struct SavedDisk {
    /// Read-only files above the base image, lowest first.
    pub(crate) layers: Vec<PathBuf>,
    /// True if the VMM keeps running, and may hold descriptors with which it can write to them.
    pub(crate) is_open: bool,
    /// Last snapshot of the sandbox before this one.
    pub(crate) last: Option<SnapshotRef>,
}

/// Staged snapshot: not yet published, but already referenced.
pub(crate) struct StagedSnapshot {
    staging: Staging,
    pin: SnapshotRef,
}

impl StagedSnapshot {
    pub(crate) fn path(&self) -> &Path {
        self.staging.path()
    }

    pub(crate) fn build(&self) -> String {
        self.staging.build().to_string()
    }
}

/// Disk of a snapshot, and the kernel that boots from it.
#[derive(Debug)]
pub(crate) struct BootableDisk {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// Image at the base.
    pub(crate) base: PathBuf,
    /// Read-only layers, lowest first.
    pub(crate) layers: Vec<PathBuf>,
}

/// Object store of a host.
pub(crate) struct RemoteConfig<'a> {
    pub(crate) store: &'a ObjectStoreConfig,
    /// Directory of the cache.
    pub(crate) cache: &'a Path,
    /// Space on the disk that the cache leaves free.
    pub(crate) room_bytes: u64,
}

/// All snapshots of this host.
pub(crate) struct Snapshots {
    own: Store,
    images: Store,
    names: Names,
    tagged: TaggedSnapshots,
    image_names: Names,
    pins: Arc<Pins>,
    memories: Memories,
    verified: Verified,
    image_files: ImageFiles,
    cold: ColdTemplates,
    remote: Option<Arc<Remote>>,
    /// Held for reading during a pull.
    pulls: parking_lot::RwLock<()>,
    vmms: Vmms,
    cpu: CpuModel,
    /// Jails of the programs that measure and merge disk layers.
    tools: ToolJails,
}

impl Snapshots {
    /// Opens the store in `root`, and, read-only, the one in the image directory. `vmms` is this
    /// host's VMM, `cpu` the CPU model of VMs that boot, and `tools` the jails of the programs that
    /// measure and merge disk layers. `remote` are the settings of the object store.
    pub(crate) fn open(
        root: &Path,
        images_dir: &Path,
        vmms: Vmms,
        cpu: CpuModel,
        tools: ToolJails,
        remote: Option<RemoteConfig<'_>>,
    ) -> Result<Self, SnapshotError> {
        let remote =
            remote.map(|config| Remote::open(config.store, config.cache, config.room_bytes));
        let images = images_dir.join("snapshots");
        Ok(Self {
            own: Store::open(root)?,
            images: Store::at(&images),
            names: Names::open(&root.join("names"))?,
            tagged: TaggedSnapshots::default(),
            image_names: Names::at(&images.join("names")),
            pins: Arc::default(),
            memories: Memories::default(),
            verified: Verified::default(),
            image_files: ImageFiles::of(images_dir, &root.join("images")),
            remote: remote
                .transpose()
                .map_err(SnapshotError::Remote)?
                .map(Arc::new),
            cold: ColdTemplates::default(),
            pulls: parking_lot::RwLock::default(),
            vmms,
            cpu,
            tools,
        })
    }

    /// Starts a new snapshot.
    pub(crate) fn stage(&self) -> Result<StagedSnapshot, SnapshotError> {
        let build = SnapshotId::random();
        // Referenced before its directory exists, so that it is never collected.
        let pin = Pins::pin(&self.pins, build);
        let staging = self.own.stage(build)?;
        Ok(StagedSnapshot { staging, pin })
    }

    /// Completes a snapshot and moves it to its final place.
    ///
    /// `vmm` is the VMM that saved it, which may be older than the one on this host; `None` if its
    /// supervisor did not report it. Blocks until all of its files are flushed.
    pub(crate) fn publish(
        &self,
        stage: StagedSnapshot,
        spec: &SupervisorSpec,
        disk: &SavedDisk,
        vmm: Option<String>,
    ) -> Result<SnapshotRef, SnapshotError> {
        let StagedSnapshot { staging, pin } = stage;
        let (names, new) = self.name_layers(disk);
        let (here, cpu) = (self.vmms.current(), spec.cpu());
        let mut manifest = Manifest {
            version: Manifest::VERSION,
            build: staging.build(),
            created_unix_ms: crate::sandbox::now_unix_ms(),
            requires: Requirements {
                vmm: VmmVersion::from(vmm.unwrap_or(here.boots.version).as_str()),
                accel: spec.accel,
                host_cpu: spec.accel.shows_host_cpu(&cpu).then_some(here.cpu),
                cpu,
                machine: spec.profile(),
            },
            size: spec.size,
            kernel: ImageFile::at(spec.kernel.clone()),
            initrd: ImageFile::at(spec.initrd.clone()),
            base_disk: ImageFile::at(spec.base_disk.clone()),
            disk_layers: names.into_iter().map(Layer::unknown).collect(),
            memory: Vec::new(),
            header: None,
            device: None,
            device_checksum: None,
            template: spec.template.to_string(),
            default_user: spec.default_user.clone(),
            guest_token: spec.envd_token.clone(),
            envs: spec.envs.clone(),
        };
        self.image_files.describe(&mut manifest);
        let known = self.known_artifacts(spec, disk);
        // This store must not depend on files that may be removed from the image store: memory files
        // are linked, as disk layers are.
        let earlier = Earlier {
            known: &known,
            other: Some(&self.images),
            is_remote: self.remote.is_some(),
        };
        staging.publish(&manifest, &new, &earlier)?;
        Ok(pin)
    }

    /// Returns the artifacts of the snapshots that a VM was restored from and saved to before. Their
    /// files need not be read again.
    fn known_artifacts(&self, spec: &SupervisorSpec, disk: &SavedDisk) -> Vec<Artifact> {
        let origin = spec
            .restore
            .as_ref()
            .and_then(|from| from.build.parse().ok());
        let last = disk.last.as_ref().map(SnapshotRef::id);
        let snapshots = origin.into_iter().chain(last);
        let manifests = snapshots.filter_map(|build| self.read(build).ok());
        let artifacts = manifests.flat_map(|(snapshot, _)| {
            let artifacts: Vec<_> = snapshot.manifest.artifacts().collect();
            artifacts
        });
        artifacts.collect()
    }

    /// Returns the IDs of all layers of a disk, and the layers that are not in this store.
    fn name_layers(&self, disk: &SavedDisk) -> (Vec<SnapshotId>, Vec<NewLayer>) {
        let copies = self.copies(disk);
        let (mut names, mut new) = (Vec::new(), Vec::new());
        for (place, path) in disk.layers.iter().enumerate() {
            let copy = copies.get(place).filter(|copy| self.is_copy(**copy, path));
            if let Some(copy) = copy {
                names.push(*copy);
                continue;
            }
            let stored = self.stored_layer(path);
            let build = stored.unwrap_or_else(SnapshotId::random);
            names.push(build);
            // A layer of the image store is linked as well: this store must not depend on files
            // that may be removed there.
            if self.own.layer(build) != *path {
                new.push(NewLayer {
                    build,
                    path: path.clone(),
                    is_open: disk.is_open && stored.is_none(),
                });
            }
        }
        (names, new)
    }

    /// Returns the layers of the sandbox's last snapshot. They have the same places in the chain of
    /// a VM that has been running since then.
    fn copies(&self, disk: &SavedDisk) -> Vec<SnapshotId> {
        let last = disk
            .last
            .as_ref()
            .and_then(|last| self.own.snapshot(last.id()).ok());
        last.map(|snapshot| snapshot.manifest.layers().collect())
            .unwrap_or_default()
    }

    /// True if a layer of this store is a copy of a file that a VMM may write to. Of releases that
    /// did not copy, it is the same file.
    fn is_copy(&self, build: SnapshotId, path: &Path) -> bool {
        let inode = |path: &Path| {
            std::fs::metadata(path)
                .ok()
                .map(|meta| (meta.dev(), meta.ino()))
        };
        let stored = inode(&self.own.layer(build));
        self.stored_layer(path).is_none() && stored.is_some() && stored != inode(path)
    }

    /// Returns the ID of a layer that is already in a store.
    fn stored_layer(&self, path: &Path) -> Option<SnapshotId> {
        let build: SnapshotId = path.file_stem()?.to_str()?.parse().ok()?;
        let stored = [&self.own, &self.images].map(|store| store.layer(build));
        stored.iter().any(|known| known == path).then_some(build)
    }

    /// Directory of the diff files of new snapshots.
    pub(crate) fn memory_dir(&self) -> PathBuf {
        self.own.memory_dir()
    }

    /// Returns kind and version of the VMM of VMs that boot, if it can be read. May block.
    pub(crate) fn vmm(&self) -> Option<String> {
        self.vmms.version()
    }

    /// Returns the VMMs of this host. May block.
    pub(crate) fn vmms(&self) -> HostVmms {
        self.vmms.current()
    }

    /// Takes a reference to a snapshot, if it exists.
    pub(crate) fn pin(&self, build: &str) -> Option<SnapshotRef> {
        let build = build.parse().ok()?;
        let pin = Pins::pin(&self.pins, build);
        self.find(build).ok().map(|_| pin)
    }

    /// Returns everything needed to restore a VM from a snapshot.
    pub(crate) fn locate(&self, pin: &SnapshotRef) -> Result<LocatedSnapshot, SnapshotError> {
        let located = self.locate_files(pin)?;
        located.manifest().check(&self.vmms.current())?;
        Ok(located)
    }

    /// Returns the files of a snapshot, which this host's VMM may not be able to load.
    fn locate_files(&self, pin: &SnapshotRef) -> Result<LocatedSnapshot, SnapshotError> {
        let snapshot = self.find(pin.id())?;
        let manifest = &snapshot.manifest;
        let stores = self.stores_of(&snapshot);
        let layers = self.layers(&stores, manifest)?;
        let memory = stores.iter().map(|store| store.memory_dir()).collect();
        let remote = self.remote_of(&snapshot.manifest, &stores)?;
        let located = LocatedSnapshot::new(snapshot, layers, memory, pin.clone());
        Ok(located.with_remote(remote))
    }

    /// Returns the object store if it has a memory file of the snapshot that is on no store of this
    /// host.
    fn remote_of(
        &self,
        manifest: &Manifest,
        stores: &[&Store],
    ) -> Result<Option<Arc<Remote>>, SnapshotError> {
        let is_here = |artifact: &&Artifact| {
            let build = artifact.id.key().parse::<SnapshotId>();
            build.is_ok_and(|build| stores.iter().any(|store| store.diff(build).exists()))
        };
        match (
            manifest.memory.iter().find(|diff| !is_here(diff)),
            &self.remote,
        ) {
            (None, _) => Ok(None),
            (Some(_), Some(remote)) => Ok(Some(remote.clone())),
            (Some(missing), None) => {
                let name = format!("{}.mem", missing.id.key());
                Err(SnapshotError::Elsewhere(name))
            }
        }
    }

    /// Returns the disk of a snapshot and the kernel that boots from it. The snapshot's other files
    /// need not exist or match this host.
    pub(crate) fn disk(&self, pin: &SnapshotRef) -> Result<BootableDisk, SnapshotError> {
        let snapshot = self.find(pin.id())?;
        let layers = self.layers(&self.stores_of(&snapshot), &snapshot.manifest)?;
        let manifest = snapshot.manifest;
        Ok(BootableDisk {
            kernel: manifest.kernel.path,
            initrd: manifest.initrd.path,
            base: manifest.base_disk.path,
            layers,
        })
    }

    /// Returns the stores that hold the files of a snapshot. A snapshot of the image store depends
    /// only on files of that store: copies of them in the data directory's store belong to other
    /// snapshots and are removed with the last of those.
    fn stores_of(&self, snapshot: &wrenn_snapshot::Snapshot) -> Vec<&Store> {
        if self.images.holds(snapshot) {
            vec![&self.images]
        } else {
            vec![&self.own, &self.images]
        }
    }

    fn layers(
        &self,
        stores: &[&Store],
        manifest: &Manifest,
    ) -> Result<Vec<PathBuf>, SnapshotError> {
        let layers = manifest.layers();
        layers.map(|build| self.layer(stores, build)).collect()
    }

    /// Verifies the checksums of a snapshot's files. Blocks until the files that were not verified
    /// before have been read.
    pub(crate) fn verify(&self, located: &LocatedSnapshot) -> Result<(), SnapshotError> {
        located.snapshot().verify_devices()?;
        for layer in located.disk_layers() {
            self.verified.verify_layer(&layer)?;
        }
        located.require_remote()?;
        let header = located.snapshot().header()?;
        Ok(self.verified.verify(&located.chain(&header)?)?)
    }

    fn layer(&self, stores: &[&Store], build: SnapshotId) -> Result<PathBuf, SnapshotError> {
        let mut paths = stores.iter().map(|store| store.layer(build));
        let Some(path) = paths.find(|path| path.exists()) else {
            return Err(StoreError::MissingLayer(self.own.layer(build)).into());
        };
        if path == self.own.layer(build) {
            located::protect_layer(&path)?;
        }
        Ok(path)
    }

    /// Returns the files in the data directory's store that a snapshot depends on. Empty if the
    /// snapshot cannot be read.
    pub(crate) fn own_files(&self, pin: &SnapshotRef) -> Vec<PathBuf> {
        let files = || {
            let snapshot = self.own.snapshot(pin.id())?;
            let header = snapshot.header()?;
            let layers = snapshot.manifest.layers();
            let mut files: Vec<_> = layers.map(|layer| self.own.layer(layer)).collect();
            files.extend(header.diffs().iter().map(|diff| self.own.diff(diff.build)));
            Ok::<_, StoreError>(files)
        };
        files().unwrap_or_default()
    }

    fn find(&self, build: SnapshotId) -> Result<wrenn_snapshot::Snapshot, SnapshotError> {
        let (mut snapshot, holder) = self.read(build)?;
        self.image_files.locate(&mut snapshot.manifest, holder);
        Ok(snapshot)
    }

    /// Reads a snapshot as it is stored: without the paths of image files.
    fn read(&self, build: SnapshotId) -> Result<(wrenn_snapshot::Snapshot, Holder), SnapshotError> {
        match self.own.snapshot(build) {
            Err(StoreError::NotFound(_)) => Ok((self.images.snapshot(build)?, Holder::ImageDir)),
            other => Ok((other?, Holder::DataDir)),
        }
    }

    /// Returns the token that the guest agent in a snapshot requires from its clients.
    pub(crate) fn guest_token(&self, pin: &SnapshotRef) -> Option<String> {
        self.find(pin.id()).ok().map(|s| s.manifest.guest_token)
    }

    /// Returns the memory file of a snapshot, which all VMs running from it share.
    pub(crate) fn memory(
        &self,
        located: &LocatedSnapshot,
    ) -> Result<Arc<ImageMemory>, SnapshotError> {
        let made = self
            .memories
            .get_or_make(located.pin().id(), located.manifest().size.memory_mib);
        made.map_err(SnapshotError::Memory)
    }

    /// Takes over a snapshot's memory file from a supervisor that an earlier agent started.
    pub(crate) fn adopt_memory(
        &self,
        pin: &SnapshotRef,
        fd: std::os::fd::OwnedFd,
    ) -> Arc<ImageMemory> {
        self.memories.adopt(pin.id(), fd)
    }

    /// Returns a reference to the snapshot that has this user-given name.
    pub(crate) fn named(&self, name: &TemplateName) -> Result<Option<SnapshotRef>, SnapshotError> {
        self.pinned(&self.names, name)
    }

    /// Returns a reference to the snapshot that has this name. The name is read again after the
    /// reference is taken, because it may have been moved to another snapshot and the first one
    /// collected in between.
    fn pinned(
        &self,
        names: &Names,
        name: &TemplateName,
    ) -> Result<Option<SnapshotRef>, SnapshotError> {
        let mut pin: Option<SnapshotRef> = None;
        loop {
            let build = names.get(name)?.map(|record| record.build);
            if build == pin.as_ref().map(SnapshotRef::id) {
                return Ok(pin);
            }
            pin = build.map(|build| Pins::pin(&self.pins, build));
        }
    }

    /// Takes a reference to every snapshot in the data directory's store.
    pub(crate) fn pin_all(&self) -> Result<Vec<SnapshotRef>, SnapshotError> {
        let all = self.own.list()?.into_iter();
        Ok(all.map(|build| Pins::pin(&self.pins, build)).collect())
    }

    /// True if a user gave this name to a snapshot, even if that snapshot cannot be read.
    pub(crate) fn has_name(&self, name: &TemplateName) -> bool {
        self.names.is_given(name)
    }

    /// Names a snapshot.
    pub(crate) fn name(
        &self,
        name: &TemplateName,
        pin: &SnapshotRef,
        overwrite: bool,
    ) -> Result<TaggedSnapshot, SnapshotError> {
        // Other sandboxes may be created from it now.
        self.own.seal(pin.id())?;
        let mut failure = None;
        let named = self.tagged.change(name, || {
            self.names.put(name, pin.id(), overwrite)?;
            let described = self.describe(name, pin.id());
            Ok::<_, SnapshotError>(Some(described.unwrap_or_else(|error| {
                failure = Some(error);
                TaggedSnapshot::damaged(name.clone())
            })))
        })?;
        match failure {
            Some(error) => Err(error),
            None => Ok(named.unwrap_or_else(|| TaggedSnapshot::damaged(name.clone()))),
        }
    }

    /// Removes a name. Sandboxes that depend on the snapshot are not affected. Returns false if the
    /// name does not exist.
    pub(crate) fn unname(&self, name: &TemplateName) -> Result<bool, SnapshotError> {
        let mut existed = false;
        self.tagged.change(name, || {
            existed = self.names.remove(name)?;
            Ok::<_, SnapshotError>(None)
        })?;
        Ok(existed)
    }

    /// Returns all named snapshots. Of a damaged snapshot only the name is returned; its defect is
    /// reported to a client that uses it.
    pub(crate) fn all_named(&self) -> Result<Vec<Arc<TaggedSnapshot>>, SnapshotError> {
        self.tagged.all(|| self.read_named())
    }

    fn read_named(&self) -> Result<Vec<TaggedSnapshot>, SnapshotError> {
        let mut all = Vec::new();
        for (name, record) in self.names.each()? {
            let record = record.map_err(SnapshotError::from);
            match record.and_then(|record| self.describe(&name, record.build)) {
                Ok(named) => all.push(named),
                Err(error) => {
                    let error = error.to_report_string();
                    tracing::warn!(%name, error, "failed to read a snapshot");
                    all.push(TaggedSnapshot::damaged(name));
                }
            }
        }
        Ok(all)
    }

    fn describe(
        &self,
        name: &TemplateName,
        build: SnapshotId,
    ) -> Result<TaggedSnapshot, SnapshotError> {
        let snapshot = self.find(build)?;
        Ok(TaggedSnapshot {
            name: name.clone(),
            size_bytes: self.own.size(build)?,
            generation: snapshot.header()?.generation(),
            size: Some(snapshot.manifest.size),
            created_unix_ms: snapshot.manifest.created_unix_ms,
        })
    }

    /// Removes all unreferenced snapshots. Blocks until they are removed.
    ///
    /// `kept` is called after the references were read and returns further snapshots to keep. If it
    /// returns `None`, nothing is removed.
    pub(crate) fn collect(&self, kept: impl FnOnce() -> Option<Vec<SnapshotId>>) {
        let live = || -> Result<_, SnapshotError> {
            // References are read before the names: a snapshot that is named and then released is
            // in the list of names by then, or was referenced before. They are read again at the
            // end: a snapshot may be referenced by its name after the first read and lose that name
            // before the names are read.
            let mut live = self.pins.all();
            live.extend(kept().ok_or(SnapshotError::NotNow)?);
            // An unreadable name may refer to any snapshot, so then everything is kept.
            for (_, record) in self.names.each()? {
                live.insert(record?.build);
            }
            live.extend(self.pins.all());
            failpoint::hit("agent.collect.read", None);
            Ok(live)
        };
        let collected = self.own.collect(live);
        failpoint::hit("agent.collect.removed", None);
        if let Err(error) = self.collect_images() {
            let error = error.to_report_string();
            tracing::warn!(error, "failed to remove unused files of images");
        }
        match collected {
            Ok(0) | Err(SnapshotError::NotNow) => {}
            Ok(bytes) => tracing::info!(bytes, "snapshots collected"),
            Err(error) => {
                let error = error.to_report_string();
                tracing::warn!(error, "failed to collect snapshots");
            }
        }
    }
}
