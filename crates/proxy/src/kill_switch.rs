//! Closes all connections of a sandbox at once.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use wrenn_model::SandboxId;

/// Handle through which the proxy is notified that a sandbox stopped. Created before the
/// [`Proxy`](crate::Proxy), so that the proxy and the component that stops sandboxes do not depend
/// on each other's construction. Clones share the same state.
#[derive(Debug, Clone, Default)]
pub struct ConnectionKillSwitch(Arc<Mutex<HashMap<SandboxId, CancellationToken>>>);

impl ConnectionKillSwitch {
    /// Closes every connection to a sandbox, idle and in use.
    ///
    /// Call this when a sandbox was paused, destroyed or lost, after
    /// [`Sandboxes::resolve`](crate::Sandboxes::resolve) has started to report that state: later
    /// requests are resolved again.
    pub fn forget(&self, id: &SandboxId) {
        let token = self.tokens().remove(id);
        if let Some(token) = token {
            token.cancel();
        }
    }

    /// Closes every connection to every sandbox.
    pub fn forget_all(&self) {
        let tokens = std::mem::take(&mut *self.tokens());
        for token in tokens.into_values() {
            token.cancel();
        }
    }

    /// Returns the token that is cancelled by the next [`forget`](Self::forget) of this sandbox.
    pub(crate) fn token(&self, id: &SandboxId) -> CancellationToken {
        self.tokens().entry(id.clone()).or_default().clone()
    }

    /// Drops the token of a sandbox. The caller ensures that the sandbox has no open connections.
    pub(crate) fn remove(&self, id: &SandboxId) {
        self.tokens().remove(id);
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<SandboxId, CancellationToken>> {
        self.0.lock()
    }
}
