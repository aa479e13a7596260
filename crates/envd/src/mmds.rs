//! The metadata service at the gateway: who this machine is, and which token it may be given.
//!
//! It is asked in the background: when the agent starts, after `/init`, and when the machine has become another sandbox.
//! The answer's ids go to files and to the environment ([`crate::identity`]), its hash says which token `/init` may set. There may
//! be no such service; then the host's own words (`/init`, `/snapshot/recover`) are all there is, and after a minute nobody
//! asks any more.
//!
//! Nothing is asked while a machine is being frozen ([`Mmds::stop`]), and what was asked before is never taken for an answer after.

pub mod client;
pub mod metadata;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    task::AbortHandle,
    time::{Instant, sleep},
};

use self::metadata::{Metadata, TokenHash};
use crate::settings::Settings;

/// For how long it is asked again if there is no answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time before it is asked again: doubled each time, between these.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The service, and what it told last.
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
    /// The service at an address; its ids go to `settings`.
    #[must_use]
    pub fn new(address: SocketAddr, settings: Arc<Settings>) -> Self {
        Self {
            address,
            settings,
            state: Mutex::default(),
        }
    }

    /// Asks in the background, until there is an answer with an id, or patience ends. Who asked before is forgotten.
    pub fn ask(self: &Arc<Self>) {
        self.ask_after(Duration::ZERO);
    }

    /// As [`ask`](Self::ask), in a moment: what it asks for is known already, and somebody is waiting for a first command.
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

    /// Asks no more.
    pub fn stop(&self) {
        if let Some(asking) = self.lock().asking.take() {
            asking.abort();
        }
    }

    /// What was told of another machine does not hold for this one.
    pub fn forget(&self) {
        self.stop();
        self.lock().token_hash = None;
    }

    /// The hash that was told last, without asking.
    #[must_use]
    pub fn known_token_hash(&self) -> Option<TokenHash> {
        self.lock().token_hash.clone()
    }

    /// The hash that is told now; `None` if there is no answer, or none in it.
    pub async fn token_hash(&self) -> Option<TokenHash> {
        match client::ask(self.address).await {
            Ok(metadata) => {
                let hash = metadata.token_hash();
                self.lock().token_hash.clone_from(&hash);
                hash
            }
            Err(error) => {
                tracing::debug!(%error, "no metadata");
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
                Err(error) => tracing::debug!(%error, "no metadata yet"),
            }
            if Instant::now() + wait > end {
                return;
            }
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }

    /// Takes an answer over; whether it says who this machine is.
    fn learn(&self, metadata: &Metadata) -> bool {
        self.lock().token_hash = metadata.token_hash();
        let Some(identity) = metadata.identity() else {
            return false;
        };
        if let Err(error) = identity.write(Path::new("/")) {
            tracing::error!(%error, "cannot write who this machine is");
        }
        self.settings.identify(&identity);
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment: a panic in between leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
