//! What the proxy asks of whoever knows the sandboxes.

use std::{fmt, future::Future};

use tokio::io::{AsyncRead, AsyncWrite};
use wrenn_proto::SandboxId;

use crate::SignedLink;

/// Knows sandboxes, and reaches their ports. Every method may be called at any time, many at once, and for ids that nobody has.
pub trait Sandboxes: Send + Sync + 'static {
    /// A byte stream to a port in a sandbox. It is dropped to close it.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Held for as long as a request is being answered or an upgraded connection is open. A sandbox that is paused for being idle
    /// is not idle while one of these exists.
    type Use: Send + 'static;

    /// What there is to know before a request is sent to a running sandbox.
    ///
    /// A sandbox that is paused and resumes on traffic is resumed here, and this waits for it; one that is about to run is waited
    /// for. One that is paused and does not resume on traffic is [`Refused::NotFound`], like one that never was. The proxy gives
    /// up after two minutes.
    ///
    /// The answer is used at once and not kept: it is asked again for each request.
    fn resolve(&self, id: &SandboxId) -> impl Future<Output = Result<Target, Refused>> + Send;

    /// The sandbox whose guest agent's token signed a link: the one for which [`SignedLink::is_signed_with`] holds. Asked for
    /// requests that do not say which sandbox they are for, so anybody can ask; it should cost no more than a hash a sandbox.
    fn signed_by(&self, link: &SignedLink<'_>) -> impl Future<Output = Option<SandboxId>> + Send;

    /// A new connection to a port. The proxy gives up after five seconds.
    fn dial(
        &self,
        id: &SandboxId,
        port: u16,
    ) -> impl Future<Output = Result<Self::Io, DialError>> + Send;

    /// Notes that a sandbox is being used from now until what is returned is dropped.
    fn begin_use(&self, id: &SandboxId) -> Self::Use;
}

/// What a request to a running sandbox must know.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Target {
    /// The guest agent's token, only where clients need none (`secure: false`): the proxy shows it for them.
    pub shown_token: Option<String>,
    /// What clients must show to reach any port but the guest agent's.
    pub traffic_token: Option<String>,
    /// What servers in the sandbox see as `Host`, the guest agent apart; `${PORT}` stands for the port.
    pub mask_host: Option<String>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("shown_token", &self.shown_token.is_some())
            .field("traffic_token", &self.traffic_token.is_some())
            .field("mask_host", &self.mask_host)
            .finish()
    }
}

/// Why a request does not reach a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// Unknown, gone, or paused without resuming on traffic.
    #[error("the sandbox was not found")]
    NotFound,
    /// Between two states for longer than can be waited for.
    #[error("the sandbox is changing its state")]
    Changing,
    /// It is paused and may not be resumed now; says why.
    #[error("the sandbox may not be resumed: {0}")]
    ResumeDenied(String),
    /// Its state cannot be told or changed at the moment; says why.
    #[error("the sandbox cannot be reached: {0}")]
    Unavailable(String),
}

/// Why a connection to a port was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// It runs, and nobody listens there.
    #[error("the port is not open")]
    PortClosed,
    /// It does not run any more: it is worth asking [`Sandboxes::resolve`] again.
    #[error("the sandbox does not run")]
    NotRunning,
    /// Its host did not do it; says why.
    #[error("the sandbox's host: {0}")]
    Host(String),
    /// Not within the proxy's own deadline.
    #[error("no connection within {0:?}")]
    TimedOut(std::time::Duration),
    /// The sandbox has as many connections as it may.
    #[error("the sandbox has too many connections")]
    TooMany,
}
