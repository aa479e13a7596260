//! Processes that the tests start: one that enters a jail, and one that exports a disk until it is
//! killed.
#![forbid(unsafe_code)]

use std::{
    error::Error,
    path::{Path, PathBuf},
};

use wrenn_disk::{Export, ExportConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["jail", "--spec", spec] => Err(wrenn_jail::enter(Path::new(spec)).into()),
        ["export", dir, uid] => export(&PathBuf::from(dir), uid.parse()?),
        _ => Err("usage: jail --spec FILE | export DIR UID".into()),
    }
}

/// Exports the disk of `dir/base` and `dir/overlay` at `dir/export`.
fn export(dir: &Path, uid: u32) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut export = Export::start(ExportConfig {
            wrenn_exe: &std::env::current_exe()?,
            cgroups: Vec::new(),
            uid,
            reader_uid: 0,
            base: &dir.join("base"),
            layers: &[],
            overlay: &dir.join("overlay"),
            size_mib: 16,
            dir: &dir.join("export"),
        })
        .await?;
        let pid = export.pid().ok_or("the exporter has ended")?;
        println!("{pid}");
        Err(export.wait().await.into())
    })
}
