//! Deadlines of calls to the guest agent. The table in `lib.rs` assigns them to the calls.

use std::time::Duration;

use connectrpc::ConnectError;

/// Deadline of a call that does not wait for anything in the guest, and of the start of a stream.
/// Such a call takes seconds under software virtualization and load.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// Time that a command may take beyond its own limit until its end is reported. The guest agent
/// enforces the limit; this covers a guest that does not.
pub const EXEC_MARGIN: Duration = Duration::from_secs(15);

/// Maximum silence of the guest in the middle of a file.
pub const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// Deadline of the host's own calls. Before a snapshot, the guest first writes all dirty data to
/// its disk.
pub const HOST_CALL_DEADLINE: Duration = Duration::from_secs(60);

/// Deadline of one connection attempt of a health check. A guest that is not up yet does not
/// respond at all, so a longer attempt would delay detecting that it came up. A refused connection
/// is reported at once.
pub(crate) const PROBE_DEADLINE: Duration = Duration::from_millis(40);

/// Deadline for the health response of a guest that accepted a connection, and of connecting to a
/// guest's address.
pub(crate) const HEALTH_DEADLINE: Duration = Duration::from_secs(5);

/// Runs a call with a deadline.
pub(crate) async fn within<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    tokio::time::timeout(deadline, call)
        .await
        .unwrap_or_else(|_| {
            Err(ConnectError::deadline_exceeded(format!(
                "the guest agent did not respond within {deadline:?}"
            )))
        })
}
