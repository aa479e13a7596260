//! Cold boot and common programs with different CPU models, for the choice of the default model of
//! emulated guests.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{median, rounded};
use crate::{Sandbox, Service};

const ROUNDS: usize = 5;

/// CPU model of release 0.1.0 for emulated guests, the reference.
const REFERENCE: &str = "Nehalem-v1,+arat";

/// Environment variable with further models, separated by `;`.
const MODELS: &str = "WRENN_BENCH_CPUS";

/// Programs: name and shell command. Each runs once before it is measured, so that its files are in
/// memory and its code is translated.
const PROGRAMS: [(&str, &str); 9] = [
    ("true", "for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done"),
    ("python_start", "python3 -c 'print(1)'"),
    (
        "python_loop",
        "python3 -c 'print(sum(i * i % 7 for i in range(300000)))'",
    ),
    (
        "python_floats",
        "python3 -c 'print(sum((i * 0.5) ** 0.5 for i in range(200000)))'",
    ),
    (
        "sha256",
        "python3 -c 'import hashlib; print(hashlib.sha256(bytes(8 << 20)).hexdigest())'",
    ),
    ("sort", "seq 100000 | sort -r | sort -n | tail -n 1"),
    ("gzip", "head -c 4000000 /usr/bin/python3 | gzip -c | wc -c"),
    (
        "git",
        "cd $(mktemp -d) && git init -q && seq 2000 | split -l 10 && git add . && \
         git -c user.name=a -c user.email=a commit -qm a",
    ),
    (
        "node",
        "node -e 'let s = 0; for (let i = 0; i < 1e7; i++) s += Math.sqrt(i) | 0; console.log(s)'",
    ),
];

/// Measures all models alternately, so that a change of the machine's speed affects all.
///
/// # Errors
/// A service or a sandbox does not start, or a program fails.
pub async fn cpu(service: &Service) -> Result<Value> {
    let (_, host) = service.get("/v1/host").await?;
    let default = host["cpu"].as_str().unwrap_or_default().to_owned();
    let more = std::env::var(MODELS).unwrap_or_default();
    let more = more.split(';').filter(|model| !model.is_empty());
    let mut models = vec![REFERENCE.to_owned(), default];
    models.extend(more.map(str::to_owned));
    let mut services = Vec::new();
    for model in models {
        let service = Service::start_with("WRENN_CPU", &model).await?;
        services.push((model, service));
    }
    let mut times: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (model, service) in &services {
            let times = times.entry(model).or_default();
            measure(service, times).await?;
        }
    }
    let medians = |times: BTreeMap<&str, Vec<f64>>| -> BTreeMap<String, f64> {
        let medians = times.into_iter();
        medians
            .map(|(name, times)| (format!("{name}_ms"), rounded(median(times))))
            .collect()
    };
    let by_model: BTreeMap<_, _> = times
        .into_iter()
        .map(|(model, times)| (model, medians(times)))
        .collect();
    Ok(json!({ "by_model": by_model, "reference": REFERENCE, "rounds": ROUNDS }))
}

async fn measure(service: &Service, times: &mut BTreeMap<&str, Vec<f64>>) -> Result<()> {
    let begun = Instant::now();
    // Differs from the template's size, so that the sandbox boots.
    let body = json!({ "template": "base", "memory_mb": 520 });
    let sandbox = service.create_unready(body).await?;
    sandbox.exec("true", &[]).await?;
    times.entry("boot").or_default().push(millis(begun));
    for (name, command) in PROGRAMS {
        run(&sandbox, command).await?;
        let begun = Instant::now();
        run(&sandbox, command).await?;
        times.entry(name).or_default().push(millis(begun));
    }
    sandbox.destroy().await
}

async fn run(sandbox: &Sandbox<'_>, command: &str) -> Result<()> {
    let output = sandbox.shell(command).await?;
    ensure!(output.code == 0, "{command}: {output:?}");
    Ok(())
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
