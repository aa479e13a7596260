//! Plain HTTP routes: health, settings, metrics, files, snapshots.

pub mod compose;
pub mod download;
pub mod draft;
pub mod info;
pub mod link;
pub mod snapshot;
pub mod upload;
