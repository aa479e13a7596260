//! Plain HTTP: health, settings, metrics, files.

pub mod compose;
pub mod download;
pub mod draft;
pub mod error;
pub mod info;
pub mod link;
pub mod snapshot;
pub mod upload;
