//! Location of the preload library for the VMM.

use std::path::{Path, PathBuf};

use crate::SupervisorError;

/// File name of the library.
const NAME: &str = "libwrenn_preload.so";

/// Finds the library: next to the executable, or where `make install` puts it (`../lib/wrenn`).
///
/// # Errors
/// The library is in neither place. The error names both paths.
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
