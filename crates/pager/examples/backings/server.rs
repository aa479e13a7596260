//! Process that serves guest memory, in place of a supervisor.

use std::{
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fuser::BackgroundSession;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{event::EventfdFlags, fs::MemfdFlags};
use wrenn_pager::{Backing, MemorySource, Options, PageRun, PageServer, handshake};

use crate::{
    Failure, fuse, process,
    source::{ChainSource, MEMORY_BYTES, Mode, PAGE},
    vm::pages,
};

/// Longest gap that a prefetch list covers, as in the supervisor.
const PREFETCH_GAP_BYTES: u64 = 32 * 1024;

struct Server {
    dir: PathBuf,
    mode: Arc<Mode>,
    source: Option<Arc<dyn MemorySource>>,
    listener: Option<UnixListener>,
    memfd: Option<OwnedFd>,
    pagers: Vec<PageServer>,
    session: Option<BackgroundSession>,
}

pub(crate) fn run(dir: &Path) -> Result<(), Failure> {
    // The mount of the FUSE file ends with this process and the VMs, even if they are killed.
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    let mut server = Server {
        dir: dir.to_owned(),
        mode: Arc::default(),
        source: None,
        listener: None,
        memfd: None,
        pagers: Vec::new(),
        session: None,
    };
    process::serve(|words| server.run(words))
}

impl Server {
    fn run(&mut self, words: &[&str]) -> Result<String, Failure> {
        match *words {
            ["start", kind] => self.start(kind),
            ["serve", order, count] => self.serve(order, count.parse()?),
            ["prefetched"] => self.prefetched(),
            ["fail"] => {
                self.mode.fail();
                Ok("fails".to_owned())
            }
            ["stall"] => {
                self.mode.stall();
                Ok("stalls".to_owned())
            }
            _ => Err("unknown command".into()),
        }
    }

    /// Opens the snapshot. Returns the path that a VM maps, or `-` for anonymous memory.
    fn start(&mut self, kind: &str) -> Result<String, Failure> {
        let source = ChainSource::open(&self.dir, Arc::clone(&self.mode))?;
        let source: Arc<dyn MemorySource> = Arc::new(source);
        self.source = Some(Arc::clone(&source));
        let path = match kind {
            "fuse" | "fuse-page" => {
                let dir = self.dir.join("mount");
                self.session = Some(fuse::mount(&dir, source, kind == "fuse")?);
                let path = dir.join(fuse::NAME);
                return Ok(format!(
                    "/proc/{}/root{}",
                    std::process::id(),
                    path.display()
                ));
            }
            "shared" => {
                let memfd = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&memfd, MEMORY_BYTES as u64)?;
                let path = format!("/proc/{}/fd/{}", std::process::id(), memfd.as_raw_fd());
                self.memfd = Some(memfd);
                path
            }
            _ => "-".to_owned(),
        };
        let socket = self.dir.join("socket");
        let _ = std::fs::remove_file(&socket);
        self.listener = Some(UnixListener::bind(&socket)?);
        Ok(path)
    }

    /// Accepts one VM and starts its page server.
    fn serve(&mut self, order: &str, count: usize) -> Result<String, Failure> {
        let listener = self.listener.as_ref().ok_or("not started")?;
        let never = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        let handshake = handshake::accept(listener, never.as_fd(), deadline)?;
        let backing = match &self.memfd {
            Some(memfd) => Backing::Shared(memfd.try_clone()?),
            None => Backing::Private,
        };
        let options = Options {
            prefetch: prefetch(order, count),
            record_limit: 100_000,
        };
        let source = self.source.clone().ok_or("not started")?;
        let pager = PageServer::start(handshake, backing, source, options)?;
        self.pagers.push(pager);
        Ok("served".to_owned())
    }

    fn prefetched(&self) -> Result<String, Failure> {
        let pager = self.pagers.last().ok_or("not served")?;
        while !pager.stats().prefetch_done {
            if let Some(reason) = pager.failed().reason() {
                return Err(reason.into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok("prefetched".to_owned())
    }
}

fn prefetch(order: &str, count: usize) -> Vec<PageRun> {
    match order {
        "none" => Vec::new(),
        "all" => vec![PageRun {
            offset: 0,
            len: MEMORY_BYTES as u64,
        }],
        _ => {
            let offset = |page: &usize| (page * PAGE) as u64;
            let offsets: Vec<u64> = pages(order, count).iter().map(offset).collect();
            PageRun::covering(&offsets, PREFETCH_GAP_BYTES)
        }
    }
}
