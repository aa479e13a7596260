//! State that all handlers share.

use std::{sync::Arc, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_control::{
    Limits,
    api_key::Auth,
    fleet::Fleet,
    guest::{Guest, Guests},
    host::Host,
    lifecycle::{ActivityGuard, Lifecycle},
    principal::Ownership,
    samples::Samples,
};
use wrenn_db::Db;
use wrenn_model::{ByteBudget, Egress, SandboxId};

use crate::error::ApiError;

/// Maximum time that a call waits for a sandbox that is still booting.
pub(crate) const BOOT_WAIT: Duration = Duration::from_secs(60);

/// State shared by all handlers.
pub(crate) struct App {
    pub(crate) db: Db,
    pub(crate) fleet: Fleet,
    pub(crate) guests: Arc<Guests>,
    pub(crate) host: Host,
    pub(crate) auth: Arc<Auth>,
    pub(crate) ownership: Ownership,
    pub(crate) lifecycle: Arc<Lifecycle>,
    /// Resource usage of sandboxes over time.
    pub(crate) samples: Arc<Samples>,
    pub(crate) default_egress: Egress,
    pub(crate) limits: Limits,
    /// Budget of the bodies that are held in memory as a whole.
    pub(crate) buffers: ByteBudget,
    /// Cancelled when the server shuts down, so that long sessions close their connections.
    pub(crate) shutdown: CancellationToken,
    /// WebSocket sessions. The HTTP server does not track a connection after its upgrade.
    pub(crate) sessions: TaskTracker,
}

/// Shared state, as handlers extract it.
pub(crate) type AppState = Arc<App>;

impl App {
    /// Returns the guest of a running sandbox, which counts as active until the guard is dropped.
    /// Waits for a sandbox that is booting, and resumes a paused sandbox that was created with
    /// `auto_resume`.
    pub(crate) async fn ready(&self, id: &SandboxId) -> Result<(Guest, ActivityGuard), ApiError> {
        let (row, used) = self.lifecycle.enter(id, BOOT_WAIT).await?;
        Ok((self.guests.get(&row)?, used))
    }
}
