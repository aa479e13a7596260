//! The packages of a template, unpacked and configured, as a tar file; alone, or above those of another.

use std::{fs, path::Path, process::Command, time::Duration};

use super::{BuildError, Builder};
use crate::{Recipe, sources, store::io_error};

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

/// Variable that names the layer below to [`UNPACK`].
const BELOW: &str = "WRENN_LAYER_BELOW";

/// Fills the new tree with a layer: `mmdebstrap` installs into what is there. Devices it makes itself.
const UNPACK: &str = "tar -C \"$1\" --numeric-owner --xattrs '--xattrs-include=*' --exclude='./dev/*' -xpf \"$WRENN_LAYER_BELOW\"";

/// Builds `<layer key>.tar` in `dir`, above the layer `below` if there is one.
pub(super) fn build(
    builder: &Builder<'_>,
    recipe: &Recipe,
    below: Option<&Path>,
    dir: &Path,
) -> Result<(), BuildError> {
    let etc = Path::new("/etc/apt");
    let lines = sources::host_sources(etc, recipe.suite).map_err(io_error("read", etc))?;
    if lines.is_empty() {
        return Err(BuildError::NoSources(recipe.suite.to_owned()));
    }
    let list = dir.join("sources.list");
    fs::write(&list, lines.join("\n") + "\n").map_err(io_error("write", &list))?;
    let tar = dir.join(format!("{}.tar", recipe.layer_key()));
    let mut bootstrap = Command::new("mmdebstrap");
    match below {
        None => bootstrap.arg("--variant=minbase"),
        Some(below) => bootstrap
            .args(["--variant=custom", "--skip=check/empty"])
            .arg(format!("--setup-hook={UNPACK}"))
            .env(BELOW, below),
    };
    bootstrap
        .arg("--mode=root")
        .arg(format!("--include={}", recipe.packages.join(",")));
    for path in EXCLUDED {
        bootstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    bootstrap
        .arg("--aptopt=Acquire::Retries \"3\"")
        .arg(recipe.suite)
        .arg(&tar)
        .arg(&list);
    builder.run(&mut bootstrap, BOOTSTRAP)?;
    Ok(())
}
