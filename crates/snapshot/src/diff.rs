//! Writer of the next generation: the pages that differ from the parent snapshot.

use std::{fs, io, io::Write as _, path::Path, path::PathBuf, sync::Arc};

use xxhash_rust::xxh3::Xxh3;

use crate::{
    Chain, ChainError, DiffFile, Header, HeaderError, Mapping, PAGE_BYTES, SnapshotId, Source,
    header::Summary, is_zero, mapping::merged,
};

/// Page size, in bytes, as a length of slices.
const PAGE: usize = 4096;

/// Number of bytes collected before they are written.
const BUFFER_BYTES: usize = 1024 * 1024;

/// Reason why a diff cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The file cannot be created or written.
    #[error("failed to write {path}")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error returned by the file system.
        #[source]
        source: io::Error,
    },
    /// The memory of the parent snapshot cannot be read.
    #[error("failed to read the memory of the parent snapshot")]
    Parent(#[from] ChainError),
    /// The caller's pages are not ascending, not whole, or outside of memory.
    #[error(
        "invalid pages of {len} bytes at offset {offset}: unordered, unaligned or outside of memory"
    )]
    Pages {
        /// Offset of the pages in memory, in bytes.
        offset: u64,
        /// Length of the pages, in bytes.
        len: u64,
    },
    /// The parent snapshot has another memory size.
    #[error("memory size is {now} bytes, but {parent} bytes in the parent snapshot")]
    Size {
        /// Memory size of the parent snapshot, in bytes.
        parent: u64,
        /// Memory size of the new snapshot, in bytes.
        now: u64,
    },
    /// The resulting header is invalid. This is a defect of this crate.
    #[error("failed to build a valid memory header")]
    Header(#[from] HeaderError),
}

/// Page counts of a diff.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiffStats {
    /// Pages passed to the writer.
    pub pages_seen: u64,
    /// Passed pages that equal the parent snapshot's pages.
    pub pages_equal: u64,
    /// Passed pages that changed to zeros.
    pub pages_zero: u64,
    /// Passed pages that were written to the file.
    pub pages_written: u64,
    /// Pages of [`DiffWriter::push_zeros`] that are data in the parent snapshot.
    pub pages_discarded: u64,
}

/// Writer of a diff file and of the header that describes the memory with it.
pub struct DiffWriter {
    path: PathBuf,
    file: fs::File,
    buffer: Vec<u8>,
    /// Length of the file including the buffer, in bytes.
    stored: u64,
    hash: Xxh3,
    build: SnapshotId,
    memory_size: u64,
    parent: Option<(Header, Arc<Chain>)>,
    before: Vec<u8>,
    /// Index of this file in the header's table.
    number: u32,
    changes: Vec<Mapping>,
    /// End of the last page, as an offset in memory.
    end: u64,
    stats: DiffStats,
}

impl DiffWriter {
    /// Creates the diff file at `path` for snapshot `build` of a memory of `memory_size` bytes.
    /// `parent` is the previous snapshot. Without a parent, pages that are not passed are zeros.
    ///
    /// # Errors
    /// Fails if the file cannot be created or the parent has another memory size.
    pub fn create(
        path: &Path,
        build: SnapshotId,
        memory_size: u64,
        parent: Option<(Header, Arc<Chain>)>,
    ) -> Result<Self, DiffError> {
        if let Some((header, _)) = &parent
            && header.memory_size() != memory_size
        {
            return Err(DiffError::Size {
                parent: header.memory_size(),
                now: memory_size,
            });
        }
        let file = fs::File::create_new(path).map_err(|source| DiffError::Write {
            path: path.to_owned(),
            source,
        })?;
        let number = parent
            .as_ref()
            .map_or(0, |(header, _)| header.diffs().len());
        Ok(Self {
            path: path.to_owned(),
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            stored: 0,
            hash: Xxh3::new(),
            build,
            memory_size,
            parent,
            before: Vec::new(),
            number: u32::try_from(number).unwrap_or(u32::MAX),
            changes: Vec::new(),
            end: 0,
            stats: DiffStats::default(),
        })
    }

    /// Appends whole pages at `offset`, which lies after all pages passed before.
    ///
    /// # Errors
    /// Fails if the pages are out of order, unaligned or out of range, or a file cannot be read or
    /// written.
    pub fn push(&mut self, offset: u64, pages: &[u8]) -> Result<(), DiffError> {
        self.advance(offset, pages.len() as u64)?;
        let mut before = std::mem::take(&mut self.before);
        if let Some((_, chain)) = &self.parent {
            before.resize(pages.len(), 0);
            chain.read_at(offset, &mut before)?;
        }
        for (index, page) in pages.chunks_exact(PAGE).enumerate() {
            let at = index * PAGE;
            let old = self.parent.is_some().then(|| &before[at..at + PAGE]);
            self.page(offset + at as u64, page, old)?;
        }
        self.before = before;
        Ok(())
    }

    /// Declares that `len` bytes at `offset`, after all pages passed before, are zeros. Reads and
    /// writes no page, whatever the length.
    ///
    /// # Errors
    /// Fails if the range is out of order, unaligned or out of range.
    pub fn push_zeros(&mut self, offset: u64, len: u64) -> Result<(), DiffError> {
        self.advance(offset, len)?;
        let Some((parent, _)) = &self.parent else {
            return Ok(());
        };
        let (mut at, end) = (offset, offset + len);
        let mut discarded = Vec::new();
        while at < end {
            let (source, left) = parent.lookup(at).ok_or(ChainError::OutOfRange(at))?;
            let part = left.min(end - at);
            if source != Source::Zero {
                discarded.push((at, part));
            }
            at += part;
        }
        for (at, len) in discarded {
            self.stats.pages_discarded += len / PAGE_BYTES;
            self.note(at, len, Source::Zero);
        }
        Ok(())
    }

    /// Checks that a range lies after all ranges passed before, and records its end.
    fn advance(&mut self, offset: u64, len: u64) -> Result<(), DiffError> {
        let end = offset.checked_add(len);
        let fits = offset >= self.end
            && offset.is_multiple_of(PAGE_BYTES)
            && len.is_multiple_of(PAGE_BYTES);
        match end {
            Some(end) if fits && end <= self.memory_size => self.end = end,
            _ => return Err(DiffError::Pages { offset, len }),
        }
        Ok(())
    }

    fn page(&mut self, offset: u64, page: &[u8], old: Option<&[u8]>) -> Result<(), DiffError> {
        self.stats.pages_seen += 1;
        if old == Some(page) {
            self.stats.pages_equal += 1;
            return Ok(());
        }
        if is_zero(page) {
            self.stats.pages_zero += 1;
            self.note(offset, PAGE_BYTES, Source::Zero);
            return Ok(());
        }
        let source = Source::Diff {
            file: self.number,
            offset: self.stored,
        };
        self.stats.pages_written += 1;
        self.stored += PAGE_BYTES;
        self.buffer.extend_from_slice(page);
        self.note(offset, PAGE_BYTES, source);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn note(&mut self, offset: u64, len: u64, source: Source) {
        match self.changes.last_mut() {
            Some(last) if last.end() == offset && last.source.advanced(last.len) == source => {
                last.len += len;
            }
            _ => self.changes.push(Mapping {
                offset,
                len,
                source,
            }),
        }
    }

    fn flush(&mut self) -> Result<(), DiffError> {
        self.hash.update(&self.buffer);
        let written = self.file.write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(|source| DiffError::Write {
            path: self.path.clone(),
            source,
        })
    }

    /// Writes the remaining pages and returns the header of the memory. The file is not flushed to
    /// disk yet.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn finish(mut self) -> Result<(Header, DiffStats), DiffError> {
        self.flush()?;
        let (base, generation, mut diffs, below) = match &self.parent {
            Some((parent, _)) => (
                parent.base(),
                parent.generation() + 1,
                parent.diffs().to_vec(),
                parent.mappings().to_vec(),
            ),
            None => {
                let zeros = Mapping {
                    offset: 0,
                    len: self.memory_size,
                    source: Source::Zero,
                };
                (self.build, 0, Vec::new(), vec![zeros])
            }
        };
        diffs.push(DiffFile {
            build: self.build,
            len: self.stored,
            checksum: self.hash.digest(),
        });
        let mut mappings = merged(&below, &self.changes);
        drop_unused(&mut diffs, &mut mappings);
        let summary = Summary {
            memory_size: self.memory_size,
            generation,
            build: self.build,
            base,
        };
        Ok((Header::new(summary, diffs, mappings)?, self.stats))
    }
}

/// Removes the files that no mapping references any more.
pub(crate) fn drop_unused(diffs: &mut Vec<DiffFile>, mappings: &mut [Mapping]) {
    let mut used = vec![false; diffs.len()];
    for mapping in mappings.iter() {
        if let Source::Diff { file, .. } = mapping.source
            && let Some(used) = used.get_mut(file as usize)
        {
            *used = true;
        }
    }
    let mut next = 0;
    let numbers: Vec<u32> = used
        .iter()
        .map(|used| {
            let number = next;
            next += u32::from(*used);
            number
        })
        .collect();
    let mut keep = used.iter();
    diffs.retain(|_| keep.next().copied().unwrap_or(false));
    for mapping in mappings {
        if let Source::Diff { file, .. } = &mut mapping.source {
            *file = numbers.get(*file as usize).copied().unwrap_or(*file);
        }
    }
}
