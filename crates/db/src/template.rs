//! Rows of templates: the templates that the hosts last reported.

pub(crate) mod statements;

use sqlx::FromRow;

/// Columns of [`Template`], beginning with its key.
macro_rules! columns {
    () => {
        "name, type, vcpus, memory_mb, disk_size_mb, generation, size_bytes, created_at"
    };
}

use columns;

/// Stored template.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub struct Template {
    /// Template name.
    pub name: String,
    /// `base` or `snapshot`.
    #[sqlx(rename = "type")]
    pub kind: String,
    /// Number of virtual CPUs; 0 if a create request may choose it.
    #[sqlx(try_from = "i64")]
    pub vcpus: u32,
    /// Memory, in MiB; 0 if a create request may choose it.
    #[sqlx(try_from = "i64")]
    pub memory_mb: u32,
    /// Disk size, in MiB; 0 if a create request may choose it.
    #[sqlx(try_from = "i64")]
    pub disk_size_mb: u32,
    /// Number of earlier snapshots that the memory derives from; 0 for an image.
    #[sqlx(try_from = "i64")]
    pub generation: u32,
    /// Size on the host's disk, in bytes.
    #[sqlx(try_from = "i64")]
    pub size_bytes: u64,
    /// Creation time, in milliseconds since 1970.
    pub created_at: i64,
}
