//! Guest memory: its source in a restore, and its destination in a snapshot.
//!
//! Owns the shared memory of the snapshot (a memfd that all VMs of the snapshot map), the page
//! server, and the chain of diff files that the VM depends on. The memory of a booted VM belongs to
//! the VMM.
//!
//! The pages that a VM has changed are the anonymous pages of its mapping, and the pages of zeros
//! that replace what the guest gave back; or the VMM writes them to a file ([`SavedMemory`]). A
//! snapshot compares them with the parent snapshot and writes those that differ.

mod remote;
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
use wrenn_snapshot::{Chain, Header, SnapshotId, WorkingSet, layout};
use wrenn_vmm::SavedMemory;

use crate::SupervisorError;

use remote::RemoteMemory;
use source::ChainSource;
use writer::VmMemory;
pub(crate) use writer::Written;

/// Maximum time until a VMM that has responded has sent its handshake. The VMM sends the handshake
/// before its first response.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Maximum time until a VMM that loads a snapshot has sent its handshake. If the load fails, the
/// wait ends at once.
const LOAD_DEADLINE: Duration = Duration::from_secs(120);

/// Maximum number of first faults to record for the next restore: 256 MiB.
const RECORD_LIMIT: usize = 65_536;

/// Maximum gap between two prefetched pages that is loaded with them, in bytes. Loading such a gap
/// costs less than another request.
const PREFETCH_GAP_BYTES: u64 = 32 * 1024;

/// Snapshot that the VM depends on.
#[derive(Clone)]
struct Parent {
    header: Header,
    chain: Arc<Chain>,
}

/// Memory of one guest.
pub(crate) struct GuestMemory {
    bytes: u64,
    restore: Option<RestoreSpec>,
    /// Shared memory of the snapshot, writable; `None` for a VM that boots.
    image: Option<OwnedFd>,
    /// Supervisor's end of the socket. The launch takes the VMM's end.
    ours: UnixStream,
    parent: Option<Parent>,
    /// Diff files of the snapshot that are in an object store.
    remote: Option<RemoteMemory>,
    /// Header of a written snapshot whose publication is not confirmed yet.
    pending: Option<Header>,
    prefetch: Vec<PageRun>,
    server: Option<PageServer>,
    regions: Option<Regions>,
}

/// Page server of a restored VM, and the location of the memory.
pub(crate) struct Attached {
    regions: Regions,
    server: PageServer,
    /// True if the memory is that of the snapshot, which other VMs can map.
    is_shared: bool,
}

/// Descriptors that a VMM needs at its start.
pub(crate) struct VmmFds {
    /// Guest memory, read-only.
    pub(crate) memory: OwnedFd,
    /// Socket on which the VMM reports its mapping.
    pub(crate) pager: OwnedFd,
    /// `/dev/userfaultfd`, for a restore only.
    pub(crate) userfaultfd: Option<OwnedFd>,
}

impl GuestMemory {
    /// Opens the resources that a VM needs. `image` is the shared memory of its snapshot, if the
    /// agent already has it.
    pub(crate) fn prepare(
        spec: &SupervisorSpec,
        image: Option<OwnedFd>,
    ) -> Result<(Self, VmmFds), SupervisorError> {
        let bytes = spec.size.memory_bytes();
        let (ours, theirs) =
            UnixStream::pair().map_err(SupervisorError::io("create a socket pair"))?;
        let mut memory = Self {
            bytes,
            restore: spec.restore.clone(),
            image: None,
            ours,
            parent: None,
            remote: None,
            pending: None,
            prefetch: Vec::new(),
            server: None,
            regions: None,
        };
        let Some(restore) = &spec.restore else {
            let size_only = memfd(bytes).map_err(SupervisorError::io("create a memory file"))?;
            let end = VmmFds {
                memory: size_only,
                pager: theirs.into(),
                userfaultfd: None,
            };
            return Ok((memory, end));
        };
        memory.remote = RemoteMemory::open(restore)?;
        let parent = open_parent(restore, memory.remote.as_ref())?;
        if parent.header.memory_size() != bytes {
            return Err(SupervisorError::MemorySize {
                snapshot: parent.header.memory_size(),
                expected: bytes,
            });
        }
        let image = match image {
            Some(image) => image,
            None => {
                memfd(bytes).map_err(SupervisorError::io("create the snapshot's memory file"))?
            }
        };
        let read_only = reopen(&image, OFlags::RDONLY)
            .map_err(SupervisorError::io("open the snapshot's memory file"))?;
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
        let end = VmmFds {
            memory: read_only,
            pager: theirs.into(),
            userfaultfd: Some(device),
        };
        Ok((memory, end))
    }

    /// Receives the location of guest memory from the VMM. In a restore, also starts the page
    /// server, on memory that all VMs of the snapshot share.
    pub(crate) fn attach(&mut self) -> Result<(), SupervisorError> {
        let Some(image) = &self.image else {
            let never = never()?;
            let deadline = Instant::now() + HANDSHAKE_DEADLINE;
            let regions = handshake::receive_layout(&self.ours, never.as_fd(), deadline)?;
            self.regions = Some(regions);
            return Ok(());
        };
        let backing = image
            .try_clone()
            .map_err(SupervisorError::io("duplicate the snapshot's memory file"))?;
        let job = self.attach_job(Backing::Shared(backing), HANDSHAKE_DEADLINE)?;
        self.attached(job()?);
        Ok(())
    }

    /// Returns a job that waits until the VMM hands over its memory, and starts the page server on
    /// memory of this VM only. The job blocks, so it must run on a thread that may block. It ends
    /// early if the VMM's end of the socket is closed.
    pub(crate) fn attach_later(
        &self,
    ) -> Result<impl FnOnce() -> Result<Attached, SupervisorError> + Send + 'static, SupervisorError>
    {
        self.attach_job(Backing::Private, LOAD_DEADLINE)
    }

    fn attach_job(
        &self,
        backing: Backing,
        limit: Duration,
    ) -> Result<impl FnOnce() -> Result<Attached, SupervisorError> + Send + 'static, SupervisorError>
    {
        let parent = self.parent.as_ref().ok_or(SupervisorError::Layout)?;
        let source = Arc::new(ChainSource::new(parent.chain.clone(), self.bytes));
        let ours = self.ours.try_clone();
        let ours = ours.map_err(SupervisorError::io("duplicate a socket"))?;
        let never = never()?;
        let options = Options {
            prefetch: self.prefetch.clone(),
            record_limit: RECORD_LIMIT,
        };
        let is_shared = matches!(backing, Backing::Shared(_));
        Ok(move || {
            let received = handshake::receive(&ours, never.as_fd(), Instant::now() + limit)?;
            let regions = received.regions.clone();
            let server = PageServer::start(received, backing, source, options)?;
            Ok(Attached {
                regions,
                server,
                is_shared,
            })
        })
    }

    /// Takes the page server that [`attach_later`](Self::attach_later) started.
    pub(crate) fn attached(&mut self, attached: Attached) {
        if !attached.is_shared {
            // Empty, and no other VM can use it.
            self.image = None;
        }
        self.regions = Some(attached.regions);
        self.server = Some(attached.server);
    }

    /// Returns the notification that guest memory can no longer be served. For a booted VM, it
    /// never fires.
    pub(crate) fn failure(&self) -> Result<Failure, SupervisorError> {
        let Some(failed) = self.server.as_ref().map(PageServer::failed) else {
            return Ok(Failure(None));
        };
        let watched = failed.as_fd().try_clone_to_owned().and_then(watch);
        let watched = watched.map_err(SupervisorError::io("watch the page server"))?;
        Ok(Failure(Some((watched, failed))))
    }

    /// Returns the shared memory of the snapshot, for the agent.
    pub(crate) fn image(&self) -> Option<&OwnedFd> {
        self.image.as_ref()
    }

    /// Returns the counters of the page server.
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

    /// Returns a job that writes the memory of the paused VM in process `pid` to `staging`. `saved`
    /// is the place where its VMM left the memory. The job blocks, so it must run on a thread that
    /// may block.
    pub(crate) fn writer(
        &self,
        staging: &Path,
        build: &str,
        pid: u32,
        saved: SavedMemory,
    ) -> Result<impl FnOnce() -> Result<Written, SupervisorError> + Send + 'static, SupervisorError>
    {
        let build: SnapshotId = build
            .parse()
            .map_err(|_| SupervisorError::Build(build.to_owned()))?;
        let memory = match saved {
            SavedMemory::PageTables => VmMemory::Process {
                pid,
                base: self.address()?,
            },
            SavedMemory::File(file) => VmMemory::File(file.into()),
        };
        let job = writer::DiffJob {
            staging: staging.to_owned(),
            build,
            memory,
            bytes: self.bytes,
            parent: self.parent.clone().map(|p| (p.header, p.chain)),
            is_booted: self.restore.is_none(),
            working_set: self.working_set(),
        };
        Ok(move || job.run())
    }

    /// Returns the address of guest memory in the VMM.
    fn address(&self) -> Result<u64, SupervisorError> {
        match self.regions.as_ref().map(Regions::as_slice) {
            Some([region]) if region.len == self.bytes => Ok(region.address),
            _ => Err(SupervisorError::Layout),
        }
    }

    /// Stores the header of a written snapshot until its publication is confirmed.
    pub(crate) fn wrote(&mut self, header: Header) {
        self.pending = Some(header);
    }

    /// Makes the last written snapshot the parent of the next one, if it was published to `dir`.
    pub(crate) fn published(&mut self, published: bool, dir: &Path) -> Result<(), SupervisorError> {
        let Some(header) = self.pending.take().filter(|_| published) else {
            return Ok(());
        };
        let mut dirs = vec![dir.to_owned()];
        dirs.extend(self.restore.iter().flat_map(|r| r.memory.clone()));
        let chain = open_chain(&dirs, &header, self.remote.as_ref())?;
        self.parent = Some(Parent {
            header,
            chain: Arc::new(chain),
        });
        Ok(())
    }

    /// Returns the pages that were needed since the restore, prefetched pages first.
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

    /// Saves the needed pages for other restores of the same snapshot, unless they are saved
    /// already.
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
            tracing::warn!(%error, "working set not saved");
        }
    }
}

/// Notification that guest memory can no longer be served.
pub(crate) struct Failure(Option<(AsyncFd<OwnedFd>, Failed)>);

impl Failure {
    /// Waits for the failure and returns its reason. Cancel safe.
    pub(crate) async fn occurred(&self) -> String {
        let Some((watched, failed)) = &self.0 else {
            return std::future::pending().await;
        };
        // An error means that the descriptor cannot be watched, which is treated as a failure.
        let _ = watched.readable().await;
        failed
            .reason()
            .unwrap_or("failed to watch the page server")
            .to_owned()
    }
}

#[expect(
    deprecated,
    reason = "the replacement is unsafe because of types that return another descriptor; `OwnedFd` returns its own"
)]
fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}

fn open_chain(
    dirs: &[PathBuf],
    header: &Header,
    remote: Option<&RemoteMemory>,
) -> Result<Chain, SupervisorError> {
    let remote = |build| remote.map_or(Ok(None), |remote| remote.diff(build));
    Ok(Chain::open_with(dirs, header, &remote)?)
}

fn open_parent(
    restore: &RestoreSpec,
    remote: Option<&RemoteMemory>,
) -> Result<Parent, SupervisorError> {
    let path = restore.snapshot.join(layout::HEADER);
    let bytes = fs::read(&path).map_err(|source| SupervisorError::ReadSpec {
        path: path.clone(),
        source,
    })?;
    let header =
        Header::parse(&bytes).map_err(|source| SupervisorError::Header { path, source })?;
    let chain = Arc::new(open_chain(&restore.memory, &header, remote)?);
    Ok(Parent { header, chain })
}

/// Returns the pages to prefetch. Without a usable record of an earlier restore, nothing is
/// prefetched.
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
            tracing::warn!(path = %path.display(), %error, "working set ignored");
            Vec::new()
        }
    }
}

/// Returns a descriptor that never becomes readable.
fn never() -> Result<OwnedFd, SupervisorError> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
        .map_err(io::Error::from)
        .map_err(SupervisorError::io("create an eventfd"))
}

/// Creates a memfd that only root can open for writing.
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
