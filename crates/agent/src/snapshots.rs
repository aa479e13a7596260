//! The frozen moments of this host: where they are, what they are called, and who stands on them.
//!
//! Owns the data directory's store of snapshots, the names that users gave to some of them, and the memory of those that
//! machines run from. The images' directory has a store too, with the booted guests of the templates; it is only read here.
//!
//! A moment stays as long as a name or a [`PinnedBuild`] stands for it; [`Snapshots::collect`] removes the rest. Whatever a
//! sandbox may be brought back from, or runs on, is pinned by its owner.

mod compact;
mod memory;
mod moment;
mod names;
mod pins;
mod verify;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use wrenn_proto::{
    TemplateName,
    supervise::{Accel, SupervisorSpec},
};
use wrenn_snapshot::{Chain, ChainError, DiffError, Manifest, Staging, Store, StoreError};

pub(crate) use memory::ImageMemory;
use memory::Memories;
pub(crate) use moment::Moment;
pub(crate) use names::NamedMoment;
use names::{NameError, Names};
pub(crate) use pins::PinnedBuild;
use pins::Pins;
use verify::Verified;
pub(crate) use wrenn_snapshot::BuildId;

use crate::{Template, disk::DiskError};

/// Why a snapshot could not be stored, found or named.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SnapshotError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Name(#[from] NameError),
    /// A file of its memory is missing or damaged.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Its files could not be merged.
    #[error("could not merge memory files")]
    Merge(#[from] DiffError),
    /// The layers of its disk could not be merged.
    #[error("could not merge layers of the disk")]
    Disk(#[source] DiskError),
    /// It is not known who stands on what.
    #[error("nothing is collected now")]
    NotNow,
    /// A file could not be written.
    #[error("could not write a snapshot")]
    Io(#[from] std::io::Error),
    /// The memory of an image could not be made.
    #[error("could not make the memory of a snapshot")]
    Memory(#[source] std::io::Error),
    /// Its machine state fits this host no more.
    #[error(
        "the snapshot was made with {made} ({made_accel}), this host has {here} ({here_accel})"
    )]
    OtherVmm {
        made: String,
        made_accel: Accel,
        here: String,
        here_accel: Accel,
    },
}

impl SnapshotError {
    /// Whether the host's disk is full.
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

/// A snapshot in the making, pinned.
pub(crate) struct Stage {
    staging: Staging,
    pin: PinnedBuild,
}

impl Stage {
    pub(crate) fn path(&self) -> &Path {
        self.staging.path()
    }

    pub(crate) fn build(&self) -> String {
        self.staging.build().to_string()
    }
}

/// All snapshots of this host.
pub(crate) struct Snapshots {
    own: Store,
    images: Store,
    names: Names,
    image_names: Names,
    pins: Arc<Pins>,
    memories: Memories,
    verified: Verified,
    vmm: String,
    accel: Accel,
}

impl Snapshots {
    /// Those in `root`, and, to read, those in the images' directory. `vmm` is the kind and version of the VMM here.
    pub(crate) fn open(
        root: &Path,
        images: &Path,
        vmm: String,
        accel: Accel,
    ) -> Result<Self, SnapshotError> {
        let images = images.join("snapshots");
        Ok(Self {
            own: Store::open(root)?,
            images: Store::at(&images),
            names: Names::open(&root.join("names"))?,
            image_names: Names::at(&images.join("names")),
            pins: Arc::default(),
            memories: Memories::default(),
            verified: Verified::default(),
            vmm,
            accel,
        })
    }

    /// Begins a snapshot.
    pub(crate) fn stage(&self) -> Result<Stage, SnapshotError> {
        let build = BuildId::random();
        // Before its directory is there: nobody may collect it.
        let pin = Pins::pin(&self.pins, build);
        let staging = self.own.stage(build)?;
        Ok(Stage { staging, pin })
    }

    /// Makes a snapshot whole and puts it into its place. `layers` are the frozen files of its disk, the lowest first; `vmm` is the
    /// VMM that saved it, which may be older than this agent's. May block for as long as its files take to be flushed.
    pub(crate) fn publish(
        &self,
        stage: Stage,
        spec: &SupervisorSpec,
        layers: &[PathBuf],
        vmm: &str,
    ) -> Result<PinnedBuild, SnapshotError> {
        let Stage { staging, pin } = stage;
        let mut names = Vec::new();
        let mut new = Vec::new();
        for path in layers {
            let build = self.stored_layer(path).unwrap_or_else(BuildId::random);
            names.push(build);
            // One of the images' store is linked too: this store must not depend on what is removed there.
            if self.own.layer(build) != *path {
                new.push((build, path.clone()));
            }
        }
        let manifest = Manifest {
            version: 1,
            build: staging.build(),
            created_unix_ms: crate::sandbox::now_unix_ms(),
            vmm: vmm.to_owned(),
            accel: spec.accel,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            kernel: spec.kernel.clone(),
            initrd: spec.initrd.clone(),
            base_disk: spec.base_disk.clone(),
            disk_layers: names,
            template: spec.template.to_string(),
            default_user: spec.default_user.clone(),
            guest_token: spec.envd_token.clone(),
            envs: spec.envs.clone(),
            device_checksum: None,
        };
        // This store must not depend on what is removed from the images' either.
        staging.publish(&manifest, &new, Some(&self.images))?;
        Ok(pin)
    }

    /// The build id of a layer that is in a store already.
    fn stored_layer(&self, path: &Path) -> Option<BuildId> {
        let build: BuildId = path.file_stem()?.to_str()?.parse().ok()?;
        let stored = [&self.own, &self.images].map(|store| store.layer(build));
        stored.iter().any(|known| known == path).then_some(build)
    }

    /// Where diff files of new snapshots are.
    pub(crate) fn memory_dir(&self) -> PathBuf {
        self.own.memory_dir()
    }

    /// Kind and version of the VMM here.
    pub(crate) fn vmm(&self) -> &str {
        &self.vmm
    }

    /// Keeps a snapshot, if it is there.
    pub(crate) fn pin(&self, build: &str) -> Option<PinnedBuild> {
        let build = build.parse().ok()?;
        let pin = Pins::pin(&self.pins, build);
        self.find(build).ok().map(|_| pin)
    }

    /// All that is needed to bring a machine back from a snapshot.
    pub(crate) fn moment(&self, pin: &PinnedBuild) -> Result<Moment, SnapshotError> {
        let snapshot = self.find(pin.id())?;
        let manifest = &snapshot.manifest;
        if manifest.vmm != self.vmm || manifest.accel != self.accel {
            return Err(SnapshotError::OtherVmm {
                made: manifest.vmm.clone(),
                made_accel: manifest.accel,
                here: self.vmm.clone(),
                here_accel: self.accel,
            });
        }
        let stores = self.stores_of(&snapshot);
        let layers = self.layers(&stores, manifest)?;
        let memory = stores.iter().map(|store| store.memory_dir()).collect();
        Ok(Moment::new(snapshot, layers, memory, pin.clone()))
    }

    /// Frozen layers of a snapshot's disk, the lowest first. Nothing else of it need be there, or fit this host.
    pub(crate) fn disk_layers(&self, pin: &PinnedBuild) -> Result<Vec<PathBuf>, SnapshotError> {
        let snapshot = self.find(pin.id())?;
        self.layers(&self.stores_of(&snapshot), &snapshot.manifest)
    }

    /// Where the files of a snapshot are. One of the images stands on the images' files alone: what this store has of them belongs
    /// to snapshots of its own, and goes with the last of those.
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
        let layers = manifest.disk_layers.iter();
        layers.map(|build| self.layer(stores, *build)).collect()
    }

    /// Compares the files of a moment with their checksums. Blocks for as long as those take to be read which were not before.
    pub(crate) fn verify(&self, moment: &Moment) -> Result<(), SnapshotError> {
        moment.snapshot().verify_devices()?;
        let header = moment.snapshot().header()?;
        let chain = Chain::open(&moment.restore(false).memory, &header)?;
        Ok(self.verified.verify(&chain)?)
    }

    fn layer(&self, stores: &[&Store], build: BuildId) -> Result<PathBuf, SnapshotError> {
        let mut paths = stores.iter().map(|store| store.layer(build));
        let Some(path) = paths.find(|path| path.exists()) else {
            return Err(StoreError::MissingLayer(self.own.layer(build)).into());
        };
        if path == self.own.layer(build) {
            moment::protect_layer(&path)?;
        }
        Ok(path)
    }

    fn find(&self, build: BuildId) -> Result<wrenn_snapshot::Snapshot, SnapshotError> {
        match self.own.snapshot(build) {
            Err(StoreError::NotFound(_)) => Ok(self.images.snapshot(build)?),
            other => Ok(other?),
        }
    }

    /// The token that the guest agent in a snapshot asks of its clients.
    pub(crate) fn guest_token(&self, pin: &PinnedBuild) -> Option<String> {
        self.find(pin.id()).ok().map(|s| s.manifest.guest_token)
    }

    /// The memory of a snapshot: one for all machines that run from it.
    pub(crate) fn memory(&self, moment: &Moment) -> Result<Arc<ImageMemory>, SnapshotError> {
        let made = self
            .memories
            .get_or_make(moment.pin().id(), moment.manifest().memory_mib);
        made.map_err(SnapshotError::Memory)
    }

    /// Takes the memory of a snapshot back from a supervisor that an earlier agent started.
    pub(crate) fn adopt_memory(
        &self,
        pin: &PinnedBuild,
        fd: std::os::fd::OwnedFd,
    ) -> Arc<ImageMemory> {
        self.memories.adopt(pin.id(), fd)
    }

    /// The snapshot of a name that a user gave.
    pub(crate) fn named(&self, name: &TemplateName) -> Result<Option<PinnedBuild>, SnapshotError> {
        self.pinned(&self.names, name)
    }

    /// The snapshot that a name stands for, kept. What the name stood for when it was read may be gone before it is kept, if the
    /// name was given to another in between.
    fn pinned(
        &self,
        names: &Names,
        name: &TemplateName,
    ) -> Result<Option<PinnedBuild>, SnapshotError> {
        let mut pin: Option<PinnedBuild> = None;
        loop {
            let build = names.get(name)?.map(|record| record.build);
            if build == pin.as_ref().map(PinnedBuild::id) {
                return Ok(pin);
            }
            pin = build.map(|build| Pins::pin(&self.pins, build));
        }
    }

    /// Keeps all that there is.
    pub(crate) fn pin_all(&self) -> Result<Vec<PinnedBuild>, SnapshotError> {
        let all = self.own.list()?.into_iter();
        Ok(all.map(|build| Pins::pin(&self.pins, build)).collect())
    }

    /// Whether a user gave this name, also where what it stands for cannot be read.
    pub(crate) fn has_name(&self, name: &TemplateName) -> bool {
        self.names.is_given(name)
    }

    /// Gives a name to a snapshot.
    pub(crate) fn name(
        &self,
        name: &TemplateName,
        pin: &PinnedBuild,
        overwrite: bool,
    ) -> Result<NamedMoment, SnapshotError> {
        self.names.put(name, pin.id(), overwrite)?;
        self.describe(name, pin.id())
    }

    /// Takes a name away; what stands on the snapshot stays whole. False if there is none.
    pub(crate) fn unname(&self, name: &TemplateName) -> Result<bool, SnapshotError> {
        Ok(self.names.remove(name)?)
    }

    /// All snapshots that have names. Of one that is damaged nothing but its name is known: what is wrong is told to who uses it.
    pub(crate) fn all_named(&self) -> Result<Vec<NamedMoment>, SnapshotError> {
        let mut all = Vec::new();
        for (name, record) in self.names.each()? {
            let record = record.map_err(SnapshotError::from);
            match record.and_then(|record| self.describe(&name, record.build)) {
                Ok(named) => all.push(named),
                Err(error) => {
                    let error = crate::sandbox::error::chain(&error);
                    tracing::warn!(%name, error, "a snapshot cannot be read");
                    all.push(NamedMoment {
                        name,
                        manifest: None,
                        size_bytes: 0,
                        generation: 0,
                    });
                }
            }
        }
        Ok(all)
    }

    fn describe(&self, name: &TemplateName, build: BuildId) -> Result<NamedMoment, SnapshotError> {
        let snapshot = self.find(build)?;
        Ok(NamedMoment {
            name: name.clone(),
            size_bytes: self.own.size(build)?,
            generation: snapshot.header()?.generation(),
            manifest: Some(snapshot.manifest),
        })
    }

    /// The booted guest of a template, if there is one and it fits this host.
    pub(crate) fn warm(&self, template: &Template) -> Option<Moment> {
        let name = warm_name(&template.name, self.accel).ok()?;
        let pin = self.pinned(&self.image_names, &name).ok().flatten()?;
        let moment = self.moment(&pin).ok()?;
        let manifest = moment.manifest();
        let fits = manifest.kernel == template.kernel
            && manifest.initrd == template.initrd
            && manifest.base_disk == template.rootfs
            && manifest.vcpus == template.vcpus
            && manifest.memory_mib == template.memory_mib;
        fits.then_some(moment)
    }

    /// Removes what nobody stands on. Blocks for as long as that takes. `kept` says, after the pins were read, what is kept beside
    /// them; with `None` nothing is removed.
    pub(crate) fn collect(&self, kept: impl FnOnce() -> Option<Vec<BuildId>>) {
        let live = || -> Result<_, SnapshotError> {
            // Pins first: what is named and then unpinned is in the list of names by now, or was before. And last: what was
            // named when it was pinned may have lost its name since.
            let mut live = self.pins.all();
            live.extend(kept().ok_or(SnapshotError::NotNow)?);
            // With a name that cannot be read all stays: it may be anything's.
            for (_, record) in self.names.each()? {
                live.insert(record?.build);
            }
            live.extend(self.pins.all());
            Ok(live)
        };
        match self.own.collect(live) {
            Ok(0) | Err(SnapshotError::NotNow) => {}
            Ok(bytes) => tracing::info!(bytes, "snapshots were collected"),
            Err(error) => {
                let error = crate::sandbox::error::chain(&error);
                tracing::warn!(error, "snapshots could not be collected");
            }
        }
    }
}

/// The name of a template's booted guest among the images.
pub(crate) fn warm_name(template: &TemplateName, accel: Accel) -> Result<TemplateName, String> {
    let name = format!("warm-{template}-{accel}");
    name.parse().map_err(|_| name)
}
