//! Status of a sandbox's VM, requested from its supervisor.

use std::{fs, os::fd::AsRawFd as _, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio_seqpacket::UnixSeqpacket;
use wrenn_proto::supervise::{
    MAX_MESSAGE_BYTES, MachineStatus, PagerStatus, Reply, Request, files,
};

use crate::{Sandbox, Service};

/// Returns the counters of the page server. A booted sandbox has none.
///
/// # Errors
/// The supervisor does not respond, or its VM was not restored.
pub(super) async fn pager(service: &Service, sandbox: &Sandbox<'_>) -> Result<PagerStatus> {
    let status = status(service, sandbox).await?;
    status.pager.context("the VM was not restored")
}

/// Returns the status of the VM.
///
/// # Errors
/// The supervisor does not respond.
pub(super) async fn status(service: &Service, sandbox: &Sandbox<'_>) -> Result<MachineStatus> {
    let folder = fs::File::open(service.dir().join("sandboxes").join(sandbox.id()))?;
    // Addressed through the directory, because the full path may be longer than a socket address.
    let path = format!("/proc/self/fd/{}/{}", folder.as_raw_fd(), files::SOCKET);
    let connection = UnixSeqpacket::connect(path).await?;
    connection
        .send(&serde_json::to_vec(&Request::Status)?)
        .await?;
    let mut answer = vec![0; MAX_MESSAGE_BYTES];
    let received = tokio::time::timeout(Duration::from_secs(10), connection.recv(&mut answer));
    let length = received.await??.bytes_read();
    match serde_json::from_slice(&answer[..length])? {
        Reply::Status(status) => Ok(status),
        other => bail!("unexpected reply of the supervisor: {other:?}"),
    }
}
