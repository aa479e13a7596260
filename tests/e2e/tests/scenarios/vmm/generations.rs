//! Memory and disk across pauses: a first snapshot, a diff, and pages that became zero.

use std::fs;

use anyhow::{Context as _, Result};
use wrenn_e2e::{Service, vmms::Vmm};

use super::witness::{self, Memory};

/// Maximum size of a diff of a guest that changed 40 pages, in bytes. The guest's kernel and agent
/// change pages as well. A snapshot of the whole memory is larger by far.
const MAX_DIFF: u64 = 8 << 20;

pub(super) async fn survive(vmm: &Vmm) -> Result<()> {
    let service = vmm.service().await?;
    let sandbox = vmm.restore(&service).await?;
    let id = sandbox.id();
    witness::start(&service, &sandbox).await?;
    let mut memory = Memory::new();
    memory.fill(&service, id, 0, 1024, 1).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    vmm.ensure_used(id)?;
    memory.check(&service, id).await?;

    // The second generation changes some pages, in both files, too.
    memory.fill(&service, id, 20, 20, 2).await?;
    memory.fill(&service, id, 500, 20, 2).await?;
    sandbox.pause().await?;
    let bytes = last_diff(&service)?;
    assert!((40 * 4096..MAX_DIFF).contains(&bytes), "{bytes} bytes");
    sandbox.resume().await?;
    memory.check(&service, id).await?;

    // The third one clears pages of both earlier generations.
    memory.zero(&service, id, 30, 20).await?;
    memory.zero(&service, id, 510, 100).await?;
    sandbox.pause().await?;
    sandbox.resume().await?;
    for pages in ["30/20", "510/100"] {
        let is_zero = witness::ask(&service, id, &format!("is_zero/{pages}")).await?;
        assert_eq!(is_zero, "True", "pages {pages}");
    }
    memory.check(&service, id).await?;
    sandbox.destroy().await
}

/// Returns the size of the memory file that was written last.
fn last_diff(service: &Service) -> Result<u64> {
    let files = fs::read_dir(service.dir().join("snapshots/memory"))?.flatten();
    let files = files.filter_map(|file| file.metadata().ok());
    let newest = files.max_by_key(|meta| meta.modified().ok());
    Ok(newest.context("no memory file")?.len())
}
