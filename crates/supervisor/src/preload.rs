//! Where the library is that goes into the VMM.

use std::path::{Path, PathBuf};

use crate::SupervisorError;

/// Its file name.
const NAME: &str = "libwrenn_preload.so";

/// Finds it: beside the executable, or where `make install` puts it (`../lib/wrenn`).
///
/// # Errors
/// If it is in neither place; the error names both.
pub fn find(wrenn_exe: &Path) -> Result<PathBuf, SupervisorError> {
    let dir = wrenn_exe.parent().unwrap_or(Path::new("/"));
    let beside = dir.join(NAME);
    let installed = dir.join("../lib/wrenn").join(NAME);
    for candidate in [&beside, &installed] {
        if candidate.is_file() {
            return Ok(candidate.clone());
        }
    }
    Err(SupervisorError::NoPreload { beside, installed })
}
