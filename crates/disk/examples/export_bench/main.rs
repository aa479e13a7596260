//! Comparison of ways to give a VMM one raw file for a disk that is a chain of qcow2 files. Prints
//! a table.
//!
//! `cargo run --release -p wrenn-disk --example export_bench [DIR] [SIZE_MIB] [ROUNDS]`
//!
//! Requires root. The chain has a base of random data, two layers that replace a sixteenth of it
//! each, and an empty overlay. It is created below `DIR`. Each figure is the median of the rounds,
//! in which the candidates alternate. Requests are made one at a time, without `O_DIRECT`, as by
//! Firecracker's default I/O engine.
//!
//! - *cached*: the blocks were just read, and are in the page cache of the raw file. The kernel
//!   drops that of a FUSE file once a second, because the exporter reports the current time as the
//!   time of the last change.
//! - *first access*: they are not. Files below the raw file are cached, because other sandboxes use
//!   them. A copy has no file below it.
//! - *cold*: nothing is cached on this host. Its own disk may have a cache.
//! - *second*: the same blocks once more. Writes count the `fsync` at their end.
#![forbid(unsafe_code)]

mod candidates;
mod chain;
mod load;
mod table;

use std::{
    error::Error,
    path::{Path, PathBuf},
};

use candidates::{Candidate, Kind};
use chain::Chain;
use table::Table;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [jail, _, spec] = args.as_slice()
        && jail == "jail"
    {
        return Err(wrenn_jail::enter(Path::new(spec)).into());
    }
    let dir = args.first().map_or_else(std::env::temp_dir, PathBuf::from);
    // A power of two.
    let size_mib: u32 = args.get(1).map_or(Ok(1024), |text| text.parse())?;
    let rounds = args.get(2).map_or(Ok(3), |text| text.parse())?;
    if !size_mib.is_power_of_two() {
        return Err("SIZE_MIB must be a power of two".into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(compare(&dir, size_mib, rounds))
}

async fn compare(dir: &Path, size_mib: u32, rounds: usize) -> Result<(), Failure> {
    let mut chain = Chain::new(dir, size_mib).await?;
    let mut table = Table::default();
    let mut missing = Vec::new();
    for round in 0..rounds {
        for kind in Kind::ALL {
            eprintln!("round {} of {rounds}: {}", round + 1, kind.name());
            match Candidate::start(kind, &mut chain).await? {
                Ok(candidate) => measure(candidate, &chain, &mut table).await?,
                Err(reason) if round == 0 => missing.push((kind, reason)),
                Err(_) => {}
            }
        }
    }
    println!("{table}");
    for (kind, reason) in missing {
        println!("{}: not measured, {reason}", kind.name());
    }
    Ok(())
}

/// Measures a candidate, and ends its exporter at last.
async fn measure(
    mut candidate: Candidate,
    chain: &Chain,
    table: &mut Table,
) -> Result<(), Failure> {
    let name = candidate.kind.name();
    let mut add = |what: &'static str, value| table.add(what, name, value);
    add("ready after, ms", candidate.ready_ms);
    add("space on disk at start, MiB", candidate.space_mib()?);
    let lower = candidate.lower(chain);
    for (what, value) in load::run(&candidate.raw, &lower, chain.size_mib)? {
        add(what, value);
    }
    if let Some(switch_ms) = candidate.switch().await? {
        add("new overlay, ms", switch_ms);
    }
    add("memory of the exporter (PSS), MiB", candidate.memory_mib()?);
    let effect = candidate.crash().await?;
    table.note("crash of the exporter: a reader gets", name, effect);
    Ok(())
}
