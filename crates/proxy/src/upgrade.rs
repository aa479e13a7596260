//! Connections that become something else than HTTP, as WebSockets do: bytes are copied both ways until both are through.

use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

/// Until both ends have changed their protocol, after the sandbox has said that it does.
const DEADLINE: Duration = Duration::from_secs(10);

/// Joins a client and a sandbox until one is gone or `end` is cancelled. Has no other deadline: such connections live long.
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
            Ok((sent, received)) => tracing::debug!(sent, received, "an upgraded connection is through"),
            Err(error) => tracing::debug!(%error, "an upgraded connection broke"),
        },
        () = end.cancelled() => {}
    }
}
