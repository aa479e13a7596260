//! `make bench`: performance measurements as JSON, each median with the limit or reference that it
//! is compared with.
//!
//! Requires a release build (`WRENN_BIN`). Absolute times are specific to the machine; ratios can
//! be compared between machines. A section that fails reports its error in its place, and the other
//! sections are still measured.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use wrenn_e2e::{Service, bench};

/// Names of the sections, in measuring order.
const SECTIONS: [&str; 11] = [
    "boot", "exec", "restore", "resume", "spawn", "files", "sdk", "memory", "idle", "cpu", "vmm",
];

#[tokio::main]
async fn main() -> Result<()> {
    let only: Vec<String> = std::env::args().skip(1).collect();
    for name in &only {
        let known = SECTIONS.contains(&name.as_str());
        ensure!(known, "no section `{name}`; expected {SECTIONS:?}");
    }
    let service = Service::start().await?;
    let mut report = BTreeMap::new();
    let mut failed = Vec::new();
    for name in SECTIONS {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        eprintln!("measuring {name} …");
        let begun = Instant::now();
        let measured = measure(name, &service).await.unwrap_or_else(|error| {
            failed.push(name);
            json!({ "error": format!("{error:#}") })
        });
        report.insert(name, measured);
        eprintln!("{name} took {:.0?}", begun.elapsed());
    }
    println!("{}", serde_json::to_string_pretty(&report)?);
    ensure!(failed.is_empty(), "failed to measure {failed:?}");
    Ok(())
}

async fn measure(name: &str, service: &Service) -> Result<Value> {
    match name {
        "boot" => bench::boot(service).await,
        "exec" => bench::exec(service).await,
        "restore" => bench::restore(service).await,
        "resume" => bench::pause_and_resume(service).await,
        "spawn" => bench::spawn(service).await,
        "files" => bench::files(service).await,
        "sdk" => bench::sdk(service).await,
        "memory" => bench::memory(service).await,
        "idle" => bench::idle(service).await,
        "vmm" => bench::vmm(service).await,
        _ => bench::cpu(service).await,
    }
}
