//! Queries of the traffic proxy: the existing sandboxes, and the way to their ports.
//!
//! Owns no state except that of the search for sandboxes that a request does not name. The rows hold
//! the sandboxes, `lifecycle` resumes paused sandboxes and tracks activity, and the host's agent
//! opens the byte streams. `lifecycle` notifies the proxy when a sandbox stops.

use std::{sync::Arc, time::Duration};

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use wrenn_control::{
    agent_client::AgentError,
    lifecycle::{ActivityGuard, Lifecycle, LifecycleError},
    unaddressed::{SearchError, Unaddressed},
};
use wrenn_db::{DbError, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proxy::{DialError, Found, Rejected, Sandboxes, SignedLink, Target};

/// Maximum time that a request waits for a sandbox that is booting.
const BOOT_WAIT: Duration = Duration::from_secs(60);

/// Sandboxes, as seen by the proxy.
pub(crate) struct Traffic {
    pub(crate) lifecycle: Arc<Lifecycle>,
    /// Finds the sandboxes of requests that name none.
    pub(crate) unaddressed: Unaddressed,
}

impl Sandboxes for Traffic {
    type Io = TokioIo<Upgraded>;
    type Use = ActivityGuard;

    async fn look_up(&self, id: &SandboxId) -> Result<Found, Rejected> {
        match self.lifecycle.look_up(id).await {
            Ok(row) => Ok(Found {
                is_running: row.status == SandboxStatus::Running,
                target: target(row),
            }),
            Err(error) => Err(refused(&error)),
        }
    }

    async fn resolve(&self, id: &SandboxId) -> Result<Target, Rejected> {
        match self.lifecycle.await_running(id, BOOT_WAIT).await {
            Ok(row) => Ok(target(row)),
            Err(error) => Err(refused(&error)),
        }
    }

    async fn signed_by(&self, link: &SignedLink<'_>) -> Result<Option<SandboxId>, Rejected> {
        self.unaddressed.signed_by(link).await.map_err(not_found)
    }

    async fn with_token(&self, token: &str) -> Result<Option<SandboxId>, Rejected> {
        self.unaddressed.with_token(token).await.map_err(not_found)
    }

    async fn dial(&self, id: &SandboxId, port: u16) -> Result<Self::Io, DialError> {
        match self.lifecycle.find_host(id).await {
            Ok(host) => host.tunnel.dial(id, port).await,
            Err(error) => match refused(&error) {
                Rejected::NotFound => Err(DialError::NotRunning),
                other => Err(DialError::Host(other.to_string())),
            },
        }
    }

    fn begin_use(&self, id: &SandboxId) -> ActivityGuard {
        ActivityGuard::new(Arc::clone(&self.lifecycle), id.clone())
    }
}

fn target(row: Sandbox) -> Target {
    let given = |text: String| (!text.is_empty()).then_some(text);
    Target {
        guest_token: given(row.envd_token),
        is_open: row.options.open,
        traffic_token: given(row.options.traffic_token),
        mask_host: given(row.options.mask_host),
    }
}

fn refused(error: &LifecycleError) -> Rejected {
    use SandboxStatus as S;
    match error {
        LifecycleError::NotFound(_) => Rejected::NotFound,
        LifecycleError::WrongStatus {
            status: S::Pending | S::Starting | S::Resuming,
            ..
        } => Rejected::Changing,
        LifecycleError::WrongStatus { .. } | LifecycleError::Rejected(_) => Rejected::NotFound,
        LifecycleError::Busy(_) | LifecycleError::Known(_) => Rejected::Changing,
        LifecycleError::OtherHost { .. } => Rejected::Unavailable(error.to_string()),
        LifecycleError::Agent(error) => Rejected::Unavailable(host_words(error)),
        LifecycleError::Db(error) => database_failed(error),
        LifecycleError::Shared(error) => refused(error),
    }
}

/// Converts the failure of a search for the sandbox of a request.
fn not_found(error: SearchError) -> Rejected {
    match &error {
        SearchError::Busy => Rejected::TooManySearches,
        SearchError::Db(error) => database_failed(error),
    }
}

fn database_failed(error: &DbError) -> Rejected {
    tracing::error!(%error, "failed to look up the sandbox");
    Rejected::Unavailable("failed to access the database".to_owned())
}

fn host_words(error: &AgentError) -> String {
    if error.connection_lost {
        return "the host agent does not answer".to_owned();
    }
    error.message.clone()
}
