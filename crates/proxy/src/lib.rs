//! Sandbox traffic: takes a client's HTTP request to a port of a sandbox, and brings back the answer.
//!
//! ```text
//!  client ──HTTP/1.1──► listener ────► route ──► Sandboxes::resolve ──► pool of the sandbox ──► Sandboxes::dial ──► port
//!                        deadlines     id, port   may it? awake?        kept connections          a byte stream
//! ```
//!
//! Owns: what a request's address means ([`route`]), which paths of the guest
//! agent are nobody's business ([`path`]), one pool of connections a sandbox, the error answers of the contract, and the answer to a
//! browser that asks whether a page may send what does not say yet where it goes.
//! Never: knows a database or an agent's state (that is [`Sandboxes`], which the control plane implements), rewrites a path or a
//! body, buffers a body, or repeats a request that may have been acted on.
//!
//! What fails: a sandbox that is not there is `502 … was not found`, a port on which nobody listens `502 … port is not open`
//! (clients look for these words); an upstream that dies in the middle of an answer cuts the client's connection, so that no
//! client takes a part for the whole. When a sandbox stops, [`Cuts::forget`] ends all that it had open.
#![forbid(unsafe_code)]

mod body;
mod cuts;
mod failure;
mod forward;
mod headers;
pub mod link;
mod lookup;
pub mod path;
mod pool;
mod preflight;
mod proxy;
pub mod route;
mod tunnel;
mod upgrade;

pub use cuts::Cuts;
pub use link::SignedLink;
pub use lookup::{DialError, Refused, Sandboxes, Target};
pub use proxy::{Proxy, ProxyConfig};
pub use tunnel::{AgentTunnel, BadAgent};
