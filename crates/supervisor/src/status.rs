//! Final status of the VM in `status.json`. The file is either complete or absent.

use std::{io, path::Path};

use wrenn_proto::supervise::{FinalStatus, files};

/// Mode of the file.
const MODE: u32 = 0o644;

/// Writes the file.
pub(crate) fn write(dir: &Path, status: &FinalStatus) -> io::Result<()> {
    let text = serde_json::to_vec(status)?;
    wrenn_durable::replace(&dir.join(files::STATUS), &text, MODE)
}
