//! `make bench`: what things cost, as JSON, each median beside the limit or the peer it is held against.
//!
//! Run it with a release build (`WRENN_BIN`). Absolute times are this machine's; the ratios travel.

use std::{collections::BTreeMap, time::Instant};

use anyhow::Result;
use serde_json::{Value, json};
use wrenn_e2e::{Service, bench};

#[tokio::main]
async fn main() -> Result<()> {
    let only: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let service = Service::start().await?;
    let mut report = BTreeMap::<&str, Value>::new();
    if wanted("boot") {
        measure(&mut report, "boot", bench::boot(&service)).await?;
    }
    if wanted("exec") {
        measure(&mut report, "exec", bench::exec(&service)).await?;
    }
    if wanted("warm") {
        measure(&mut report, "warm", bench::warm(&service)).await?;
    }
    if wanted("thaw") {
        measure(&mut report, "thaw", bench::thaw(&service)).await?;
    }
    if wanted("spawn") {
        measure(&mut report, "spawn", bench::spawn(&service)).await?;
    }
    if wanted("files") {
        measure(&mut report, "files", bench::files(&service)).await?;
    }
    if wanted("memory") {
        measure(&mut report, "memory", bench::memory(&service)).await?;
    }
    if wanted("idle") {
        measure(&mut report, "idle", bench::idle(&service)).await?;
    }
    println!("{}", serde_json::to_string_pretty(&json!(report))?);
    Ok(())
}

async fn measure(
    report: &mut BTreeMap<&'static str, Value>,
    name: &'static str,
    work: impl Future<Output = Result<Value>>,
) -> Result<()> {
    let begun = Instant::now();
    eprintln!("measuring {name} …");
    report.insert(name, work.await?);
    eprintln!("{name} took {:.0?}", begun.elapsed());
    Ok(())
}
