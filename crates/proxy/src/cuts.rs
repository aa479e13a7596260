//! Ending all that a sandbox has open, at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;
use wrenn_proto::SandboxId;

/// A handle with which whoever stops sandboxes tells the proxy. Made before the [`Proxy`](crate::Proxy), so that neither needs the
/// other to exist first; clones are the same handle.
#[derive(Debug, Clone, Default)]
pub struct Cuts(Arc<Mutex<HashMap<SandboxId, CancellationToken>>>);

impl Cuts {
    /// Ends every connection to a sandbox, kept ones and those in use. To be called when it was paused, killed or lost, after
    /// [`Sandboxes::resolve`](crate::Sandboxes::resolve) has begun to say so: what comes later is looked up anew.
    pub fn forget(&self, id: &SandboxId) {
        let token = self.tokens().remove(id);
        if let Some(token) = token {
            token.cancel();
        }
    }

    /// Ends every connection to every sandbox.
    pub fn forget_all(&self) {
        let tokens = std::mem::take(&mut *self.tokens());
        for token in tokens.into_values() {
            token.cancel();
        }
    }

    /// Cancelled at the next [`forget`](Self::forget) of this sandbox.
    pub(crate) fn token(&self, id: &SandboxId) -> CancellationToken {
        self.tokens().entry(id.clone()).or_default().clone()
    }

    /// Drops the token of a sandbox that has nothing open; who calls this makes sure of that.
    pub(crate) fn remove(&self, id: &SandboxId) {
        self.tokens().remove(id);
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<SandboxId, CancellationToken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
