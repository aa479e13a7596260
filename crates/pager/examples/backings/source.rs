//! Content of the snapshot: a chain of two compact files, like memory diffs of `wrenn-snapshot`.
//!
//! The first 384 MiB of guest memory are data, the rest is zeros. `base.mem` has all of the data.
//! `diff.mem` has newer content for one block of 64 KiB in 16. Neither file has a place for zeros.
//! The first word of a page of data is the number of the page, counted from 1.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::fs::Advice;
use wrenn_pager::{Extent, MemorySource, SourceError};

pub(crate) const PAGE: usize = 4096;
pub(crate) const MEMORY_BYTES: usize = 512 << 20;
pub(crate) const DATA_BYTES: usize = 384 << 20;
const BLOCK: usize = 64 << 10;
/// One block in this many is in the second file.
const CHANGED: usize = 16;
const CHANGED_AT: usize = 7;

/// Returns the first word of a page.
pub(crate) fn first_word(page: usize) -> u64 {
    if page * PAGE < DATA_BYTES {
        page as u64 + 1
    } else {
        0
    }
}

/// Paths of the files of a run.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
}

impl Files {
    pub(crate) fn chain(&self) -> [PathBuf; 2] {
        [self.dir.join("base.mem"), self.dir.join("diff.mem")]
    }

    /// Returns the path of the complete memory.
    pub(crate) fn complete(&self) -> PathBuf {
        self.dir.join("memory")
    }

    /// Writes the chain.
    pub(crate) fn create(&self) -> io::Result<()> {
        let [base, diff] = self.chain().map(File::create);
        let (mut base, mut diff) = (BufWriter::new(base?), BufWriter::new(diff?));
        let mut page = [0_u64; PAGE / 8];
        for number in 0..DATA_BYTES / PAGE {
            let is_changed = is_changed(number * PAGE / BLOCK);
            for file in [Some(&mut base), is_changed.then_some(&mut diff)] {
                let Some(file) = file else { continue };
                let mut word = first_word(number);
                for place in &mut page {
                    *place = word;
                    word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                }
                for word in page {
                    file.write_all(&word.to_le_bytes())?;
                }
            }
        }
        for file in [base, diff] {
            file.into_inner()?.sync_all()?;
        }
        Ok(())
    }

    /// Removes the files from the page cache, or reads them into it.
    pub(crate) fn set_cached(&self, cached: bool) -> io::Result<()> {
        for path in self.chain().into_iter().chain([self.complete()]) {
            let file = File::open(&path)?;
            if cached {
                io::copy(
                    &mut io::BufReader::with_capacity(1 << 20, file),
                    &mut io::sink(),
                )?;
            } else {
                rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
            }
        }
        Ok(())
    }
}

fn is_changed(block: usize) -> bool {
    block % CHANGED == CHANGED_AT
}

/// Behavior of the source, set from outside.
#[derive(Default)]
pub(crate) struct Mode(AtomicU8);

impl Mode {
    /// Makes reads fail.
    pub(crate) fn fail(&self) {
        self.0.store(1, Ordering::Relaxed);
    }

    /// Makes reads wait forever, as for an object store that does not answer.
    pub(crate) fn stall(&self) {
        self.0.store(2, Ordering::Relaxed);
    }

    fn check(&self, offset: u64) -> Result<(), SourceError> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            1 => Err(failed(offset, io::ErrorKind::Other.into())),
            _ => loop {
                thread::sleep(Duration::from_secs(1));
            },
        }
    }
}

struct Run {
    offset: usize,
    len: usize,
    /// Index of the file and offset in it. Zeros have none.
    place: Option<(usize, usize)>,
}

/// Open chain.
pub(crate) struct ChainSource {
    files: Vec<File>,
    runs: Vec<Run>,
    mode: Arc<Mode>,
}

impl ChainSource {
    pub(crate) fn open(dir: &Path, mode: Arc<Mode>) -> io::Result<Self> {
        let dir = dir.to_owned();
        let files = Files { dir }.chain().into_iter().map(fs::File::open);
        let mut runs: Vec<Run> = Vec::new();
        let mut changed = 0;
        for block in 0..DATA_BYTES / BLOCK {
            let offset = block * BLOCK;
            let place = if is_changed(block) {
                changed += BLOCK;
                (1, changed - BLOCK)
            } else {
                (0, offset)
            };
            match runs.last_mut() {
                Some(Run { len, place, .. })
                    if !is_changed(block) && place.is_some_and(|p| p.0 == 0) =>
                {
                    *len += BLOCK;
                }
                _ => runs.push(Run {
                    offset,
                    len: BLOCK,
                    place: Some(place),
                }),
            }
        }
        let len = MEMORY_BYTES - DATA_BYTES;
        runs.push(Run {
            offset: DATA_BYTES,
            len,
            place: None,
        });
        Ok(Self {
            files: files.collect::<io::Result<_>>()?,
            runs,
            mode,
        })
    }

    /// Returns the run that contains an offset, and the position in it.
    fn lookup(&self, offset: u64) -> Result<(&Run, usize), SourceError> {
        let out_of_range = || SourceError::OutOfRange {
            offset,
            len: 1,
            size: self.len(),
        };
        let at = usize::try_from(offset).map_err(|_| out_of_range())?;
        let behind = self.runs.partition_point(|run| run.offset <= at);
        let run = self.runs.get(behind - 1).ok_or_else(out_of_range)?;
        if at - run.offset >= run.len {
            return Err(out_of_range());
        }
        Ok((run, at - run.offset))
    }
}

impl MemorySource for ChainSource {
    fn len(&self) -> u64 {
        MEMORY_BYTES as u64
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let (run, at) = self.lookup(offset)?;
        let len = (run.len - at) as u64;
        Ok(Extent {
            zero: run.place.is_none(),
            len,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.mode.check(offset)?;
        let mut done = 0;
        while done < buf.len() {
            let (run, at) = self.lookup(offset + done as u64)?;
            let len = (run.len - at).min(buf.len() - done);
            let part = &mut buf[done..done + len];
            match run.place {
                None => part.fill(0),
                Some((file, start)) => {
                    let read = self.files[file].read_exact_at(part, (start + at) as u64);
                    read.map_err(|error| failed(offset, error))?;
                }
            }
            done += len;
        }
        Ok(())
    }
}

fn failed(offset: u64, error: io::Error) -> SourceError {
    SourceError::Other {
        offset,
        source: Box::new(error),
    }
}
