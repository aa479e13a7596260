//! The page server against a process of our own as the faulting side.

mod content;
mod dirty;
mod handshake;
mod lifecycle;
mod support;
