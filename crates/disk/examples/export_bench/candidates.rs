//! Ways to present the disk as a raw file.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use wrenn_disk::{Export, ExportConfig};

use crate::{
    Failure,
    chain::{Chain, UID},
    load::ms,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// FUSE export of `qemu-storage-daemon`.
    Fuse,
    /// Copy of the flattened chain.
    Copy,
    /// Copy that shares its blocks with an earlier one.
    Reflink,
    /// Block device of the kernel with a server in user space.
    Ublk,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Fuse, Self::Copy, Self::Reflink, Self::Ublk];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fuse => "FUSE export",
            Self::Copy => "sparse copy",
            Self::Reflink => "reflinked copy",
            Self::Ublk => "ublk",
        }
    }
}

pub(crate) struct Candidate {
    pub(crate) kind: Kind,
    pub(crate) raw: PathBuf,
    /// Time until the first block was read.
    pub(crate) ready_ms: f64,
    export: Option<Export>,
    overlay: Option<PathBuf>,
    next: Option<PathBuf>,
}

impl Candidate {
    /// Starts a candidate. Returns the reason if it does not exist on this host.
    pub(crate) async fn start(
        kind: Kind,
        chain: &mut Chain,
    ) -> Result<Result<Self, String>, Failure> {
        match kind {
            Kind::Fuse => Self::export(chain).await.map(Ok),
            Kind::Copy => {
                let raw = chain.path("copy");
                let begin = Instant::now();
                convert(chain, &raw)?;
                Ok(Ok(Self::of_file(kind, raw, begin)?))
            }
            Kind::Reflink => Self::reflink(chain),
            Kind::Ublk => Ok(Err(no_ublk())),
        }
    }

    async fn export(chain: &mut Chain) -> Result<Self, Failure> {
        let (overlay, next) = (chain.overlay().await?, chain.overlay().await?);
        let begin = Instant::now();
        let export = Export::start(ExportConfig {
            wrenn_exe: &std::env::current_exe()?,
            cgroups: Vec::new(),
            uid: UID,
            reader_uid: 0,
            base: &chain.base,
            layers: &chain.layers,
            overlay: &overlay,
            size_mib: chain.size_mib,
            dir: &chain.path("export"),
        })
        .await?;
        let raw = export.path();
        Ok(Self {
            export: Some(export),
            overlay: Some(overlay),
            next: Some(next),
            ..Self::of_file(Kind::Fuse, raw, begin)?
        })
    }

    fn reflink(chain: &Chain) -> Result<Result<Self, String>, Failure> {
        // The template's copy, which exists before.
        let template = chain.path("flat");
        if !template.exists() {
            convert(chain, &template)?;
        }
        let raw = chain.path("reflink");
        let begin = Instant::now();
        let (from, to) = (fs::File::open(&template)?, fs::File::create(&raw)?);
        if let Err(error) = rustix::fs::ioctl_ficlone(&to, &from) {
            fs::remove_file(&raw)?;
            return Ok(Err(format!("FICLONE: {}", io::Error::from(error))));
        }
        Ok(Ok(Self::of_file(Kind::Reflink, raw, begin)?))
    }

    fn of_file(kind: Kind, raw: PathBuf, begin: Instant) -> io::Result<Self> {
        fs::File::open(&raw)?.read_exact_at(&mut [0; 4096], 0)?;
        Ok(Self {
            kind,
            raw,
            ready_ms: ms(begin.elapsed()),
            export: None,
            overlay: None,
            next: None,
        })
    }

    /// Returns the files below the raw file.
    pub(crate) fn lower(&self, chain: &Chain) -> Vec<PathBuf> {
        let Some(overlay) = &self.overlay else {
            return Vec::new();
        };
        let files = chain.layers.iter().chain([&chain.base, overlay]);
        files.cloned().collect()
    }

    /// Returns the space that this sandbox alone uses.
    pub(crate) fn space_mib(&self) -> io::Result<f64> {
        let own = match self.kind {
            Kind::Reflink => return Ok(0.0),
            _ => self.overlay.as_ref().unwrap_or(&self.raw),
        };
        #[allow(clippy::cast_precision_loss, reason = "a size for humans")]
        let bytes = (fs::metadata(own)?.blocks() * 512) as f64;
        Ok(bytes / f64::from(1 << 20))
    }

    /// Replaces the overlay of an export.
    pub(crate) async fn switch(&mut self) -> Result<Option<f64>, Failure> {
        let (Some(export), Some(next)) = (&mut self.export, &self.next) else {
            return Ok(None);
        };
        let begin = Instant::now();
        export.switch(next).await?;
        Ok(Some(ms(begin.elapsed())))
    }

    /// Returns the memory of the exporter, with its share of pages that others map, too.
    pub(crate) fn memory_mib(&self) -> Result<f64, Failure> {
        let Some(pid) = self.export.as_ref().and_then(Export::pid) else {
            return Ok(0.0);
        };
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find(|line| line.starts_with("Pss:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.ok_or("no PSS")?.parse::<f64>()? / 1024.0)
    }

    /// Kills the exporter, and returns what a process that has opened the file gets. Removes what
    /// belongs to this candidate.
    pub(crate) async fn crash(mut self) -> Result<String, Failure> {
        let effect = match self.export.take() {
            None => "no exporter".to_owned(),
            Some(export) => crash_of(export, &self.raw).await?,
        };
        for path in [self.overlay, self.next].into_iter().flatten() {
            fs::remove_file(path)?;
        }
        if self.kind != Kind::Fuse {
            fs::remove_file(&self.raw)?;
        }
        Ok(effect)
    }
}

async fn crash_of(mut export: Export, raw: &Path) -> Result<String, Failure> {
    let file = fs::OpenOptions::new().read(true).write(true).open(raw)?;
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, 4096)?;
    let pid = export.pid().ok_or("no exporter")?.to_string();
    Command::new("kill").args(["-9", &pid]).status()?;
    let begin = Instant::now();
    export.wait().await;
    let fails = |result: io::Result<usize>| match result.map_err(|error| error.raw_os_error()) {
        Ok(_) => "success".to_owned(),
        Err(code) => format!("{:?}", Errno::from_raw(code.unwrap_or_default())),
    };
    let cached = fails(file.read_at(&mut block, 4096));
    let read = fails(file.read_at(&mut block, 8 << 20));
    let write = fails(file.write_at(&block, 8 << 20));
    let after = ms(begin.elapsed());
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let later = fails(file.read_at(&mut block, 4096));
    Ok(format!(
        "{read} (write: {write}) after {after:.1} ms; cached block: {cached}, 1 s later {later}"
    ))
}

/// Writes the content of the chain to a raw file.
fn convert(chain: &Chain, target: &Path) -> Result<(), Failure> {
    let status = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(format!("json:{}", chain.tree(None)))
        .arg(target)
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err("qemu-img failed".into()),
    }
}

fn no_ublk() -> String {
    match Path::new("/dev/ublk-control").exists() {
        true => "the kernel has ublk, but no server is implemented".to_owned(),
        false => "the kernel has no ublk (no /dev/ublk-control)".to_owned(),
    }
}
