//! The programs in `examples/` and `tests/e2e/examples` against a `wrenn up`, one test per
//! language. All of them do the same, so they print the same.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use wrenn_e2e::{Service, sdks};

/// Maximum duration of an example on a busy machine that emulates its guests.
const DEADLINE: Duration = Duration::from_secs(300);

/// Output of each example after its first line, which contains the id of the sandbox.
const OUTPUT: [&str; 6] = [
    "ran: 42",
    "read: hello",
    "paused",
    "running",
    "still there: hello",
    "destroyed",
];

#[tokio::test]
async fn the_python_example_runs() -> Result<()> {
    let mut command = Command::new("python3");
    command.arg("-B").arg(example("python/rest.py"));
    run(command).await
}

#[tokio::test]
async fn the_javascript_example_runs() -> Result<()> {
    let mut command = Command::new(sdks::sdks().join("bin/node"));
    command.arg(example("js/rest.mjs"));
    run(command).await
}

#[tokio::test]
async fn the_curl_example_runs() -> Result<()> {
    let mut command = Command::new("bash");
    command.arg(example("curl/rest.sh"));
    run(command).await
}

#[tokio::test]
async fn the_rust_example_runs() -> Result<()> {
    // Cargo builds examples together with tests: `target/debug/{deps/<test>,examples/rest}`.
    let test = env::current_exe()?;
    let profile = test.parent().and_then(Path::parent);
    let program = profile
        .context("the test is not in a target directory")?
        .join("examples/rest");
    ensure!(
        program.exists(),
        "{} is missing: run `cargo build -p wrenn-e2e --example rest`",
        program.display()
    );
    run(Command::new(program)).await
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name)
}

/// Runs an example against its own service and checks its exit code and its output.
async fn run(mut command: Command) -> Result<()> {
    let what = format!("{command:?}");
    let service = Service::start().await?;
    command
        .env("WRENN_API_URL", service.url(""))
        .env("WRENN_API_KEY", service.key())
        // Proxies of the environment must not be used for addresses of this machine.
        .env("NO_PROXY", "*")
        .stdin(Stdio::null());
    let output = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DEADLINE, output)
        .await
        .with_context(|| format!("{what}: timed out\n{}", service.log()))?
        .with_context(|| format!("failed to start {what}; run scripts/setup --test"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report = || {
        let log = service.log();
        format!("{what}: {}\n{stdout}\n{stderr}\n{log}", output.status)
    };
    ensure!(output.status.success(), "{}", report());
    let mut lines = stdout.lines();
    let first = lines.next().unwrap_or_default();
    ensure!(first.starts_with("created sb-"), "{}", report());
    ensure!(lines.eq(OUTPUT), "{}", report());
    let (_, left) = service.get("/v1/sandboxes").await?;
    ensure!(left == json!([]), "sandboxes are left: {left}");
    Ok(())
}
