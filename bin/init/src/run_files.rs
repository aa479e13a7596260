//! Files in `/run`, which is empty after a boot. Packages declare the files that they need
//! (`tmpfiles.d(5)`), such as `/run/postgresql`.

use std::{
    io,
    process::{Command, Stdio},
};

use crate::ENVIRONMENT;

/// Creates what the installed packages declare, before the first request. Also removes locks that
/// a power failure left on the disk, for the same reason.
///
/// - `/dev` is the task of [`crate::devices`].
/// - `/tmp` is kept over a reboot.
/// - Systemd removes `/run/nologin`, which denies logins, at the end of its boot.
pub(crate) fn create() -> io::Result<()> {
    let status = Command::new("systemd-tmpfiles")
        .args(["--create", "--remove", "--boot"])
        .args(["/dev", "/tmp", "/run/nologin"].map(|path| format!("--exclude-prefix={path}")))
        .env_clear()
        .envs(ENVIRONMENT)
        .stdin(Stdio::null())
        .status();
    match status {
        // An image without the program.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(io::Error::other(status.to_string())),
    }
}
