//! Bounding a chain: many diff files become one, with the same content.

use std::{io::Write as _, path::Path};

use xxhash_rust::xxh3::Xxh3;

use crate::{BuildId, Chain, DiffError, DiffFile, Header, Source, header::Summary};

/// How much is copied at once, bytes.
const COPY_BYTES: u64 = 1024 * 1024;

/// Copies what a chain holds into one file at `path`, which is named `build`. The moment stays the same: its header gets another
/// table, and keeps its generation. The file is flushed to the disk.
///
/// # Errors
/// If a file cannot be read or written.
pub fn merge_files(
    header: &Header,
    chain: &Chain,
    path: &Path,
    build: BuildId,
) -> Result<Header, DiffError> {
    let failed = |source| DiffError::Write {
        path: path.to_owned(),
        source,
    };
    let mut file = std::fs::File::create_new(path).map_err(failed)?;
    let mut hash = Xxh3::new();
    let mut stored = 0;
    let mut mappings = header.mappings().to_vec();
    let mut buffer = Vec::new();
    for mapping in &mut mappings {
        if mapping.source == Source::Zero {
            continue;
        }
        let mut at = mapping.offset;
        while at < mapping.end() {
            let len = (mapping.end() - at).min(COPY_BYTES);
            buffer.resize(usize::try_from(len).unwrap_or(0), 0);
            chain.read_at(at, &mut buffer)?;
            hash.update(&buffer);
            file.write_all(&buffer).map_err(failed)?;
            at += len;
        }
        mapping.source = Source::Diff {
            file: 0,
            offset: stored,
        };
        stored += mapping.len;
    }
    file.sync_all().map_err(failed)?;
    crate::normalise(&mut mappings);
    let diff = DiffFile {
        build,
        len: stored,
        checksum: hash.digest(),
    };
    let summary = Summary {
        memory_size: header.memory_size(),
        generation: header.generation(),
        build: header.build(),
        base: header.base(),
    };
    Ok(Header::new(summary, vec![diff], mappings)?)
}
