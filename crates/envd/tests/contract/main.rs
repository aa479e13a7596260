//! The contract of the guest agent, checked from outside: the real executable in network, mount, PID and host name
//! spaces of its own, called by generated Connect clients and by bytes on a socket. Needs root.
#![forbid(unsafe_code)]

mod calls;
mod compose;
mod files;
mod filesystem;
mod frames;
mod groups;
mod input;
mod metadata;
mod output;
mod ports;
mod process;
mod raw;
mod settings;
mod terminal;
mod transfer;
mod watch;
mod world;
