//! The guest's memory: where it comes from at a restore, and where it goes at a freeze.
//!
//! Owns the image's memory (a memfd that all machines of one snapshot share), the page server, and the chain of diff files that
//! the machine stands on. Memory of a machine that was booted is the VMM's own.
//!
//! What the machine changed is always the same: the anonymous pages of its mapping. At a freeze they are compared with the
//! moment before, and what differs is written.

mod source;
mod writer;

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::EventfdFlags,
    fs::{MemfdFlags, Mode, OFlags, fchmod, ftruncate, memfd_create},
};
use tokio::io::unix::AsyncFd;
use wrenn_pager::{Backing, Failed, Options, PageRun, PageServer, Regions, handshake};
use wrenn_proto::supervise::{PagerStatus, RestoreSpec, SupervisorSpec};
use wrenn_snapshot::{BuildId, Chain, Header, WorkingSet, layout};

use crate::SupervisorError;

use source::ChainSource;
pub(crate) use writer::Written;

/// How long a VMM that has answered may take to have told where its memory is: it has done so before.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// How many first faults are remembered for the next restore: 256 MiB.
const RECORD_LIMIT: usize = 65_536;

/// Pages that lie between two of a prefetch and are loaded with them, bytes: a request more costs more than they do.
const PREFETCH_GAP_BYTES: u64 = 32 * 1024;

/// What the machine stands on.
#[derive(Clone)]
struct Parent {
    header: Header,
    chain: Arc<Chain>,
}

/// All about one guest's memory.
pub(crate) struct GuestMemory {
    bytes: u64,
    restore: Option<RestoreSpec>,
    /// Of the image; writable. None for a machine that boots.
    image: Option<OwnedFd>,
    /// The VMM's end is taken by the launch.
    ours: UnixStream,
    parent: Option<Parent>,
    /// Written, and not known to be published.
    pending: Option<Header>,
    prefetch: Vec<PageRun>,
    server: Option<PageServer>,
    regions: Option<Regions>,
}

/// What a VMM is started with.
pub(crate) struct VmmEnd {
    /// Guest memory, for reading only.
    pub(crate) memory: OwnedFd,
    /// Where it tells about its mapping.
    pub(crate) pager: OwnedFd,
    /// `/dev/userfaultfd`, at a restore.
    pub(crate) userfaultfd: Option<OwnedFd>,
}

impl GuestMemory {
    /// Opens what a machine needs. `image` is the memory of its snapshot.
    pub(crate) fn prepare(
        spec: &SupervisorSpec,
        image: Option<OwnedFd>,
    ) -> Result<(Self, VmmEnd), SupervisorError> {
        let bytes = u64::from(spec.memory_mib) * 1024 * 1024;
        let (ours, theirs) = UnixStream::pair().map_err(SupervisorError::io("make a socket"))?;
        let mut memory = Self {
            bytes,
            restore: spec.restore.clone(),
            image: None,
            ours,
            parent: None,
            pending: None,
            prefetch: Vec::new(),
            server: None,
            regions: None,
        };
        let Some(restore) = &spec.restore else {
            let size_only = memfd(bytes).map_err(SupervisorError::io("make a memory file"))?;
            let end = VmmEnd {
                memory: size_only,
                pager: theirs.into(),
                userfaultfd: None,
            };
            return Ok((memory, end));
        };
        let parent = open_parent(restore)?;
        if parent.header.memory_size() != bytes {
            return Err(SupervisorError::MemorySize {
                snapshot: parent.header.memory_size(),
                wanted: bytes,
            });
        }
        let image = match image {
            Some(image) => image,
            None => memfd(bytes).map_err(SupervisorError::io("make the image's memory"))?,
        };
        let read_only = reopen(&image, OFlags::RDONLY)
            .map_err(SupervisorError::io("open the image's memory"))?;
        let device = rustix::fs::open(
            "/dev/userfaultfd",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let device = device
            .map_err(io::Error::from)
            .map_err(SupervisorError::io("open /dev/userfaultfd"))?;
        memory.prefetch = prefetch_of(restore);
        memory.parent = Some(parent);
        memory.image = Some(image);
        let end = VmmEnd {
            memory: read_only,
            pager: theirs.into(),
            userfaultfd: Some(device),
        };
        Ok((memory, end))
    }

    /// Takes the VMM's word of where its memory is, and begins to serve it at a restore.
    pub(crate) fn attach(&mut self) -> Result<(), SupervisorError> {
        let never = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(SupervisorError::io("make an eventfd"))?;
        let deadline = Instant::now() + HANDSHAKE_DEADLINE;
        let (Some(image), Some(parent)) = (&self.image, &self.parent) else {
            let regions = handshake::receive_layout(&self.ours, never.as_fd(), deadline)?;
            self.regions = Some(regions);
            return Ok(());
        };
        let received = handshake::receive(&self.ours, never.as_fd(), deadline)?;
        self.regions = Some(received.regions.clone());
        let backing = image
            .try_clone()
            .map_err(SupervisorError::io("share the image's memory"))?;
        let options = Options {
            prefetch: self.prefetch.clone(),
            record_limit: RECORD_LIMIT,
        };
        let source = Arc::new(ChainSource::new(parent.chain.clone(), self.bytes));
        self.server = Some(PageServer::start(
            received,
            Backing::Shared(backing),
            source,
            options,
        )?);
        Ok(())
    }

    /// Waits until the guest's memory cannot be served any more; for a user: why. Never for a machine that was booted.
    pub(crate) fn failure(&self) -> Result<Failure, SupervisorError> {
        let Some(failed) = self.server.as_ref().map(PageServer::failed) else {
            return Ok(Failure(None));
        };
        let watched = failed.as_fd().try_clone_to_owned().and_then(watch);
        let watched = watched.map_err(SupervisorError::io("watch the page server"))?;
        Ok(Failure(Some((watched, failed))))
    }

    /// The image's memory, for the agent.
    pub(crate) fn image(&self) -> Option<&OwnedFd> {
        self.image.as_ref()
    }

    /// What the page server has done.
    pub(crate) fn status(&self) -> Option<PagerStatus> {
        let stats = self.server.as_ref()?.stats();
        let stored = self.parent.as_ref().map(|p| p.header.stored_bytes());
        Some(PagerStatus {
            faults: stats.demand_faults,
            zero_faults: stats.zero_faults,
            pages_loaded: stats.pages_loaded,
            pages_prefetched: stats.pages_prefetched,
            pages_stored: stored.unwrap_or(0) / wrenn_pager::PAGE_BYTES,
        })
    }

    /// The work of writing what a frozen machine of process `pid` holds to `staging`, for a thread that may block.
    pub(crate) fn writer(
        &self,
        staging: &Path,
        build: &str,
        pid: u32,
    ) -> Result<impl FnOnce() -> Result<Written, SupervisorError> + Send + 'static, SupervisorError>
    {
        let build: BuildId = build
            .parse()
            .map_err(|_| SupervisorError::Build(build.to_owned()))?;
        let region = match self.regions.as_ref().map(Regions::as_slice) {
            Some([region]) if region.len == self.bytes => region.address,
            _ => return Err(SupervisorError::Layout),
        };
        let job = writer::Job {
            staging: staging.to_owned(),
            build,
            pid,
            base: region,
            bytes: self.bytes,
            parent: self.parent.clone().map(|p| (p.header, p.chain)),
            working_set: self.working_set(),
        };
        Ok(move || job.run())
    }

    /// Notes what was written, until it is known whether it was published.
    pub(crate) fn wrote(&mut self, header: Header) {
        self.pending = Some(header);
    }

    /// The next freeze is compared with what was written last, if that was published to `dir`.
    pub(crate) fn published(&mut self, published: bool, dir: &Path) -> Result<(), SupervisorError> {
        let Some(header) = self.pending.take().filter(|_| published) else {
            return Ok(());
        };
        let mut dirs = vec![dir.to_owned()];
        dirs.extend(self.restore.iter().flat_map(|r| r.memory.clone()));
        let chain = Chain::open(&dirs, &header)?;
        self.parent = Some(Parent {
            header,
            chain: Arc::new(chain),
        });
        Ok(())
    }

    /// Pages that were needed since the restore, those that were loaded ahead first.
    pub(crate) fn working_set(&self) -> Vec<PageRun> {
        let Some(server) = &self.server else {
            return Vec::new();
        };
        let mut offsets: Vec<u64> = self
            .prefetch
            .iter()
            .flat_map(|run| (run.offset..run.end()).step_by(4096))
            .collect();
        offsets.extend(server.recorded());
        PageRun::covering(&offsets, PREFETCH_GAP_BYTES)
    }

    /// Keeps the pages that were needed for others who are restored from the same snapshot, if nobody has done so yet.
    pub(crate) fn keep_working_set(&self) {
        let Some(restore) = &self.restore else {
            return;
        };
        let path = restore.snapshot.join(layout::WORKING_SET);
        let runs = self.working_set();
        if path.exists() || runs.is_empty() {
            return;
        }
        if let Err(error) = writer::write_working_set(&path, &runs) {
            tracing::warn!(%error, "the working set was not kept");
        }
    }
}

/// Ends when memory cannot be served any more.
pub(crate) struct Failure(Option<(AsyncFd<OwnedFd>, Failed)>);

impl Failure {
    /// Cancel safe.
    pub(crate) async fn occurred(&self) -> String {
        let Some((watched, failed)) = &self.0 else {
            return std::future::pending().await;
        };
        // An error means that the descriptor cannot be watched: as bad as a failure.
        let _ = watched.readable().await;
        failed
            .reason()
            .unwrap_or("the page server cannot be watched")
            .to_owned()
    }
}

#[expect(
    deprecated,
    reason = "what follows it is unsafe for the sake of types that give away another descriptor; this one owns its own"
)]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

fn open_parent(restore: &RestoreSpec) -> Result<Parent, SupervisorError> {
    let path = restore.snapshot.join(layout::HEADER);
    let bytes = fs::read(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    let header =
        Header::parse(&bytes).map_err(|source| SupervisorError::Header { path, source })?;
    let chain = Arc::new(Chain::open(&restore.memory, &header)?);
    Ok(Parent { header, chain })
}

/// What to load ahead. Without a record of an earlier restore there is nothing to go by; a damaged one is as good as none.
fn prefetch_of(restore: &RestoreSpec) -> Vec<PageRun> {
    if !restore.prefetch {
        return Vec::new();
    }
    let path: PathBuf = restore.snapshot.join(layout::WORKING_SET);
    let Ok(bytes) = fs::read(&path) else {
        return Vec::new();
    };
    match WorkingSet::parse(&bytes) {
        Ok(set) => writer::runs_of(&set),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the working set is not used");
            Vec::new()
        }
    }
}

/// A file without a name, which nobody but root can open for writing.
fn memfd(bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(c"guest-memory", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, bytes)?;
    fchmod(&fd, Mode::RUSR)?;
    Ok(fd)
}

fn reopen(fd: &OwnedFd, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(rustix::fs::open(
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}
