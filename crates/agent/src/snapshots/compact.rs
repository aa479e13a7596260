//! Chain compaction: a snapshot that depends on many files gets a compacted copy that depends on
//! few.
//!
//! Nothing is changed in place. The copy is another snapshot with the same content. Sandboxes that
//! depend on the original may keep using it, and the original is collected once nothing refers to
//! it. A crash at any step therefore costs only the work done so far.
//!
//! The largest memory diff and the lowest disk layer are kept unchanged if they hold more than half
//! of all data, and most of that data is still in use. Such a file belongs to the template or is
//! shared by many sandboxes for another reason, and one copy per sandbox would cost more than the
//! chain does. A file that consists mostly of memory that the guest freed, or of disk space that it
//! trimmed, is merged with the others, which returns the space to the host
//! (`docs/decisions/0029`).

use std::{
    fs,
    path::{Path, PathBuf},
};

use wrenn_disk::{Layers, ToolJails};
use wrenn_snapshot::{
    Earlier, Header, Layer, Manifest, NewLayer, SnapshotId, StoreError, layout, merge_files,
    store::on_disk,
};
use wrenn_sys::failpoint;

use super::{LocatedSnapshot, Pins, SnapshotError, SnapshotRef, Snapshots};
use crate::disk;

/// Snapshots with more diff files or more disk layers than this are compacted.
const WORTHWHILE: usize = 8;

/// Above this depth no VM is started before the compacted copy exists.
const TOO_MANY: usize = 32;

/// Above this depth a running VM is replaced before its next snapshot. The VMM has a descriptor and
/// a cache of up to a megabyte for each disk layer; with 64 of them it stays within its limit of
/// memory.
const TOO_MANY_TO_CONTINUE: usize = 64;
/// Maximum depth of a compacted copy.
const COMPACTED: usize = 2;

/// Depth of a snapshot: the number of diff files or of disk layers, whichever is larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Depth(usize);

impl Depth {
    fn of(header: &Header, manifest: &Manifest) -> Self {
        Self(header.diffs().len().max(manifest.disk_layers.len()))
    }

    /// Depth of a VM with this number of disk layers.
    pub(crate) const fn of_layers(layers: usize) -> Self {
        Self(layers)
    }

    pub(crate) fn is_worthwhile(self) -> bool {
        self.0 > WORTHWHILE
    }

    /// True if a compacted copy depends on fewer files.
    pub(crate) fn is_reducible(self) -> bool {
        self.0 > COMPACTED
    }

    pub(crate) fn is_too_much(self) -> bool {
        self.0 > TOO_MANY
    }

    pub(crate) fn is_too_much_to_continue(self) -> bool {
        self.0 > TOO_MANY_TO_CONTINUE
    }
}

impl Snapshots {
    /// Returns the depth of a snapshot, or 0 if the snapshot cannot be read.
    pub(crate) fn depth(&self, pin: &SnapshotRef) -> Depth {
        let depth = || {
            let snapshot = self.own.snapshot(pin.id())?;
            Ok::<_, StoreError>(Depth::of(&snapshot.header()?, &snapshot.manifest))
        };
        depth().unwrap_or(Depth(0))
    }

    /// Makes the compacted copy of a snapshot. Reads and writes as much data as the snapshot's own
    /// files hold.
    pub(crate) async fn compact(&self, pin: &SnapshotRef) -> Result<SnapshotRef, SnapshotError> {
        // Its VMM need not be that of this host: the device state is not read.
        let located = self.locate_files(pin)?;
        let header = located.snapshot().header()?;
        let build = SnapshotId::random();
        let compacted_copy = Pins::pin(&self.pins, build);
        let stage = self.own.stage(build)?;
        let (dir, source) = (stage.path().to_owned(), located.clone());
        let merged =
            tokio::task::spawn_blocking(move || merge_memory(&header, &source, &dir, build));
        merged.await.map_err(std::io::Error::from)??;
        failpoint::hit("agent.merge.memory", None);
        let (disk_layers, new) = self
            .compact_disk(located.disk_layers(), located.manifest(), stage.path())
            .await?;
        failpoint::hit("agent.merge.disk", None);
        let known: Vec<_> = located.manifest().artifacts().collect();
        let mut manifest = Manifest {
            build,
            disk_layers: disk_layers.into_iter().map(Layer::unknown).collect(),
            ..located.manifest().clone()
        };
        self.image_files.describe(&mut manifest);
        let is_remote = self.remote.is_some();
        let publish = move || {
            let earlier = Earlier {
                known: &known,
                other: None,
                is_remote,
            };
            stage.publish(&manifest, &new, &earlier)
        };
        let published = tokio::task::spawn_blocking(publish);
        published.await.map_err(std::io::Error::from)??;
        failpoint::hit("agent.merge.published", None);
        Ok(compacted_copy)
    }

    /// Merges the disk layers into `dir`. Returns the names of the copy's layers, and the file of
    /// the new one if there is a new one.
    async fn compact_disk(
        &self,
        layers: Vec<PathBuf>,
        manifest: &Manifest,
        dir: &Path,
    ) -> Result<(Vec<SnapshotId>, Vec<NewLayer>), SnapshotError> {
        let mut names: Vec<_> = manifest.layers().collect();
        if names.len() <= COMPACTED {
            return Ok((names, Vec::new()));
        }
        let disk_mib = manifest.size.disk_mib;
        let keep = usize::from(is_lowest_kept(&self.tools, &layers, disk_mib).await?);
        let path = dir.join(disk::MERGED);
        let (kept, merged) = layers.split_at(keep);
        let layers = Layers {
            base: &manifest.base_disk.path,
            kept,
            merged,
            size_mib: disk_mib,
        };
        let merged = wrenn_disk::merge(&self.tools, layers, &path).await;
        merged.map_err(SnapshotError::Disk)?;
        names.truncate(keep);
        let build = SnapshotId::random();
        names.push(build);
        let layer = NewLayer {
            build,
            path,
            is_open: false,
        };
        Ok((names, vec![layer]))
    }
}

/// Writes the memory file and the header of the copy to `dir`.
fn merge_memory(
    header: &Header,
    source: &LocatedSnapshot,
    dir: &Path,
    build: SnapshotId,
) -> Result<(), SnapshotError> {
    let (chain, old) = (source.chain(header)?, &source.snapshot().dir);
    let keep: Vec<_> = kept_diff(header).into_iter().collect();
    let merged = merge_files(header, &chain, &keep, &dir.join(layout::MEMORY), build)?;
    fs::write(dir.join(layout::HEADER), merged.to_bytes())?;
    fs::hard_link(old.join(layout::DEVICE), dir.join(layout::DEVICE))?;
    match fs::copy(old.join(layout::WORKING_SET), dir.join(layout::WORKING_SET)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Returns the diff file that is kept unchanged, if there is one.
fn kept_diff(header: &Header) -> Option<SnapshotId> {
    let used = header.used_bytes();
    let all = used.iter().sum();
    let mut diffs = header.diffs().iter().zip(used);
    let kept = diffs.find(|(diff, used)| is_most(*used, all) && is_most(*used, diff.len));
    kept.map(|(diff, _)| diff.build)
}

/// True if the lowest layer of a disk is kept unchanged.
async fn is_lowest_kept(
    tools: &ToolJails,
    layers: &[PathBuf],
    disk_mib: u32,
) -> Result<bool, SnapshotError> {
    let sizes: Vec<u64> = layers.iter().map(|path| on_disk(path)).collect();
    let all = sizes.iter().sum();
    if !sizes.first().is_some_and(|lowest| is_most(*lowest, all)) {
        return Ok(false);
    }
    let visible = wrenn_disk::visible_bytes(tools, layers, disk_mib).await;
    Ok(is_most(visible.map_err(SnapshotError::Disk)?, all))
}

fn is_most(part: u64, all: u64) -> bool {
    part > all / 2
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Arc;

    use wrenn_snapshot::{Chain, DiffWriter};

    use super::*;

    const PAGE: u64 = 4096;
    const BYTES: u64 = 100 * PAGE;

    #[test]
    fn a_diff_is_kept_if_it_is_most_of_the_memory_and_most_of_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        // Pages written to the first diff, pages freed later, pages written to the second diff.
        for (first, freed, second, is_kept) in [
            (40, 0, 10, true),
            (40, 10, 10, true),
            (40, 25, 10, false),
            (40, 0, 50, false),
            (40, 40, 1, false),
        ] {
            let mut parent: Option<(Header, Arc<Chain>)> = None;
            let mut builds = Vec::new();
            for generation in 0..2 {
                let build = SnapshotId::random();
                let path = dir.path().join(format!("{build}.mem"));
                let mut writer = DiffWriter::create(&path, build, BYTES, parent).unwrap();
                let (offset, pages) = match generation {
                    0 => (0, first),
                    _ => (50 * PAGE, second),
                };
                if generation == 1 && freed > 0 {
                    writer.push_zeros(0, freed * PAGE).unwrap();
                }
                let len = usize::try_from(pages * PAGE).unwrap();
                writer.push(offset, &vec![7; len]).unwrap();
                let (header, _) = writer.finish().unwrap();
                let chain = Chain::open(&[dir.path().to_owned()], &header).unwrap();
                builds.push(build);
                parent = Some((header, Arc::new(chain)));
            }
            let (header, _) = parent.unwrap();
            let kept = kept_diff(&header) == Some(builds[0]);
            assert_eq!(kept, is_kept, "{first} {freed} {second}");
        }
    }
}
