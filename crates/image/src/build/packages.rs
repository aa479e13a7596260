//! Package layer of a template: its packages, unpacked and configured, as a tar file. A layer
//! stands alone or extends the layer of another recipe.

use std::{fs, path::Path, process::Command, time::Duration};

use super::{BuildError, Builder};
use crate::{Recipe, sources, store::io_error};

const BOOTSTRAP: Duration = Duration::from_secs(1800);

/// Files that no guest needs; they would be a third of the image.
const EXCLUDED: [&str; 6] = [
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/bug/*",
];

/// Environment variable that passes the path of the layer below to [`UNPACK`].
const BELOW: &str = "WRENN_LAYER_BELOW";

/// Setup hook that unpacks the layer below into the new tree: `mmdebstrap` installs on top of
/// existing files. `mmdebstrap` creates devices itself.
const UNPACK: &str = "tar -C \"$1\" --numeric-owner --xattrs '--xattrs-include=*' --exclude='./dev/*' -xpf \"$WRENN_LAYER_BELOW\"";

/// Builds `<layer key>.tar` in `dir`, on top of the layer `below` if there is one.
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
