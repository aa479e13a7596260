//! Snapshot headers and diff files: the work of every pause and every restore.
//!
//! The baseline of `write_*` is `copy_to_file`, which writes the same bytes without any comparison,
//! checksum or mapping.

#![allow(clippy::unwrap_used, reason = "a benchmark stops where it fails")]

use std::{fs, io::Write as _, sync::Arc};

use divan::{Bencher, black_box, counter::BytesCount};
use wrenn_snapshot::{
    Chain, DiffFile, DiffWriter, Header, Mapping, PAGE_BYTES, SnapshotId, Source, header::Summary,
};

fn main() {
    divan::main();
}

/// Memory that the benchmarks write: 64 MiB.
const MEMORY_BYTES: u64 = 64 << 20;

/// Bytes per call of `push`, as the supervisor passes them: 1 MiB.
const RUN_BYTES: u64 = 1 << 20;

/// Header of fragmented memory: every other page has been changed by the second of two snapshots.
fn fragmented(pages: u64) -> Header {
    let build = SnapshotId::random();
    let file = |build| DiffFile {
        build,
        len: pages * PAGE_BYTES,
        checksum: 0,
    };
    let mapping = |page: u64| Mapping {
        offset: page * PAGE_BYTES,
        len: PAGE_BYTES,
        source: Source::Diff {
            file: u32::try_from(page % 2).unwrap(),
            offset: page / 2 * PAGE_BYTES,
        },
    };
    let base = SnapshotId::random();
    let summary = Summary {
        memory_size: pages * PAGE_BYTES,
        generation: 1,
        build,
        base,
    };
    let mappings = (0..pages).map(mapping).collect();
    Header::new(summary, vec![file(base), file(build)], mappings).unwrap()
}

/// Parses and validates the header of a restore. 131072 pages are 512 MiB.
#[divan::bench(args = [1024, 131_072])]
fn parse_header(bencher: Bencher<'_, '_>, pages: u64) {
    let bytes = fragmented(pages).to_bytes();
    bencher
        .counter(BytesCount::of_slice(&bytes))
        .bench(|| Header::parse(black_box(&bytes)).unwrap());
}

/// Finds the source of a page, as every page fault does.
#[divan::bench(args = [1024, 131_072])]
fn look_up_page(bencher: Bencher<'_, '_>, pages: u64) {
    let header = fragmented(pages);
    let mut page = 0;
    bencher.bench_local(|| {
        // A stride that visits the pages in an order without locality.
        page = (page + 7919) % pages;
        header.lookup(black_box(page * PAGE_BYTES)).unwrap()
    });
}

/// Bytes that no page shares with another, and none of which is zero.
fn content(seed: u8) -> Vec<u8> {
    let byte = |at: u64| u8::try_from((at / PAGE_BYTES + at) % 251).unwrap_or(0) | 1;
    let mut bytes: Vec<u8> = (0..RUN_BYTES).map(byte).collect();
    bytes
        .iter_mut()
        .step_by(64)
        .for_each(|byte| *byte ^= seed << 1);
    bytes
}

fn write(path: &std::path::Path, parent: Option<(Header, Arc<Chain>)>, run: &[u8]) -> Header {
    let build = SnapshotId::random();
    let mut writer = DiffWriter::create(path, build, MEMORY_BYTES, parent).unwrap();
    for offset in (0..MEMORY_BYTES).step_by(run.len()) {
        writer.push(offset, run).unwrap();
    }
    writer.finish().unwrap().0
}

/// Writes a first snapshot: all pages differ from zero.
#[divan::bench(sample_count = 10)]
fn write_first(bencher: Bencher<'_, '_>) {
    let run = content(0);
    bencher
        .counter(BytesCount::new(MEMORY_BYTES))
        .with_inputs(|| tempfile::tempdir().unwrap())
        .bench_refs(|dir| write(&dir.path().join("diff"), None, &run));
}

/// Writes a snapshot of memory that is all zeros.
#[divan::bench(sample_count = 10)]
fn write_zeros(bencher: Bencher<'_, '_>) {
    let run = vec![0; usize::try_from(RUN_BYTES).unwrap()];
    bencher
        .counter(BytesCount::new(MEMORY_BYTES))
        .with_inputs(|| tempfile::tempdir().unwrap())
        .bench_refs(|dir| write(&dir.path().join("diff"), None, &run));
}

/// Writes the same bytes as `write_first` to a file and flushes it.
#[divan::bench(sample_count = 10)]
fn copy_to_file(bencher: Bencher<'_, '_>) {
    let run = content(0);
    bencher
        .counter(BytesCount::new(MEMORY_BYTES))
        .with_inputs(|| tempfile::tempdir().unwrap())
        .bench_refs(|dir| {
            let mut file = fs::File::create(dir.path().join("copy")).unwrap();
            for _ in (0..MEMORY_BYTES).step_by(run.len()) {
                file.write_all(&run).unwrap();
            }
            file.sync_all().unwrap();
        });
}
