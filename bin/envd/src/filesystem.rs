//! Service `filesystem.Filesystem`, a thin layer over [`entry`] and [`watch`]. File operations
//! block, so they run on separate threads.

pub mod entry;
pub mod metadata;
pub mod mount;
pub mod watch;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures::{StreamExt as _, stream};
use tokio::time::timeout;
use wrenn_proto::rpc::filesystem::{
    self as rpc, __buffa::oneof::watch_dir_response::Event as WatchEvent,
};

use self::watch::{Watch, WatchOptions, Watchers};
use crate::{
    auth,
    paths::{self, is_link_cycle},
    settings::Settings,
    users::User,
};

const KEEPALIVE: Duration = Duration::from_secs(90);

/// Implementation of the service.
pub struct FilesystemService {
    settings: Arc<Settings>,
    watchers: Arc<Watchers>,
}

/// Failure of a call on a path, before its conversion to the client's protocol.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The kernel rejected the operation.
    #[error("path '{}': {source}", path.display())]
    Io {
        /// Path of the operation.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The directory exists already.
    #[error("directory already exists: {}", .0.display())]
    DirectoryExists(PathBuf),
    /// Something that is not a directory exists at the path.
    #[error("path already exists but it is not a directory: {}", .0.display())]
    NotADirectoryThere(PathBuf),
    /// The path is not a directory.
    #[error("path is not a directory: {}", .0.display())]
    NotADirectory(PathBuf),
    /// Symbolic links form a cycle.
    #[error("cyclic symlink or chain >255 links at '{}'", .0.display())]
    LinkCycle(PathBuf),
    /// Changes came faster than the client took them.
    #[error("too many changes, some events are lost")]
    EventsLost,
    /// The watched directory no longer exists at its path.
    #[error("the watched directory was removed or moved: {}", .0.display())]
    WatchEnded(PathBuf),
    /// The path is on a network file system, which reports no events.
    #[error("cannot watch path on network filesystem: {}", .0.display())]
    NetworkMount(PathBuf),
}

impl FileError {
    /// Returns a conversion of an I/O error at a path.
    pub fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

impl From<FileError> for ConnectError {
    fn from(error: FileError) -> Self {
        let text = error.to_string();
        match error {
            FileError::DirectoryExists(_) => Self::already_exists(text),
            FileError::NotADirectoryThere(_)
            | FileError::NotADirectory(_)
            | FileError::NetworkMount(_) => Self::invalid_argument(text),
            FileError::EventsLost => Self::data_loss(text),
            FileError::WatchEnded(_) => Self::not_found(text),
            FileError::LinkCycle(_) => Self::failed_precondition(text),
            FileError::Io { source, .. } if is_link_cycle(&source) => {
                Self::failed_precondition(text)
            }
            FileError::Io { source, .. } if is_exhaustion(&source) => {
                Self::resource_exhausted(text)
            }
            FileError::Io { source, path } => match source.kind() {
                io::ErrorKind::NotFound => {
                    Self::not_found(format!("path not found: {}", path.display()))
                }
                io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidFilename
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::AlreadyExists
                | io::ErrorKind::CrossesDevices
                | io::ErrorKind::DirectoryNotEmpty
                // The kernel rejects operations of root only where they are impossible, as in /sys.
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem => Self::invalid_argument(text),
                // The path is a mount point or a program that is being executed.
                io::ErrorKind::ResourceBusy | io::ErrorKind::ExecutableFileBusy => {
                    Self::failed_precondition(text)
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    Self::resource_exhausted(text)
                }
                _ => Self::internal(text),
            },
        }
    }
}

/// True if no descriptor or watch is available. The request itself is valid.
fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    )
}

impl FilesystemService {
    /// Creates a service over shared state.
    #[must_use]
    pub fn new(settings: Arc<Settings>, watchers: Arc<Watchers>) -> Self {
        Self { settings, watchers }
    }

    fn resolve(
        &self,
        context: &RequestContext,
        path: &str,
    ) -> Result<(PathBuf, User), ConnectError> {
        let user = auth::rpc_user(context, &self.settings)?;
        let default = self.settings.default_workdir();
        let path = paths::resolve(path, &user, default.as_deref())
            .map_err(|e| ConnectError::invalid_argument(e.to_string()))?;
        Ok((path, user))
    }

    async fn open_watch(
        &self,
        context: &RequestContext,
        path: &str,
        options: WatchOptions,
    ) -> Result<Watch, ConnectError> {
        let (path, _) = self.resolve(context, path)?;
        blocking(move || Watch::open(&path, options)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, ConnectError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(ConnectError::internal(format!(
            "file operation failed: {error}"
        ))),
    }
}

#[expect(refining_impl_trait, reason = "plain messages")]
impl rpc::Filesystem for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::StatRequest>,
    ) -> ServiceResult<rpc::StatResponse> {
        let (path, _) = self.resolve(&context, request.path)?;
        let entry = blocking(move || entry::stat(&path)).await?;
        Response::ok(rpc::StatResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::MakeDirRequest>,
    ) -> ServiceResult<rpc::MakeDirResponse> {
        let (path, user) = self.resolve(&context, request.path)?;
        let entry = blocking(move || entry::make_dir(&path, &user)).await?;
        Response::ok(rpc::MakeDirResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::MoveRequest>,
    ) -> ServiceResult<rpc::MoveResponse> {
        let (source, user) = self.resolve(&context, request.source)?;
        let (destination, _) = self.resolve(&context, request.destination)?;
        let entry = blocking(move || entry::rename(&source, &destination, &user)).await?;
        Response::ok(rpc::MoveResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::ListDirRequest>,
    ) -> ServiceResult<rpc::ListDirResponse> {
        let (path, _) = self.resolve(&context, request.path)?;
        let depth = request.depth.max(1);
        let entries = blocking(move || entry::list(&path, depth)).await?;
        Response::ok(rpc::ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::RemoveRequest>,
    ) -> ServiceResult<rpc::RemoveResponse> {
        let (path, _) = self.resolve(&context, request.path)?;
        blocking(move || entry::remove(&path)).await?;
        Response::ok(rpc::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<rpc::WatchDirResponse>> {
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = self.open_watch(&context, request.path, options).await?;
        let keepalive = context
            .header("keepalive-ping-interval")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .filter(|seconds| *seconds > 0)
            .map_or(KEEPALIVE, Duration::from_secs);
        let wire = |event: WatchEvent| {
            Ok(rpc::WatchDirResponse {
                event: Some(event),
                ..Default::default()
            })
        };
        let start = rpc::watch_dir_response::StartEvent::default();
        let first = stream::once(async move { wire(start.into()) });
        let rest = stream::unfold(watch, move |mut watch| async move {
            let event = match timeout(keepalive, watch.next()).await {
                Err(_) => wire(rpc::watch_dir_response::KeepAlive::default().into()),
                Ok(event) => match event? {
                    Ok(event) => wire(event.into()),
                    Err(error) => Err(error.into()),
                },
            };
            Some((event, watch))
        });
        Response::stream_ok(first.chain(rest))
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::CreateWatcherRequest>,
    ) -> ServiceResult<rpc::CreateWatcherResponse> {
        let options = WatchOptions {
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = self.open_watch(&context, request.path, options).await?;
        let watcher_id = self
            .watchers
            .add(watch)
            .map_err(ConnectError::resource_exhausted)?;
        Response::ok(rpc::CreateWatcherResponse {
            watcher_id,
            ..Default::default()
        })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::GetWatcherEventsRequest>,
    ) -> ServiceResult<rpc::GetWatcherEventsResponse> {
        let events = self
            .watchers
            .take_events(request.watcher_id)
            .await
            .ok_or_else(|| unknown_watcher(request.watcher_id))??;
        Response::ok(rpc::GetWatcherEventsResponse {
            events,
            ..Default::default()
        })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::RemoveWatcherRequest>,
    ) -> ServiceResult<rpc::RemoveWatcherResponse> {
        if !self.watchers.remove(request.watcher_id) {
            return Err(unknown_watcher(request.watcher_id));
        }
        Response::ok(rpc::RemoveWatcherResponse::default())
    }
}

fn unknown_watcher(id: &str) -> ConnectError {
    ConnectError::not_found(format!("watcher with id {id} not found"))
}
