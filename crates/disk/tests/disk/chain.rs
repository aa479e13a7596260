//! Disk with known content: a base, two layers and an overlay.

use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use wrenn_disk::{DiskError, Export, ExportConfig};

/// Size of the disk.
pub(crate) const SIZE_MIB: u32 = 16;
pub(crate) const SIZE: usize = 16 << 20;

/// User of the exporter.
pub(crate) const UID: u32 = 1_899_990_001;

/// Program that enters the jail.
const EXE: &str = env!("CARGO_BIN_EXE_wrenn-disk-test-helper");

/// Returns the command that exports a disk until it is killed.
pub(crate) fn export_command(chain: &Chain) -> Command {
    let mut command = Command::new(EXE);
    command.arg("export").arg(chain.dir()).arg(UID.to_string());
    command
}

pub(crate) struct Chain {
    dir: tempfile::TempDir,
    pub(crate) base: PathBuf,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) overlay: PathBuf,
    /// Content that the disk must have.
    pub(crate) content: Vec<u8>,
}

impl Chain {
    /// Creates a disk whose content comes from all of its files: every block of 4 KiB is different,
    /// and the layers hide parts of those below with data and with zeros.
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path(), 0o711);
        let content: Vec<u8> = (0..SIZE).map(base_byte).collect();
        let base = dir.path().join("base");
        fs::write(&base, &content).unwrap();
        open_to_all(&base, 0o444);
        let overlay = dir.path().join("overlay");
        let mut chain = Self {
            dir,
            base,
            layers: Vec::new(),
            overlay: overlay.clone(),
            content,
        };
        for (name, seed) in [("first", 1), ("second", 2)] {
            let layer = chain.dir().join(name);
            chain.add(&layer, 0, seed).await;
            open_to_all(&layer, 0o444);
            chain.layers.push(layer);
        }
        chain.add(&overlay, UID, 3).await;
        chain
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Directory of the export.
    pub(crate) fn export_dir(&self) -> PathBuf {
        self.dir().join("export")
    }

    /// Starts an export that this process can read.
    pub(crate) async fn export(&self) -> Export {
        self.export_for(0).await.unwrap()
    }

    /// Starts an export for a user.
    pub(crate) async fn export_for(&self, reader_uid: u32) -> Result<Export, DiskError> {
        let dir = self.export_dir();
        let config = self.config(&dir);
        Export::start(ExportConfig {
            reader_uid,
            ..config
        })
        .await
    }

    /// Returns the parameters of an export that this process can read.
    pub(crate) fn config<'a>(&'a self, dir: &'a Path) -> ExportConfig<'a> {
        ExportConfig {
            wrenn_exe: Path::new(EXE),
            cgroups: Vec::new(),
            uid: UID,
            reader_uid: 0,
            base: &self.base,
            layers: &self.layers,
            overlay: &self.overlay,
            size_mib: SIZE_MIB,
            dir,
        }
    }

    /// Writes to the raw file, and to the expected content.
    pub(crate) fn write(&mut self, raw: &fs::File, offset: usize, data: &[u8]) {
        raw.write_all_at(data, offset as u64).unwrap();
        self.content[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Creates an empty overlay.
    pub(crate) async fn empty_overlay(&self, name: &str) -> PathBuf {
        let path = self.dir().join(name);
        wrenn_disk::create(&path, SIZE_MIB, UID).await.unwrap();
        path
    }

    /// Reads the disk without an export. `above` are files on top of the layers.
    pub(crate) fn read(&self, above: &[&Path]) -> Vec<u8> {
        let target = self.dir().join("flat");
        let status = Command::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .arg(format!("json:{}", self.tree(above)))
            .arg(&target)
            .status()
            .unwrap();
        assert!(status.success());
        fs::read(target).unwrap()
    }

    /// Creates a file on top of the layers, and fills a part of it.
    async fn add(&mut self, path: &Path, uid: u32, seed: usize) {
        wrenn_disk::create(path, SIZE_MIB, uid).await.unwrap();
        let mut commands = Vec::new();
        for (offset, len, value) in writes(seed) {
            let pattern = if value == 0 {
                "-z".into()
            } else {
                format!("-P {value}")
            };
            commands.push(format!("write {pattern} {offset} {len}"));
            self.content[offset..offset + len].fill(value);
        }
        let mut command = Command::new("qemu-io");
        for text in &commands {
            command.args(["-c", text]);
        }
        let tree = self.tree(&[path]);
        let done = command.arg(format!("json:{tree}")).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    fn tree(&self, above: &[&Path]) -> Value {
        let file = |path: &Path| json!({ "driver": "file", "filename": path, "locking": "off" });
        let base = json!({ "driver": "raw", "read-only": true, "file": file(&self.base) });
        let layers = self.layers.iter().map(PathBuf::as_path);
        layers.chain(above.iter().copied()).fold(
            base,
            |below, path| json!({ "driver": "qcow2", "file": file(path), "backing": below }),
        )
    }
}

/// Writes of a layer: offset, length, and value. Some are smaller than a cluster of 64 KiB.
fn writes(seed: usize) -> impl Iterator<Item = (usize, usize, u8)> {
    (0..24).map(move |n| {
        let random = (seed * 1009 + n * 7919) * 2_654_435_761;
        let len = [4 << 10, 64 << 10, 200 << 10][n % 3];
        let offset = (random >> 7) % (SIZE - len) / 4096 * 4096;
        let value = if n % 4 == 3 { 0 } else { seed * 40 + n };
        (offset, len, u8::try_from(value).unwrap())
    })
}

fn base_byte(offset: usize) -> u8 {
    let block = offset / 4096;
    // Never zero, and different in neighboring blocks.
    u8::try_from((block * 31 + block / 256 + offset % 7) % 255 + 1).unwrap()
}

fn open_to_all(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
