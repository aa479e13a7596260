//! Comparison of ways to give a restored VM its memory, without a VMM. Prints a table.
//!
//! `cargo run --release -p wrenn-pager --example backings [DIR] [ROUNDS]`
//!
//! Requires root, and `fincore` of util-linux. The figures are medians of the rounds, in which the
//! ways alternate. A second table has the best rounds, for a machine that is busy.
//!
//! A VM is a process with 512 MiB of memory that reads one word of each page. A server is another
//! process, and serves all VMs of the snapshot. Files are below `DIR`. A FUSE file is mounted in a
//! mount namespace of its server, so no mount is left.
//!
//! - *UFFD*: anonymous memory, filled by a page server. With *prefetch*, the page server also loads
//!   the pages that the VM will use, in the order of their addresses, from the start on.
//! - *shared memfd*: private mapping of a memfd that a page server fills, as for QEMU.
//! - *file*: private mapping of a complete file. *Complete load* is the writing of this file.
//! - *FUSE*: private mapping of a FUSE file that a server fills from the same source. *4 KiB*
//!   switches readahead off.
//!
//! Files are in the page cache at first, except where a row says *cold*. The host's own disk may
//! have a cache. The VM is not a guest: a guest takes faults of the processor's second page tables
//! in addition, for each page and in every way.
#![forbid(unsafe_code)]

mod deaths;
mod fuse;
mod instance;
mod measure;
mod process;
mod server;
mod source;
mod table;
mod vm;

use std::{error::Error, fs, path::Path};

use instance::Way;
use measure::Measure;
use source::Files;
use table::Table;

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["vm"] => vm::run(),
        ["server", dir] => server::run(Path::new(dir)),
        [] => compare(&std::env::temp_dir(), 3),
        [dir] => compare(Path::new(dir), 3),
        [dir, rounds] => compare(Path::new(dir), rounds.parse()?),
        _ => Err("usage: backings [DIR] [ROUNDS]".into()),
    }
}

fn compare(dir: &Path, rounds: usize) -> Result<(), Failure> {
    let dir = tempfile::Builder::new()
        .prefix("backings-")
        .tempdir_in(dir)?;
    fs::create_dir(dir.path().join("mount"))?;
    let files = Files {
        dir: dir.path().canonicalize()?,
    };
    files.create()?;
    measure::write_complete(&files, &files.complete())?.sync_all()?;
    let mut table = Table::default();
    for round in 1..=rounds {
        for way in Way::ALL {
            eprintln!("round {round} of {rounds}: {}", way.name());
            let (files, table) = (&files, &mut table);
            Measure { way, files, table }.run()?;
        }
    }
    for way in Way::ALL {
        eprintln!("failures: {}", way.name());
        deaths::run(way, &files, &mut table)?;
    }
    println!("Medians:\n\n{table}");
    table.shows_best = true;
    println!("Best rounds:\n\n{table}");
    Ok(())
}
