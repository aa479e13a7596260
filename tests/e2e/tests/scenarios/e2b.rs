//! Unmodified SDKs of E2B against a `wrenn up`: the scenarios in `tests/e2b`, one test per suite
//! and SDK.
//!
//! `scripts/setup-sdks` installs the SDKs (`make test` runs it). A suite is a process with the
//! three environment variables that a user would set. Its output is shown if it fails.

use std::{
    fs,
    os::unix::{fs::symlink, process::CommandExt as _},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use wrenn_e2e::{
    Service,
    sdks::{self, scenarios, sdks},
    wait::until,
};

/// Maximum duration of a suite, which takes minutes if guests are emulated and the machine is busy.
const SUITE_DEADLINE: Duration = Duration::from_secs(600);

/// Python SDKs, by the names of their requirements files.
const NEW: &str = sdks::PYTHON;
const OLD: &str = "e2b-2.45.1";

/// Defines one test per line: name, SDK, files of the suite.
macro_rules! suites {
    ($run:ident: $($name:ident($($argument:expr),+);)+) => {
        $(
            #[tokio::test]
            async fn $name() -> Result<()> {
                $run($($argument),+).await
            }
        )+
    };
}

suites! { python:
    commands_with_the_new_python_sdk(NEW, &["test_commands.py", "test_pty.py", "test_git.py"]);
    commands_with_the_old_python_sdk(OLD, &["test_commands.py", "test_pty.py", "test_git.py"]);
    files_with_the_new_python_sdk(NEW, &["test_files.py"]);
    files_with_the_old_python_sdk(OLD, &["test_files.py"]);
    lifecycle_with_the_new_python_sdk(NEW, &["test_lifecycle.py"]);
    lifecycle_with_the_old_python_sdk(OLD, &["test_lifecycle.py"]);
    snapshots_with_the_new_python_sdk(NEW, &["test_snapshots.py"]);
    snapshots_with_the_old_python_sdk(OLD, &["test_snapshots.py"]);
    asynchronous_calls_with_the_new_python_sdk(NEW, &["test_async.py"]);
    asynchronous_calls_with_the_old_python_sdk(OLD, &["test_async.py"]);
    the_code_interpreter(NEW, &["test_code_interpreter.py"]);
}

suites! { javascript:
    commands_with_the_javascript_sdk("commands.test.js");
    files_with_the_javascript_sdk("files.test.js");
    lifecycle_with_the_javascript_sdk("lifecycle.test.js");
}

async fn python(sdk: &str, files: &[&str]) -> Result<()> {
    let scenarios = scenarios().join("python");
    let mut command = Command::new(sdks().join(sdk).join("bin/python"));
    command
        .args(["-B", "-m", "pytest", "-c", "pytest.ini", "--durations=5"])
        .args(files)
        .current_dir(scenarios);
    run(command).await
}

async fn javascript(file: &str) -> Result<()> {
    // Node resolves modules relative to the importing file.
    let dir = tempfile::tempdir()?;
    for entry in fs::read_dir(scenarios().join("js"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), dir.path().join(entry.file_name()))?;
        }
    }
    symlink(
        sdks().join("js/node_modules"),
        dir.path().join("node_modules"),
    )?;
    let mut command = Command::new(sdks().join("bin/node"));
    command
        .args(["--test", "--test-reporter=spec", file])
        .current_dir(dir.path());
    run(command).await
}

/// Runs a suite against its own service.
async fn run(mut command: Command) -> Result<()> {
    let service = Service::start().await?;
    sdks::point_at(&mut command, &service)?;
    run_suite(command, &service).await
}

/// Runs a suite to its end. Its output is shown.
pub(crate) async fn run_suite(mut command: Command, service: &Service) -> Result<()> {
    let log = tempfile::NamedTempFile::new()?;
    let output = || -> Result<Stdio> { Ok(log.reopen()?.into()) };
    let mut suite = command
        .stdin(Stdio::null())
        .stdout(output()?)
        .stderr(output()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("{command:?}; run scripts/setup-sdks"))?;
    let ended = until("the suite ends", SUITE_DEADLINE, async || {
        Ok(suite.try_wait()?)
    })
    .await;
    let said = || fs::read_to_string(log.path()).unwrap_or_default();
    match ended {
        Ok(status) if status.success() => {
            println!("{}", said());
            Ok(())
        }
        Ok(status) => bail!(
            "{status}\n{}\n--- log of wrenn up ---\n{}",
            said(),
            service.log()
        ),
        Err(late) => {
            killpg(Pid::from_raw(i32::try_from(suite.id())?), Signal::SIGKILL)?;
            suite.wait()?;
            Err(late.context(said()))
        }
    }
}

#[test]
fn the_sdks_are_installed() -> Result<()> {
    for sdk in [NEW, OLD] {
        ensure!(
            sdks().join(sdk).join("bin/python").exists(),
            "{sdk} is missing: run scripts/setup-sdks"
        );
    }
    ensure!(
        sdks().join("js/node_modules/e2b").exists(),
        "run scripts/setup-sdks"
    );
    Ok(())
}
