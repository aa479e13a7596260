//! Upgraded connections, such as WebSockets: bytes are copied in both directions until both sides
//! have closed.

use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

/// Time within which both sides must have switched, after the sandbox agreed to the upgrade.
const DEADLINE: Duration = Duration::from_secs(10);

/// Joins a client and a sandbox until one of them disconnects or `end` is cancelled. There is no
/// other deadline: such connections are long-lived.
pub(crate) async fn join(client: OnUpgrade, sandbox: OnUpgrade, end: CancellationToken) {
    let both = async {
        let (client, sandbox) =
            tokio::time::timeout(DEADLINE, futures::future::try_join(client, sandbox))
                .await
                .map_err(std::io::Error::other)?
                .map_err(std::io::Error::other)?;
        let (mut client, mut sandbox) = (TokioIo::new(client), TokioIo::new(sandbox));
        tokio::io::copy_bidirectional(&mut client, &mut sandbox).await
    };
    tokio::select! {
        copied = both => match copied {
            Ok((sent, received)) => tracing::debug!(sent, received, "upgraded connection closed"),
            Err(error) => tracing::debug!(%error, "upgraded connection failed"),
        },
        () = end.cancelled() => {}
    }
}
