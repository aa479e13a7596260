//! Snapshots with a name, from which sandboxes can be created.

use wrenn_model::TemplateName;
use wrenn_sys::failpoint;

use super::{
    super::{LifecycleError, Sandbox},
    SandboxService,
};
use crate::{
    admission::AdmissionError,
    sandbox::resources::HostContext,
    snapshots::{RemoteError, SnapshotError, TaggedSnapshot},
    templates::TemplateError,
};

/// Failure to take a snapshot and to give it a name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamedSnapshotError {
    /// A template has this name.
    #[error("`name`: template `{0}` already exists")]
    Taken(TemplateName),
    /// The snapshot was not taken.
    #[error(transparent)]
    Sandbox(#[from] LifecycleError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The snapshot was taken, and has no name.
    #[error(transparent)]
    Store(#[from] SnapshotError),
    /// A task of the agent panicked.
    #[error("internal error of the host agent; see its log")]
    Panicked,
}

/// Failure to remove the name of a snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeleteSnapshotError {
    /// No snapshot has this name.
    #[error("there is no snapshot `{0}`")]
    Unknown(TemplateName),
    /// Sandboxes were created from the snapshot.
    #[error("snapshot `{name}` is in use by {sandboxes} sandboxes; destroy them first")]
    InUse {
        name: TemplateName,
        sandboxes: usize,
    },
    #[error(transparent)]
    Store(#[from] SnapshotError),
    /// A task of the agent panicked.
    #[error("internal error of the host agent; see its log")]
    Panicked,
}

/// Failure to write a snapshot to the object store, or to take one from it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteSnapshotError {
    /// A template has this name.
    #[error("`name`: template `{0}` already exists")]
    Taken(TemplateName),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// There is no space for another snapshot.
    #[error(transparent)]
    Space(#[from] AdmissionError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A task of the agent panicked.
    #[error("internal error of the host agent; see its log")]
    Panicked,
}

impl From<NamedSnapshotError> for RemoteSnapshotError {
    fn from(error: NamedSnapshotError) -> Self {
        match error {
            NamedSnapshotError::Taken(name) => Self::Taken(name),
            NamedSnapshotError::Template(error) => Self::Template(error),
            NamedSnapshotError::Store(error) => Self::Remote(error.into()),
            NamedSnapshotError::Sandbox(_) | NamedSnapshotError::Panicked => Self::Panicked,
        }
    }
}

impl SandboxService {
    /// Writes a named snapshot to the object store.
    pub(crate) async fn push_snapshot(
        &self,
        name: TemplateName,
    ) -> Result<(), RemoteSnapshotError> {
        let host = self.actors.host.clone();
        let pushed = tokio::task::spawn_blocking(move || host.snapshots.push(&name));
        Ok(pushed.await.map_err(|_| RemoteSnapshotError::Panicked)??)
    }

    /// Takes a named snapshot from the object store. With `overwrite`, the name may belong to
    /// another snapshot.
    pub(crate) async fn pull_snapshot(
        &self,
        name: TemplateName,
        overwrite: bool,
    ) -> Result<TaggedSnapshot, RemoteSnapshotError> {
        let host = self.actors.host.clone();
        let pulled = tokio::task::spawn_blocking(move || {
            // Checked before anything is loaded.
            require_free_name(&host, &name, overwrite)?;
            host.disk_space.check_create()?;
            Ok::<_, RemoteSnapshotError>(host.snapshots.pull(&name, overwrite)?)
        });
        let pulled = pulled.await.map_err(|_| RemoteSnapshotError::Panicked)?;
        // What a failed pull left, or the previous snapshot of this name.
        self.actors.collect_snapshots();
        pulled
    }

    /// Takes a snapshot of a sandbox, which keeps running, and gives it a name. With `overwrite`,
    /// the name may belong to another snapshot.
    pub(crate) async fn snapshot_as(
        &self,
        sandbox: &Sandbox,
        name: TemplateName,
        overwrite: bool,
    ) -> Result<TaggedSnapshot, NamedSnapshotError> {
        // Checked before the VM is paused. Of two concurrent calls, the faster one gets the name.
        let (host, wanted) = (self.actors.host.clone(), name.clone());
        let checked =
            tokio::task::spawn_blocking(move || require_free_name(&host, &wanted, overwrite));
        checked.await.map_err(|_| NamedSnapshotError::Panicked)??;
        let pin = sandbox.snapshot().await?;
        failpoint::hit("agent.name.published", None);
        let host = self.actors.host.clone();
        let named =
            tokio::task::spawn_blocking(move || host.snapshots.name(&name, &pin, overwrite));
        let named = named.await.map_err(|_| NamedSnapshotError::Panicked)??;
        failpoint::hit("agent.name.set", None);
        // The previous snapshot of this name may have lost its last reference.
        self.actors.collect_snapshots();
        Ok(named)
    }

    /// Removes the name of a snapshot, unless sandboxes were created from it. With `force`, removes
    /// the name even then: the actors of these sandboxes hold references to the snapshots that they
    /// depend on, which are collected when the last reference is gone.
    pub(crate) async fn delete_snapshot(
        &self,
        name: TemplateName,
        force: bool,
    ) -> Result<(), DeleteSnapshotError> {
        let all = self.actors.registry.list();
        let sandboxes = all.iter().filter(|s| s.facts.template == name).count();
        let host = self.actors.host.clone();
        let removed = tokio::task::spawn_blocking(move || {
            if !host.snapshots.has_name(&name) {
                return Err(DeleteSnapshotError::Unknown(name));
            }
            if sandboxes > 0 && !force {
                return Err(DeleteSnapshotError::InUse { name, sandboxes });
            }
            host.snapshots.unname(&name)?;
            Ok(())
        });
        removed.await.map_err(|_| DeleteSnapshotError::Panicked)??;
        self.actors.collect_snapshots();
        Ok(())
    }
}

/// Rejects a name that a template has, or that another snapshot has unless it may be overwritten.
fn require_free_name(
    host: &HostContext,
    name: &TemplateName,
    overwrite: bool,
) -> Result<(), NamedSnapshotError> {
    let is_taken = match host.templates.template(name) {
        Ok(_) => true,
        Err(TemplateError::NotFound(_)) => !overwrite && host.snapshots.has_name(name),
        Err(error) => return Err(error.into()),
    };
    if is_taken {
        return Err(NamedSnapshotError::Taken(name.clone()));
    }
    Ok(())
}
