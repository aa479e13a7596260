//! Artifact of an object store that is read by chunks.

use std::{collections::VecDeque, io, sync::Arc};

use parking_lot::Mutex;

use super::{Inner, packed::Packed};
use crate::{Artifact, CHUNK_BYTES, ReadAt, StoreError, cache::Chunk};

/// Maximum number of chunks that are kept open. Another one is verified when it is opened again.
const OPEN_CHUNKS: usize = 64;

/// Artifact whose chunks are loaded when they are read.
#[derive(Debug)]
pub(super) struct RemoteFile {
    store: Arc<Inner>,
    artifact: Artifact,
    packed: Packed,
    /// Open chunks with their numbers, the last used one at the end.
    open: Mutex<VecDeque<(u64, Arc<Chunk>)>>,
}

impl RemoteFile {
    pub(super) fn new(store: Arc<Inner>, artifact: Artifact, packed: Packed) -> Self {
        Self {
            store,
            artifact,
            packed,
            open: Mutex::default(),
        }
    }

    fn chunk(&self, number: u64) -> Result<Arc<Chunk>, StoreError> {
        if let Some(chunk) = self.opened(number) {
            return Ok(chunk);
        }
        let load = || {
            let range = self.packed.range(number);
            let bytes = self.store.load(&self.artifact.id, range)?;
            Ok(bytes.to_vec())
        };
        let chunk = Arc::new(self.store.cache.chunk(&self.artifact, number, load)?);
        let mut open = self.open.lock();
        if open.len() >= OPEN_CHUNKS {
            open.pop_front();
        }
        open.push_back((number, chunk.clone()));
        Ok(chunk)
    }

    fn opened(&self, number: u64) -> Option<Arc<Chunk>> {
        let mut open = self.open.lock();
        let place = open.iter().rposition(|(known, _)| *known == number)?;
        let entry = open.remove(place)?;
        let chunk = entry.1.clone();
        open.push_back(entry);
        Some(chunk)
    }
}

impl ReadAt for RemoteFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.artifact.content.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.artifact.content.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (number, within) = (at / CHUNK_BYTES, at % CHUNK_BYTES);
            let room = usize::try_from(CHUNK_BYTES - within).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(room.min(rest.len()));
            match self.artifact.content.is_zero(number) {
                true => now.fill(0),
                false => self
                    .chunk(number)
                    .map_err(|error| failed(&self.artifact, number, &error))?
                    .read_at(within, now)?,
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let content = &self.artifact.content;
        let mut chunks = offset / CHUNK_BYTES..content.chunks();
        let found = chunks.find(|number| !content.is_zero(*number));
        Ok(found.map(|number| {
            let begin = (number * CHUNK_BYTES).max(offset);
            (begin, ((number + 1) * CHUNK_BYTES).min(content.len()))
        }))
    }
}

/// Returns the error with its causes in one line, because it becomes the reason of a VM's end.
fn failed(artifact: &Artifact, number: u64, error: &StoreError) -> io::Error {
    let mut text = format!("chunk {number} of artifact {}: {error}", artifact.id);
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    io::Error::other(text)
}
