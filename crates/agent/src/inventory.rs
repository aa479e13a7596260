//! Inventory of this host: its capacity, and everything that sandboxes can be created from.

use std::{io, sync::Arc};

use crate::{
    host::HostCapacity,
    sandbox::resources::HostContext,
    snapshots::{SnapshotError, TaggedSnapshot},
    templates::{Template, TemplateError},
};

/// Failure to read the inventory of this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InventoryError {
    /// The properties of the host cannot be read.
    #[error("failed to read the capacity of this host")]
    Capacity(#[source] io::Error),
    #[error(transparent)]
    Templates(#[from] TemplateError),
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    /// A task of the agent panicked.
    #[error("internal error of the host agent; see its log")]
    Panicked,
}

/// Capacity of this host, and everything that sandboxes can be created from.
#[derive(Debug)]
pub(crate) struct Inventory {
    pub(crate) capacity: HostCapacity,
    pub(crate) templates: Vec<Template>,
    pub(crate) snapshots: Vec<Arc<TaggedSnapshot>>,
}

impl Inventory {
    /// Reads the inventory. May block.
    pub(crate) fn read(host: &HostContext) -> Result<Self, InventoryError> {
        Ok(Self {
            capacity: HostCapacity::read(&host.config.data_dir)
                .map_err(InventoryError::Capacity)?,
            templates: host.templates.templates()?,
            snapshots: host.snapshots.all_named()?,
        })
    }
}
