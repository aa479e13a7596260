//! Chain compaction: copies many diff files into one file with the same content.

use std::{fs::File, io::Write as _, path::Path};

use xxhash_rust::xxh3::Xxh3;

use crate::{Chain, DiffError, DiffFile, Header, SnapshotId, Source, header::Summary};

/// Size of one copy operation, in bytes.
const COPY_BYTES: u64 = 1024 * 1024;

/// Copies the memory of a chain into one file at `path`, named `build`.
///
/// Returns the header of a snapshot with the id `build`, the same memory and the same generation.
/// Pages in the files of `keep` are not copied, because other snapshots share these files. The new
/// file is flushed to disk.
///
/// # Errors
/// Fails if a file cannot be read or written.
pub fn merge_files(
    header: &Header,
    chain: &Chain,
    keep: &[SnapshotId],
    path: &Path,
    build: SnapshotId,
) -> Result<Header, DiffError> {
    let mut diffs: Vec<DiffFile> = header.diffs().to_vec();
    diffs.retain(|diff| keep.contains(&diff.build));
    let merged = u32::try_from(diffs.len()).unwrap_or(u32::MAX);
    let mut target = Target::create(path)?;
    let mut mappings = header.mappings().to_vec();
    for mapping in &mut mappings {
        let Source::Diff { file, offset } = mapping.source else {
            continue;
        };
        let of = header.diffs().get(file as usize).map(|diff| diff.build);
        let kept = diffs.iter().position(|diff| Some(diff.build) == of);
        mapping.source = match kept.and_then(|index| u32::try_from(index).ok()) {
            Some(file) => Source::Diff { file, offset },
            None => Source::Diff {
                file: merged,
                offset: target.copy(chain, mapping.offset, mapping.len)?,
            },
        };
    }
    crate::normalise(&mut mappings);
    diffs.push(target.finish(build)?);
    let summary = Summary {
        memory_size: header.memory_size(),
        generation: header.generation(),
        build,
        base: header.base(),
    };
    Ok(Header::new(summary, diffs, mappings)?)
}

/// Target file of the compaction.
struct Target<'a> {
    path: &'a Path,
    file: File,
    hash: Xxh3,
    len: u64,
    buffer: Vec<u8>,
}

impl<'a> Target<'a> {
    fn create(path: &'a Path) -> Result<Self, DiffError> {
        let file = File::create_new(path).map_err(failed(path))?;
        Ok(Self {
            path,
            file,
            hash: Xxh3::new(),
            len: 0,
            buffer: Vec::new(),
        })
    }

    /// Appends `len` bytes of memory from `offset`, and returns their offset in the file.
    fn copy(&mut self, chain: &Chain, offset: u64, len: u64) -> Result<u64, DiffError> {
        let start = self.len;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (end - at).min(COPY_BYTES);
            self.buffer.resize(usize::try_from(piece).unwrap_or(0), 0);
            chain.read_at(at, &mut self.buffer)?;
            self.hash.update(&self.buffer);
            self.file
                .write_all(&self.buffer)
                .map_err(failed(self.path))?;
            at += piece;
        }
        self.len += len;
        Ok(start)
    }

    fn finish(self, build: SnapshotId) -> Result<DiffFile, DiffError> {
        self.file.sync_all().map_err(failed(self.path))?;
        Ok(DiffFile {
            build,
            len: self.len,
            checksum: self.hash.digest(),
        })
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> DiffError + '_ {
    |source| DiffError::Write {
        path: path.to_owned(),
        source,
    }
}
