//! Memory source for the page server: a chain of diff files.

use std::sync::Arc;

use wrenn_pager::{Extent, MemorySource, SourceError};
use wrenn_snapshot::Chain;

/// Guest memory of a snapshot.
pub(super) struct ChainSource {
    chain: Arc<Chain>,
    bytes: u64,
}

impl ChainSource {
    pub(super) fn new(chain: Arc<Chain>, bytes: u64) -> Self {
        Self { chain, bytes }
    }
}

impl MemorySource for ChainSource {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let (zero, len) = self.chain.extent(offset).map_err(failed(offset))?;
        Ok(Extent { zero, len })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        self.chain.read_at(offset, buf).map_err(failed(offset))
    }
}

fn failed<E: std::error::Error + Send + Sync + 'static>(
    offset: u64,
) -> impl FnOnce(E) -> SourceError {
    move |error| SourceError::Other {
        offset,
        source: Box::new(error),
    }
}
