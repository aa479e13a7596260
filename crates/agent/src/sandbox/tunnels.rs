//! Admission and termination of connections from outside to ports of a running guest.
//!
//! Decides which connections are admitted and when they end. Never handles the bytes; the tunnel's
//! own task does. A tunnel ends when the sandbox ends or is paused, or when the agent ends. A
//! tunnel that is open when a pause begins is closed before the guest is paused, because a
//! connection that is saved open would stay in the guest as a zombie forever.
//!
//! The order of operations matters. A caller first opens a [`Tunnel`] and then checks the sandbox's
//! state. A pause first sets the state and then closes all tunnels. A caller that sees `Running`
//! after opening has therefore either opened before the pause, which will close the tunnel, or
//! there is no pause.
//!
//! The resources of a VM are freed only after its tunnels are closed ([`Tunnels::end_all`]). The end
//! of a connection must still reach the VM's network: without it, the host's connection table keeps
//! the connection as established for days, and another sandbox gets the same addresses.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Maximum number of concurrent tunnels per sandbox.
pub(crate) const MAX_TUNNELS: u32 = 1024;

/// Maximum time to wait for the tasks of tunnels that are closed. They only drop their sockets.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// Tunnels of one sandbox.
#[derive(Debug)]
pub(crate) struct Tunnels {
    room: Arc<Semaphore>,
    /// Cancelled to close the open tunnels. Replaced by a new token for later tunnels.
    cut: Mutex<CancellationToken>,
}

/// Slot for one tunnel of a sandbox. Released when dropped.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Cancelled when the tunnel must end at once.
    pub(crate) cut: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Default for Tunnels {
    fn default() -> Self {
        Self {
            room: Arc::new(Semaphore::new(MAX_TUNNELS as usize)),
            cut: Mutex::default(),
        }
    }
}

impl Tunnels {
    /// Takes a slot for one more tunnel. Returns `None` if the limit is reached.
    pub(crate) fn open(&self) -> Option<Tunnel> {
        let place = self.room.clone().try_acquire_owned().ok()?;
        let cut = self.cut.lock();
        Some(Tunnel {
            cut: cut.clone(),
            _place: place,
        })
    }

    /// Closes all open tunnels. Later tunnels are not affected.
    pub(crate) fn close_all(&self) {
        let mut cut = self.cut.lock();
        std::mem::take(&mut *cut).cancel();
    }

    /// Closes all open tunnels, and waits until their sockets are closed. The caller has left the
    /// running state, so that no later tunnel is used.
    pub(crate) async fn end_all(&self) {
        self.close_all();
        let all = self.room.acquire_many(MAX_TUNNELS);
        if tokio::time::timeout(END_DEADLINE, all).await.is_err() {
            tracing::warn!("tunnels did not close within {END_DEADLINE:?}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn close_ends_open_tunnels_only() {
        let tunnels = Tunnels::default();
        let early = tunnels.open().unwrap();
        tunnels.close_all();
        let late = tunnels.open().unwrap();
        assert!(early.cut.is_cancelled() && !late.cut.is_cancelled());
    }

    #[tokio::test]
    async fn end_of_all_tunnels_waits_for_the_last_one() {
        let tunnels = Tunnels::default();
        let tunnel = tunnels.open().unwrap();
        let mut ended = std::pin::pin!(tunnels.end_all());
        assert!(futures::poll!(ended.as_mut()).is_pending());
        assert!(tunnel.cut.is_cancelled());
        drop(tunnel);
        assert!(futures::poll!(ended.as_mut()).is_ready());
        assert!(tunnels.open().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn end_of_all_tunnels_does_not_wait_forever() {
        let tunnels = Tunnels::default();
        let _stuck = tunnels.open().unwrap();
        tunnels.end_all().await;
        assert!(tunnels.open().is_some());
    }

    #[test]
    fn number_of_tunnels_is_limited_and_freed() {
        let tunnels = Tunnels::default();
        let mut open: Vec<_> = (0..MAX_TUNNELS).map(|_| tunnels.open().unwrap()).collect();
        assert!(tunnels.open().is_none());
        open.pop();
        assert!(tunnels.open().is_some());
    }
}
