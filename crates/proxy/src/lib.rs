//! Reverse proxy for sandbox traffic: forwards a client's HTTP request to a port of a sandbox and
//! returns the response.
//!
//! ```text
//!  client ──HTTP/1.1──► listener ──► route ──► look_up ──► resolve ──► pool ──────────► dial ──────► port
//!                       deadlines    id, port  access      resume      kept connections byte stream
//! ```
//!
//! `look_up`, `resolve` and `dial` are methods of [`Sandboxes`].
//!
//! Owns routing ([`route`]), the list of blocked envd paths ([`path`]), the access checks, one
//! connection pool per sandbox, error responses, and CORS preflights that do not name a sandbox. Never accesses a
//! database or an agent's state (that is [`Sandboxes`], which the control plane implements), never
//! rewrites a path or a body, never buffers a body, and never repeats a request that may have been
//! executed.
//!
//! Failures: an unknown sandbox is answered with `502 … was not found`, a port without a listener
//! with `502 … port is not open`. Clients search for these texts. An upstream that fails in the
//! middle of a response closes the client's connection, so that no client takes a partial response
//! for a complete one. When a sandbox stops, [`ConnectionKillSwitch::forget`] closes all of its
//! connections.
#![forbid(unsafe_code)]

mod access;
mod body;
mod failure;
mod forward;
mod headers;
mod kill_switch;
pub mod link;
mod lookup;
pub mod path;
mod pool;
mod preflight;
mod proxy;
pub mod route;
mod tunnel;
mod upgrade;

pub use kill_switch::ConnectionKillSwitch;
pub use link::SignedLink;
pub use lookup::{DialError, Found, Rejected, Sandboxes, Target};
pub use proxy::{Proxy, ProxyConfig};
pub use tunnel::{AgentTunnel, InvalidAgentUrl, TunnelError};
