//! Writes the memory of a paused VM.
//!
//! | page of the VM                  | VM was restored           | VM was booted             |
//! |---------------------------------|---------------------------|---------------------------|
//! | anonymous                       | written if it differs     | written if it differs     |
//! |                                 | from the parent snapshot  | from the parent snapshot  |
//! | mapped to the zero page         | zero: a page of zeros of  | zero                      |
//! |                                 | the snapshot, or one that |                           |
//! |                                 | the guest gave back       |                           |
//! | mapped to the snapshot's memory | unchanged                 | -                         |
//! | not mapped                      | unchanged: never touched  | zero: never touched, or   |
//! |                                 |                           | given back by the guest   |
//!
//! If the VMM wrote the pages to a file:
//!
//! | page of the file                | VM was restored           | VM was booted             |
//! |---------------------------------|---------------------------|---------------------------|
//! | data                            | written if it differs     | written if it differs     |
//! |                                 | from the parent snapshot  | from the parent snapshot  |
//! | hole                            | unchanged since the start | zero: never touched       |

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use wrenn_pager::{PageRun, dirty, sparse};
use wrenn_snapshot::{Chain, DiffWriter, Header, SnapshotId, WorkingSet, layout};

use crate::SupervisorError;

/// Parameters of a memory snapshot.
pub(super) struct DiffJob {
    pub(super) staging: PathBuf,
    pub(super) build: SnapshotId,
    pub(super) memory: VmMemory,
    pub(super) bytes: u64,
    pub(super) parent: Option<(Header, Arc<Chain>)>,
    /// True if the VM was booted: a page that is not mapped, or a hole, is zero.
    pub(super) is_booted: bool,
    pub(super) working_set: Vec<PageRun>,
}

/// Place of the memory of a VM.
pub(super) enum VmMemory {
    /// Mapping of a VMM.
    Process {
        /// Process ID of the VMM.
        pid: u32,
        /// Address of guest memory in the VMM.
        base: u64,
    },
    /// File with the pages that the VM changed.
    File(File),
}

impl VmMemory {
    /// Returns the pages that the VM changed.
    fn changed(&self, bytes: u64) -> Result<Vec<PageRun>, SupervisorError> {
        Ok(match self {
            Self::Process { pid, base } => dirty::scan(*pid, *base, bytes)?,
            Self::File(file) => sparse::scan(file, bytes)?,
        })
    }

    /// Returns the pages that became zero, if the VM was restored.
    fn zeros(&self, bytes: u64) -> Result<Vec<PageRun>, SupervisorError> {
        Ok(match self {
            Self::Process { pid, base } => dirty::zeros(*pid, *base, bytes)?,
            Self::File(_) => Vec::new(),
        })
    }

    fn read(
        &self,
        runs: &[PageRun],
        take: impl FnMut(u64, &[u8]) -> Result<(), SupervisorError>,
    ) -> Result<(), SupervisorError> {
        match self {
            Self::Process { pid, base } => dirty::read_runs(*pid, *base, runs, take),
            Self::File(file) => sparse::read_runs(file, runs, take),
        }
    }
}

/// Result of a memory snapshot.
pub(crate) struct Written {
    pub(crate) header: Header,
    pub(crate) pages_seen: u64,
    pub(crate) pages_written: u64,
}

impl DiffJob {
    /// Reads the pages that the VM has changed, and writes those that differ from the parent
    /// snapshot.
    pub(super) fn run(self) -> Result<Written, SupervisorError> {
        let runs = self.memory.changed(self.bytes)?;
        let zeros = match self.is_booted {
            true => dirty::gaps(&runs, self.bytes),
            false => self.memory.zeros(self.bytes)?,
        };
        let path = self.staging.join(layout::MEMORY);
        let mut writer = DiffWriter::create(&path, self.build, self.bytes, self.parent)?;
        let mut zeros = zeros.into_iter().peekable();
        self.memory.read(&runs, |offset, bytes| {
            while let Some(run) = zeros.next_if(|run| run.offset < offset) {
                writer.push_zeros(run.offset, run.len)?;
            }
            writer.push(offset, bytes).map_err(SupervisorError::from)
        })?;
        for run in zeros {
            writer.push_zeros(run.offset, run.len)?;
        }
        let (header, stats) = writer.finish()?;
        write(&self.staging.join(layout::HEADER), &header.to_bytes())?;
        if !self.working_set.is_empty() {
            let path = self.staging.join(layout::WORKING_SET);
            write_working_set(&path, &self.working_set)
                .map_err(SupervisorError::io("write the working set"))?;
        }
        Ok(Written {
            header,
            pages_seen: stats.pages_seen,
            pages_written: stats.pages_written,
        })
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), SupervisorError> {
    fs::write(path, bytes).map_err(|source| SupervisorError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Writes a working set. Several supervisors may do this at the same time.
pub(super) fn write_working_set(path: &Path, runs: &[PageRun]) -> io::Result<()> {
    let set = WorkingSet::from_runs(runs.iter().map(|run| (run.offset, run.len)));
    wrenn_durable::replace(path, &set.to_bytes(), 0o644)
}

/// Converts a working set to the runs that the page server expects.
pub(super) fn runs_of(set: &WorkingSet) -> Vec<PageRun> {
    set.runs()
        .map(|(offset, len)| PageRun { offset, len })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const PAGE: u64 = 4096;
    const BYTES: u64 = 16 * PAGE;

    /// Returns a file in which a VMM wrote pages with the given content.
    fn saved(pages: &[(u64, u8)]) -> VmMemory {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(BYTES).expect("sparse");
        for (page, content) in pages {
            let page_bytes = [*content; 4096];
            file.write_all_at(&page_bytes, page * PAGE)
                .expect("written");
        }
        VmMemory::File(file)
    }

    /// Writes a snapshot and publishes its memory in `dir`.
    fn written(
        dir: &Path,
        memory: VmMemory,
        parent: Option<(Header, Arc<Chain>)>,
        is_booted: bool,
    ) -> Written {
        let build = SnapshotId::random();
        let job = DiffJob {
            staging: dir.to_owned(),
            build,
            memory,
            bytes: BYTES,
            parent,
            is_booted,
            working_set: Vec::new(),
        };
        let written = job.run().expect("written");
        let published = dir.join(format!("{build}.mem"));
        fs::rename(dir.join(layout::MEMORY), published).expect("published");
        written
    }

    fn open(dir: &Path, header: &Header) -> Arc<Chain> {
        Arc::new(Chain::open(&[dir.to_owned()], header).expect("opened"))
    }

    /// Returns the first byte of each page.
    fn content(dir: &Path, header: &Header) -> Vec<u8> {
        let mut memory = vec![0; usize::try_from(BYTES).expect("small")];
        let chain = open(dir, header);
        chain.read_at(0, &mut memory).expect("read");
        memory.chunks(4096).map(|page| page[0]).collect()
    }

    fn expected(pages: &[(usize, u8)]) -> Vec<u8> {
        let mut all = vec![0; 16];
        for (page, content) in pages {
            all[*page] = *content;
        }
        all
    }

    #[test]
    fn holes_keep_the_content_of_the_parent_and_zeros_replace_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let memory = saved(&[(1, 0xa1), (2, 0xa2), (3, 0)]);
        let booted = written(dir.path(), memory, None, true);
        let after_boot = expected(&[(1, 0xa1), (2, 0xa2)]);
        assert_eq!(content(dir.path(), &booted.header), after_boot);
        // The restored VM zeroes page 1, writes page 5, and leaves page 2 alone.
        let chain = open(dir.path(), &booted.header);
        let parent = Some((booted.header, chain));
        let memory = saved(&[(1, 0), (5, 0xb5)]);
        let restored = written(dir.path(), memory, parent, false);
        let after_restore = expected(&[(2, 0xa2), (5, 0xb5)]);
        assert_eq!(content(dir.path(), &restored.header), after_restore);
    }

    #[test]
    fn a_hole_of_a_booted_vm_is_zero_in_every_generation() {
        let dir = tempfile::tempdir().expect("a directory");
        let once = written(dir.path(), saved(&[(1, 0xa1)]), None, true);
        let chain = open(dir.path(), &once.header);
        let parent = Some((once.header, chain));
        // The file still has the pages of the snapshot before.
        let memory = saved(&[(1, 0xa1), (4, 0xa4)]);
        let again = written(dir.path(), memory, parent, true);
        let pages = expected(&[(1, 0xa1), (4, 0xa4)]);
        assert_eq!(content(dir.path(), &again.header), pages);
        // Only the page that differs from the parent is written.
        assert_eq!((again.pages_seen, again.pages_written), (2, 1));
    }

    #[test]
    fn a_saved_file_of_another_size_is_an_error() {
        let VmMemory::File(file) = saved(&[(1, 1)]) else {
            panic!("not a file");
        };
        file.set_len(BYTES - PAGE).expect("possible");
        let memory = VmMemory::File(file);
        let error = memory.changed(BYTES).expect_err("too short");
        assert!(matches!(error, SupervisorError::SavedMemory(_)), "{error}");
    }
}
