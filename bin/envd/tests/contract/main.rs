//! Contract tests of the guest agent from outside. They run the real executable in its own network,
//! mount, PID and UTS namespaces, and call it with generated Connect clients and with raw bytes on
//! a socket. They need root.
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
