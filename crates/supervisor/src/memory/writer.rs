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

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use wrenn_pager::{PageRun, dirty};
use wrenn_snapshot::{Chain, DiffWriter, Header, SnapshotId, WorkingSet, layout};

use crate::SupervisorError;

/// Parameters of a memory snapshot.
pub(super) struct DiffJob {
    pub(super) staging: PathBuf,
    pub(super) build: SnapshotId,
    pub(super) pid: u32,
    /// Address of guest memory in the VMM.
    pub(super) base: u64,
    pub(super) bytes: u64,
    pub(super) parent: Option<(Header, Arc<Chain>)>,
    /// True if the VM was booted: its memory is anonymous, so a page that is not mapped is zero.
    pub(super) is_booted: bool,
    pub(super) working_set: Vec<PageRun>,
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
        let runs = dirty::scan(self.pid, self.base, self.bytes)?;
        let zeros = match self.is_booted {
            true => dirty::gaps(&runs, self.bytes),
            false => dirty::zeros(self.pid, self.base, self.bytes)?,
        };
        let path = self.staging.join(layout::MEMORY);
        let mut writer = DiffWriter::create(&path, self.build, self.bytes, self.parent)?;
        let mut zeros = zeros.into_iter().peekable();
        dirty::read_runs(self.pid, self.base, &runs, |offset, bytes| {
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
