//! Interface between the proxy and the component that knows the sandboxes.

use std::{fmt, future::Future};

use tokio::io::{AsyncRead, AsyncWrite};
use wrenn_model::SandboxId;

use crate::SignedLink;

/// Resolves sandboxes and connects to their ports. Every method may be called at any time,
/// concurrently, and with ids that do not exist.
pub trait Sandboxes: Send + Sync + 'static {
    /// Byte stream to a port in a sandbox. Dropping it closes the connection.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Guard held while a request is being answered or an upgraded connection is open. A sandbox
    /// that would be paused when idle is not idle while one of these exists.
    type Use: Send + 'static;

    /// Returns what the proxy must know to check a client's access. Changes nothing and waits for
    /// nothing: a client without access must not be able to resume a sandbox. A paused sandbox that
    /// does not resume on traffic is [`Rejected::NotFound`], as if it had never existed.
    ///
    /// The result is used at once and not cached: the proxy asks again for each request.
    fn look_up(&self, id: &SandboxId) -> impl Future<Output = Result<Found, Rejected>> + Send;

    /// Returns a running sandbox, for a client that has access.
    ///
    /// A paused sandbox that resumes on traffic is resumed here, and the call waits for it. The
    /// call also waits for a sandbox that is about to run. The proxy gives up after two minutes.
    fn resolve(&self, id: &SandboxId) -> impl Future<Output = Result<Target, Rejected>> + Send;

    /// Returns the sandbox whose guest agent's token signed a link: the one for which
    /// [`SignedLink::is_signed_with`] is true. Called for requests that do not name a sandbox, so
    /// any client can trigger it: its cost must be bounded ([`Rejected::TooManySearches`]).
    fn signed_by(
        &self,
        link: &SignedLink<'_>,
    ) -> impl Future<Output = Result<Option<SandboxId>, Rejected>> + Send;

    /// Returns the sandbox whose guest agent has this token, also if the sandbox has ended. Called
    /// for requests that do not name a sandbox, so it must not depend on the number of sandboxes.
    fn with_token(
        &self,
        token: &str,
    ) -> impl Future<Output = Result<Option<SandboxId>, Rejected>> + Send;

    /// Opens a new connection to a port. The proxy gives up after five seconds.
    fn dial(
        &self,
        id: &SandboxId,
        port: u16,
    ) -> impl Future<Output = Result<Self::Io, DialError>> + Send;

    /// Records that a sandbox is in use until the returned guard is dropped.
    fn begin_use(&self, id: &SandboxId) -> Self::Use;
}

/// Sandbox as [`Sandboxes::look_up`] finds it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Properties that the access checks depend on.
    pub target: Target,
    /// True if the sandbox runs. Any other must be [resolved](Sandboxes::resolve) first.
    pub is_running: bool,
}

/// Properties of a sandbox that its requests depend on.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// Token that the guest agent requires; `None` if it is not known.
    pub guest_token: Option<String>,
    /// True if clients need no token for the guest agent (`secure: false`). The proxy adds the token
    /// to their requests.
    pub is_open: bool,
    /// Token that clients must send to reach any port except the guest agent's.
    pub traffic_token: Option<String>,
    /// `Host` header for servers in the sandbox other than the guest agent; `${PORT}` is replaced
    /// by the port.
    pub mask_host: Option<String>,
}

impl Target {
    /// Returns the token that the proxy adds to requests for the guest agent.
    pub(crate) fn injected_token(&self) -> Option<&str> {
        self.guest_token.as_deref().filter(|_| self.is_open)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("guest_token", &self.guest_token.is_some())
            .field("is_open", &self.is_open)
            .field("traffic_token", &self.traffic_token.is_some())
            .field("mask_host", &self.mask_host)
            .finish()
    }
}

/// Reasons for which a request does not reach a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// Unknown, destroyed, or paused without resuming on traffic.
    #[error("the sandbox was not found")]
    NotFound,
    /// In transition between two states for longer than the proxy waits.
    #[error("the sandbox is changing state")]
    Changing,
    /// Paused, and resuming it is denied; carries the reason.
    #[error("the sandbox cannot be resumed: {0}")]
    ResumeDenied(String),
    /// The state of the sandbox cannot be determined or changed now; carries the reason.
    #[error("the sandbox cannot be reached: {0}")]
    Unavailable(String),
    /// Too many requests that name no sandbox.
    #[error("too many links without a sandbox id are being looked up")]
    TooManySearches,
}

/// Reasons for which a connection to a port failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The sandbox runs, but nothing listens on the port.
    #[error("the port is not open")]
    PortClosed,
    /// The sandbox no longer runs: calling [`Sandboxes::resolve`] again may help.
    #[error("the sandbox is not running")]
    NotRunning,
    /// The sandbox's host failed to open the connection; carries the reason.
    #[error("failed to connect through the host agent: {0}")]
    Host(String),
    /// The proxy's own deadline passed.
    #[error("timed out after {0:?}")]
    TimedOut(std::time::Duration),
    /// The sandbox has reached its maximum number of connections.
    #[error("the sandbox has too many connections")]
    TooMany,
}
