//! The image store as more than one verb needs it.

use std::{fs, io, path::Path};

/// Names of the templates in an images directory. Makes nothing: a directory that is not there holds none.
pub(crate) fn template_names(images_dir: &Path) -> Result<Vec<String>, String> {
    let dir = images_dir.join("templates");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(format!("cannot read {}: {e}", dir.display())),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let is_template = path.extension().is_some_and(|e| e == "json");
            is_template.then(|| path.file_stem()?.to_str().map(str::to_owned))?
        })
        .collect();
    names.sort();
    Ok(names)
}
