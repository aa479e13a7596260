//! The packages of a template, unpacked and configured, as a tar file.

use std::{fs, path::Path, process::Command, time::Duration};

use super::{BuildError, Builder, command};
use crate::{sources, store::io_error};

const BOOTSTRAP: Duration = Duration::from_secs(1800);

/// What no guest needs: it would be a third of the image.
const EXCLUDED: [&str; 6] = [
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/bug/*",
];

/// Builds `<layer key>.tar` in `dir`.
pub(super) fn build(builder: &Builder<'_>, dir: &Path) -> Result<(), BuildError> {
    let recipe = builder.recipe;
    let etc = Path::new("/etc/apt");
    let lines = sources::host_sources(etc, recipe.suite).map_err(io_error("read", etc))?;
    if lines.is_empty() {
        return Err(BuildError::NoSources(recipe.suite.to_owned()));
    }
    let list = dir.join("sources.list");
    fs::write(&list, lines.join("\n") + "\n").map_err(io_error("write", &list))?;
    let tar = dir.join(format!("{}.tar", recipe.layer_key()));
    let mut bootstrap = Command::new("mmdebstrap");
    bootstrap
        .args(["--variant=minbase", "--mode=root"])
        .arg(format!("--include={}", recipe.packages.join(",")));
    for path in EXCLUDED {
        bootstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    bootstrap
        .arg("--aptopt=Acquire::Retries \"3\"")
        .arg(recipe.suite)
        .arg(&tar)
        .arg(&list);
    command::run(&mut bootstrap, BOOTSTRAP, builder.progress)?;
    Ok(())
}
