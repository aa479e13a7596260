//! Certificates for tests of TLS.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::command::run;

/// Certificate authority, and a server certificate for `localhost` that it signed.
pub struct Certificates {
    /// Certificate of the authority.
    pub root: PathBuf,
    /// Certificate of the server.
    pub certificate: PathBuf,
    /// Private key of the server.
    pub key: PathBuf,
}

impl Certificates {
    /// Creates the files in a directory.
    ///
    /// # Errors
    /// If `openssl` fails.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).context("failed to create the directory of the certificates")?;
        let file = |name: &str| dir.join(name);
        let (root, root_key) = (file("root.crt"), file("root.key"));
        let made = Self {
            root,
            certificate: file("server.crt"),
            key: file("server.key"),
        };
        run(request("/CN=Test root", &made.root, &root_key)
            .args(["-addext", "keyUsage=critical,keyCertSign"]))?;
        run(request("/CN=localhost", &made.certificate, &made.key)
            .arg("-CA")
            .arg(&made.root)
            .arg("-CAkey")
            .arg(&root_key)
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", "subjectAltName=DNS:localhost"]))?;
        Ok(made)
    }
}

/// Returns the command that creates a key and its certificate.
fn request(subject: &str, certificate: &Path, key: &Path) -> Command {
    let mut command = Command::new("openssl");
    command
        .args(["req", "-x509", "-days", "2", "-nodes", "-newkey", "ec"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", subject])
        .arg("-out")
        .arg(certificate)
        .arg("-keyout")
        .arg(key);
    command
}
