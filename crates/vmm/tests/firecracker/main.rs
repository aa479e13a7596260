//! Contract of the Firecracker driver with Firecracker's API: what the driver sends, compared with
//! recorded files, and what it makes of every answer. The API is simulated in this process.

mod answers;
mod handshake;
mod recorded;
mod snapshots;
mod support;
