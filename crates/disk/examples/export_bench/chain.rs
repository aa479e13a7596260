//! Disk that is compared: a base of random data, two layers, and overlays.

use std::{
    fs::{self, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{Failure, load::Random};

/// User of the exporter.
pub(crate) const UID: u32 = 1_899_990_002;

/// Part of the disk that each layer replaces, in clusters of 64 KiB.
const REPLACED: usize = 16;

pub(crate) struct Chain {
    dir: tempfile::TempDir,
    pub(crate) base: PathBuf,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) size_mib: u32,
    overlays: u32,
}

impl Chain {
    pub(crate) async fn new(parent: &Path, size_mib: u32) -> Result<Self, Failure> {
        let dir = tempfile::tempdir_in(parent)?;
        fs::set_permissions(dir.path(), Permissions::from_mode(0o711))?;
        let base = dir.path().join("base");
        let mut random = Random::new(1);
        let mut file = fs::File::create(&base)?;
        let mut block = vec![0; 1 << 20];
        for _ in 0..size_mib {
            random.fill(&mut block);
            file.write_all(&block)?;
        }
        file.sync_all()?;
        fs::set_permissions(&base, Permissions::from_mode(0o444))?;
        let mut chain = Self {
            dir,
            base,
            layers: Vec::new(),
            size_mib,
            overlays: 0,
        };
        for name in ["first", "second"] {
            chain.add_layer(name, &mut random).await?;
        }
        Ok(chain)
    }

    /// Returns a path in the directory of the disk.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Creates an empty overlay.
    pub(crate) async fn overlay(&mut self) -> Result<PathBuf, Failure> {
        self.overlays += 1;
        let path = self.path(&format!("overlay-{}", self.overlays));
        wrenn_disk::create(&path, self.size_mib, UID).await?;
        Ok(path)
    }

    /// Describes the layers, or the layers with one more file on top.
    pub(crate) fn tree(&self, above: Option<&Path>) -> Value {
        let file = |path: &Path| json!({ "driver": "file", "filename": path, "locking": "off" });
        let base = json!({ "driver": "raw", "read-only": true, "file": file(&self.base) });
        let layers = self.layers.iter().map(PathBuf::as_path);
        layers.chain(above).fold(
            base,
            |below, path| json!({ "driver": "qcow2", "file": file(path), "backing": below }),
        )
    }

    async fn add_layer(&mut self, name: &str, random: &mut Random) -> Result<(), Failure> {
        let path = self.path(name);
        wrenn_disk::create(&path, self.size_mib, 0).await?;
        let clusters = self.size_mib as usize * 16;
        let mut child = Command::new("qemu-io")
            .arg(format!("json:{}", self.tree(Some(&path))))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let mut input = child.stdin.take().ok_or("no input")?;
        for number in 0..clusters / REPLACED {
            let cluster = random.below(clusters);
            let pattern = number % 255 + 1;
            writeln!(input, "write -P {pattern} {} 64k", cluster << 16)?;
        }
        drop(input);
        if !child.wait()?.success() {
            return Err("qemu-io failed".into());
        }
        fs::set_permissions(&path, Permissions::from_mode(0o444))?;
        self.layers.push(path);
        Ok(())
    }
}
