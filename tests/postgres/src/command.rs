//! Programs of PostgreSQL, and the user that they run as.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// Directory of the Debian package `postgresql-15`.
const BIN: &str = "/usr/lib/postgresql/15/bin";

/// User of the Debian package. The programs refuse to run as root.
const USER: &str = "postgres";

/// True if the tests run as root, and the server as another user.
pub(crate) fn is_root() -> Result<bool> {
    let own = std::fs::metadata("/proc/self").context("failed to read the user id")?;
    Ok(std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// Returns a program of PostgreSQL as a command that ends with the thread that starts it.
pub(crate) fn postgres(program: &str) -> Result<Command> {
    let path = Path::new(BIN).join(program);
    ensure!(
        path.exists(),
        "{} not found; run `make setup-test`",
        path.display()
    );
    let mut command = Command::new("setpriv");
    // SIGQUIT is PostgreSQL's immediate shutdown.
    command.args(["--pdeathsig", "QUIT"]);
    if is_root()? {
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]);
    }
    command.arg("--").arg(path).current_dir("/");
    Ok(command)
}

/// Gives a directory and its content to the user of the server.
pub(crate) fn give_away(path: &Path) -> Result<()> {
    if is_root()? {
        run(Command::new("chown").arg("-R").arg(USER).arg(path))?;
    }
    Ok(())
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
