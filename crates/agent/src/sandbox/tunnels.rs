//! Connections from outside to ports of a running guest, and how they are cut.
//!
//! Owns who may connect and when that ends; never the bytes, which are the tunnel's own task's. A tunnel ends with the sandbox, with
//! its pause, or with the agent. One that is open when a pause begins is cut before the guest is frozen: a connection that is
//! frozen open is a zombie in the guest for good.
//!
//! The order matters: a [`Tunnel`] is opened first and the sandbox's state is looked at afterwards, while a pause sets the state
//! first and cuts afterwards. So whoever sees `Running` after opening is either before the pause, and cut, or there is none.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Tunnels that one sandbox may have at a time.
pub(crate) const MAX_TUNNELS: usize = 1024;

/// The tunnels of one sandbox.
#[derive(Debug)]
pub(crate) struct Tunnels {
    room: Arc<Semaphore>,
    /// Cancelled to cut those that are open; then there is another for those to come.
    cut: Mutex<CancellationToken>,
}

/// A place among a sandbox's tunnels, given back when dropped.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Cancelled when the tunnel must end at once.
    pub(crate) cut: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Default for Tunnels {
    fn default() -> Self {
        Self {
            room: Arc::new(Semaphore::new(MAX_TUNNELS)),
            cut: Mutex::default(),
        }
    }
}

impl Tunnels {
    /// A place for one more; `None` if there are too many.
    pub(crate) fn open(&self) -> Option<Tunnel> {
        let place = self.room.clone().try_acquire_owned().ok()?;
        let cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Tunnel {
            cut: cut.clone(),
            _place: place,
        })
    }

    /// Cuts all that are open. Later ones are not touched.
    pub(crate) fn close_all(&self) {
        let mut cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *cut).cancel();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_open_are_cut_and_later_ones_are_not() {
        let tunnels = Tunnels::default();
        let early = tunnels.open().unwrap();
        tunnels.close_all();
        let late = tunnels.open().unwrap();
        assert!(early.cut.is_cancelled() && !late.cut.is_cancelled());
    }

    #[test]
    fn there_is_room_for_so_many_and_a_place_comes_back() {
        let tunnels = Tunnels::default();
        let mut open: Vec<_> = (0..MAX_TUNNELS).map(|_| tunnels.open().unwrap()).collect();
        assert!(tunnels.open().is_none());
        open.pop();
        assert!(tunnels.open().is_some());
    }
}
