//! Initialized data directory, created once and then copied.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    command::{give_away, postgres, run},
    directory::Directory,
    server::USER,
};

/// Name of the initialized directory. Changes with the options of `initdb`.
const NAME: &str = "postgres-15-cluster";

/// Copies the initialized data directory in `cache` to `data`. Initializes a data directory first
/// if there is none; processes that start at the same time wait for each other.
pub(crate) fn copy_to(data: &Path, cache: &Path) -> Result<()> {
    fs::create_dir_all(cache).context("failed to create the cache directory")?;
    let cluster = cache.join(NAME);
    let lock = File::create(cache.join(format!("{NAME}.lock")))
        .context("failed to create the lock file of the cluster")?;
    lock.lock().context("failed to lock the cluster")?;
    if !cluster.exists() {
        initialize(&cluster)?;
    }
    drop(lock);
    copy(&cluster, data)?;
    give_away(data)
}

/// Initializes a data directory where the user of the server can write, and then moves it to
/// `cluster`, so that `cluster` is complete if it exists.
fn initialize(cluster: &Path) -> Result<()> {
    let work = Directory::new()?;
    let data = work.path().join("data");
    let mut initdb = postgres("initdb")?;
    initdb.arg("-D").arg(&data).args([
        "--username",
        USER,
        "--auth=trust",
        "--no-sync",
        "--encoding=UTF8",
        "--locale=C",
        "--wal-segsize=1",
    ]);
    run(&mut initdb)?;
    let staged = cluster.with_extension("staged");
    if staged.exists() {
        fs::remove_dir_all(&staged).context("failed to remove an incomplete cluster")?;
    }
    copy(&data, &staged)?;
    fs::rename(&staged, cluster).context("failed to rename the cluster")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut cp = Command::new("cp");
    run(cp.args(["-a", "--reflink=auto", "--"]).arg(from).arg(to))
}
