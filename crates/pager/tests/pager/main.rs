//! Tests of the page server with a separate process as the faulting side.

mod content;
mod dirty;
mod handshake;
mod lifecycle;
mod support;
