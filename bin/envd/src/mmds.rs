//! Metadata service at the gateway, which provides the guest's identity and the hash of its token.
//!
//! envd asks the service in the background: when envd starts, after `/init`, and when the guest has
//! become another sandbox. The ids in the response go to files and to the environment
//! ([`crate::identity`]). The hash determines which token `/init` may set. The service may be
//! absent. In that case, `/init` and `/snapshot/recover` are the only sources, and envd stops
//! asking after a minute.
//!
//! envd sends no requests during a snapshot ([`Mmds::stop`]), and never uses the response to a
//! request from before the snapshot.

pub mod client;
pub mod metadata;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{
    task::AbortHandle,
    time::{Instant, sleep},
};

use self::metadata::{Metadata, TokenHash};
use crate::settings::Settings;

/// Maximum time for repeated requests without a response.
const PATIENCE: Duration = Duration::from_secs(60);
/// Minimum delay before the next request. The delay doubles with each request, up to
/// [`LONGEST_WAIT`].
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Client of the service, with the last response.
#[derive(Debug)]
pub struct Mmds {
    address: SocketAddr,
    settings: Arc<Settings>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    asking: Option<AbortHandle>,
    token_hash: Option<TokenHash>,
}

impl Mmds {
    /// Creates a client of the service at an address. Ids go to `settings`.
    #[must_use]
    pub fn new(address: SocketAddr, settings: Arc<Settings>) -> Self {
        Self {
            address,
            settings,
            state: Mutex::default(),
        }
    }

    /// Asks in the background, until a response contains an id or `PATIENCE` ends. Replaces a
    /// request that is still in progress.
    pub fn ask(self: &Arc<Self>) {
        self.ask_after(Duration::ZERO);
    }

    /// Asks after a delay. Like [`ask`](Self::ask), but for a guest that knows the values already
    /// and whose first command must not be delayed.
    pub fn ask_after(self: &Arc<Self>, moment: Duration) {
        let mmds = self.clone();
        let mut state = self.lock();
        let task = tokio::spawn(async move {
            sleep(moment).await;
            mmds.ask_patiently().await;
        });
        if let Some(before) = state.asking.replace(task.abort_handle()) {
            before.abort();
        }
    }

    /// Stops asking.
    pub fn stop(&self) {
        if let Some(asking) = self.lock().asking.take() {
            asking.abort();
        }
    }

    /// Stops asking and discards the last hash, which does not apply to the new sandbox.
    pub fn forget(&self) {
        self.stop();
        self.lock().token_hash = None;
    }

    /// Returns the hash of the last response, without a request.
    #[must_use]
    pub fn known_token_hash(&self) -> Option<TokenHash> {
        self.lock().token_hash.clone()
    }

    /// Requests the current hash. Returns `None` if there is no response or no hash in it.
    pub async fn token_hash(&self) -> Option<TokenHash> {
        match client::ask(self.address).await {
            Ok(metadata) => {
                let hash = metadata.token_hash();
                self.lock().token_hash.clone_from(&hash);
                hash
            }
            Err(error) => {
                tracing::debug!(%error, "metadata request failed");
                None
            }
        }
    }

    async fn ask_patiently(&self) {
        let end = Instant::now() + PATIENCE;
        let mut wait = SHORTEST_WAIT;
        loop {
            match client::ask(self.address).await {
                Ok(metadata) if self.learn(&metadata) => return,
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "metadata request failed"),
            }
            if Instant::now() + wait > end {
                return;
            }
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Applies a response. Returns true if the response contains the guest's identity.
    fn learn(&self, metadata: &Metadata) -> bool {
        self.lock().token_hash = metadata.token_hash();
        let Some(identity) = metadata.identity() else {
            return false;
        };
        if let Err(error) = identity.write(Path::new("/")) {
            tracing::error!(%error, "failed to write the guest identity");
        }
        self.settings.identify(&identity);
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a panic in between leaves a consistent state.
        self.state.lock()
    }
}
