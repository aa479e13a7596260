//! JSON types of the public REST API, version 1, with their OpenAPI schemas. Shared by the server
//! and the command line.
//!
//! Field names are part of the contract (`openapi/v1.yaml`). Readers must treat new fields as
//! optional.

mod api_key;
mod error;
mod file;
mod host;
mod metrics;
mod process;
mod sandbox;
mod template;

pub use api_key::{ApiKey, CreateApiKey, CreatedApiKey};
pub use error::{ErrorBody, ErrorDetail, ErrorDetails};
pub use file::{FileEntry, FileEntryReply, FileList, FilePath, ListFiles};
pub use host::{BootCounts, ColdTemplate, Health, Host, Isolation};
pub use metrics::{Metrics, MetricsPoint};
pub use process::{
    BackgroundProcess, ExecRequest, ExecResult, Process, ProcessList, Truncated, TruncatedBy,
};
pub use sandbox::{CreateSandbox, ForkSandbox, ResumeSandbox, Sandbox, UnknownSandbox};
pub use template::{CreateSnapshot, Template};
