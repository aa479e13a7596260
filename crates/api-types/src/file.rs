//! Files and directories of a guest.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `/files/read`, `/files/stream/read`, `/files/mkdir` and `/files/remove`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Path in the guest. `~` is the user's home directory, and a relative path starts there.
    pub path: String,
    /// User whose home directory and ownership apply. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Body of `/files/list`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ListFiles {
    /// Directory in the guest.
    pub path: String,
    /// Depth of the listing; default 1, the direct children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<i64>,
    /// User whose home directory applies. Default: defined by the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Response of `/files/list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileList {
    /// Entries, each directory before its contents.
    pub entries: Vec<FileEntry>,
}

/// Response of `/files/mkdir`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntryReply {
    /// Created entry.
    pub entry: FileEntry,
}

/// File, directory or symbolic link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// Last component of the path.
    pub name: String,
    /// Path.
    pub path: String,
    /// `file`, `directory` or `symlink`. For a symbolic link: the type of its target, or `symlink`
    /// if the target does not exist. Devices, pipes and sockets are files; see `permissions`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Size, in bytes.
    pub size: i64,
    /// Permission bits (0o644 is 420).
    pub mode: u32,
    /// Permissions in the format of `ls -l`. The first characters tell what kind of file it is.
    pub permissions: String,
    /// Name of the owner.
    pub owner: String,
    /// Name of the group.
    pub group: String,
    /// Time of the last modification, in seconds since 1970.
    pub modified_at: i64,
    /// Target of a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}
