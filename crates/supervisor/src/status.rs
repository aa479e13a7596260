//! Final status of the VM in `status.json`. The file is either complete or absent.

use std::{fs, io, io::Write as _, path::Path};

use wrenn_proto::supervise::{FinalStatus, files};

/// Writes the file under a temporary name and renames it.
pub(crate) fn write(dir: &Path, status: &FinalStatus) -> io::Result<()> {
    let target = dir.join(files::STATUS);
    let temporary = dir.join(format!("{}.tmp", files::STATUS));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(status)?)?;
    file.sync_all()?;
    fs::rename(&temporary, &target)
}
