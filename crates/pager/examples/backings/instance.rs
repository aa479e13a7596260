//! Snapshot that VMs run from in one way, and its VMs.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    Failure,
    process::{Process, Usage},
    source::Files,
};

/// Way to give a VM its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Uffd,
    /// The page server also loads the pages that the VM will use.
    Prefetch,
    Shared,
    File,
    Fuse,
    /// The kernel asks for single pages.
    FusePage,
}

impl Way {
    pub(crate) const ALL: [Self; 6] = [
        Self::Uffd,
        Self::Prefetch,
        Self::Shared,
        Self::File,
        Self::Fuse,
        Self::FusePage,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uffd => "UFFD",
            Self::Prefetch => "UFFD, prefetch",
            Self::Shared => "shared memfd",
            Self::File => "file",
            Self::Fuse => "FUSE",
            Self::FusePage => "FUSE, 4 KiB",
        }
    }

    /// True if a page server resolves the faults.
    pub(crate) fn has_pager(self) -> bool {
        matches!(self, Self::Uffd | Self::Prefetch | Self::Shared)
    }

    /// Returns the name of this way in the server process. A file has no server.
    fn kind(self) -> Option<&'static str> {
        match self {
            Self::Uffd | Self::Prefetch => Some("uffd"),
            Self::Shared => Some("shared"),
            Self::File => None,
            Self::Fuse => Some("fuse"),
            Self::FusePage => Some("fuse-page"),
        }
    }
}

/// Pages that are loaded ahead, or touched: order and count.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages(pub(crate) &'static str, pub(crate) usize);

/// Opened snapshot.
pub(crate) struct Instance {
    pub(crate) way: Way,
    pub(crate) server: Option<Process>,
    /// Path that VMs map; `-` for anonymous memory.
    pub(crate) path: String,
    dir: PathBuf,
    /// Time in which the snapshot was opened.
    pub(crate) opened: Duration,
}

impl Instance {
    pub(crate) fn open(way: Way, files: &Files) -> Result<Self, Failure> {
        let dir = files.dir.to_string_lossy();
        let kind = way.kind();
        let mut server = kind
            .map(|_| Process::spawn(&["server", &dir]))
            .transpose()?;
        let begun = Instant::now();
        let path = match (&mut server, kind) {
            (Some(server), Some(kind)) => server.ask(&format!("start {kind}"))?,
            _ => files.complete().display().to_string(),
        };
        Ok(Self {
            way,
            server,
            path,
            dir: files.dir.clone(),
            opened: begun.elapsed(),
        })
    }

    /// Starts a VM. `ahead` is prefetched if the way does that.
    pub(crate) fn start_vm(&mut self, ahead: Pages) -> Result<Vm, Failure> {
        match self.way {
            Way::Prefetch => self.start_vm_with(ahead),
            _ => self.start_vm_with(Pages("none", 0)),
        }
    }

    /// Starts a VM. A page server prefetches `ahead`.
    pub(crate) fn start_vm_with(&mut self, Pages(order, count): Pages) -> Result<Vm, Failure> {
        let mut process = Process::spawn(&["vm"])?;
        let begun = Instant::now();
        let pager = self.server.as_mut().filter(|_| self.way.has_pager());
        let kind = if pager.is_some() { "uffd" } else { "plain" };
        let map = format!("map {kind} {} {}", self.path, socket(&self.dir));
        let address = if let Some(pager) = pager {
            pager.send(&format!("serve {order} {count}"))?;
            let address = process.ask(&map)?;
            pager.reply()?;
            address
        } else {
            process.ask(&map)?
        };
        Ok(Vm {
            process,
            address: address.parse()?,
            ready: begun.elapsed(),
        })
    }

    /// Returns what the server has used so far.
    pub(crate) fn usage(&mut self) -> Result<Usage, Failure> {
        match &mut self.server {
            Some(server) => server.usage(),
            None => Ok(Usage {
                cpu_us: 0.0,
                faults: 0.0,
            }),
        }
    }

    /// Waits until everything is prefetched.
    pub(crate) fn wait_prefetched(&mut self) -> Result<(), Failure> {
        let server = self.server.as_mut().ok_or("no server")?;
        server.ask("prefetched")?;
        Ok(())
    }
}

fn socket(dir: &Path) -> String {
    dir.join("socket").display().to_string()
}

/// VM process with mapped memory.
pub(crate) struct Vm {
    pub(crate) process: Process,
    pub(crate) address: u64,
    /// Time in which its memory was set up.
    pub(crate) ready: Duration,
}

impl Vm {
    /// Touches pages. Returns the time in µs.
    pub(crate) fn touch(
        &mut self,
        Pages(order, count): Pages,
        threads: usize,
    ) -> Result<f64, Failure> {
        let command = format!("touch {order} {count} {threads}");
        Ok(self.process.ask_number(&command)? / 1000.0)
    }

    /// Writes to pages. Returns the time in µs.
    pub(crate) fn write(&mut self, Pages(order, count): Pages) -> Result<f64, Failure> {
        let command = format!("write {order} {count}");
        Ok(self.process.ask_number(&command)? / 1000.0)
    }
}
