//! Data directory of the services: created on demand, together with the token shared by control
//! plane and agent.

use std::{fs, io, os::unix::fs::DirBuilderExt, path::Path};

use anyhow::{Context, bail};
use rand::RngExt;

use crate::config::Settings;

/// Creates the data directory if it does not exist.
pub(crate) fn create(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .with_context(|| format!("failed to create the data directory {}", dir.display()))
}

/// Returns the token between control plane and agent; generated at the first start.
pub(crate) fn agent_token(settings: &Settings) -> anyhow::Result<String> {
    let path = settings.token_file();
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Ok(_) => bail!(
            "{} is empty; remove it to generate a new token",
            path.display()
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("failed to read {}", path.display())),
    }
    let token: String = rand::rng()
        .random::<[u8; 32]>()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    wrenn_durable::replace(&path, format!("{token}\n").as_bytes(), 0o600)
        .with_context(|| format!("failed to write {}", path.display()))?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::{self, Layer};

    fn settings(dir: &Path) -> Settings {
        let layer = Layer {
            dir: Some(dir.to_owned()),
            ..Layer::default()
        };
        config::load(layer, Some(Path::new("/dev/null")), |_| None).expect("defaults")
    }

    #[test]
    fn token_is_created_once_and_readable_by_root_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let settings = settings(dir.path());
        let token = agent_token(&settings).expect("made");
        assert_eq!(token.len(), 64);
        assert_eq!(agent_token(&settings).expect("read"), token);
        let mode = fs::metadata(settings.token_file())
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn empty_token_is_rejected() {
        let dir = tempfile::tempdir().expect("a directory");
        let settings = settings(dir.path());
        fs::write(settings.token_file(), "\n").expect("writable");
        assert!(agent_token(&settings).is_err());
    }
}
