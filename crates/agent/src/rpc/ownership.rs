//! Ownership of sandboxes by installations.
//!
//! A control plane that was started with the wrong database must not end the sandboxes of another
//! database. Each sandbox therefore records the installation that created or adopted it, and the
//! lifecycle calls of other installations are rejected. Two cases are not checked: a sandbox of
//! release 0.1.0, which has no record, and a caller that does not send the header.

use std::sync::Arc;

use connectrpc::{ConnectError, RequestContext};
use thiserror_ext::AsReport as _;
use wrenn_proto::headers::INSTALLATION as INSTALLATION_HEADER;

use crate::{
    sandbox::{Sandbox, resources::HostContext},
    sandbox_dir::SandboxDirError,
};

/// Maximum length of an installation id, in bytes.
const MAX_ID_BYTES: usize = 64;

/// Returns the installation id of the caller, or an empty string if the caller sends none.
pub(super) fn caller(context: &RequestContext) -> Result<String, ConnectError> {
    let Some(value) = context.header(INSTALLATION_HEADER) else {
        return Ok(String::new());
    };
    let id = value.to_str().ok().filter(|id| is_id(id));
    id.map(str::to_owned)
        .ok_or_else(|| ConnectError::invalid_argument("invalid installation id in the header"))
}

fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(allowed)
}

/// Rejects a lifecycle call on a sandbox of another installation.
pub(super) fn require(sandbox: &Sandbox, caller: &str) -> Result<(), ConnectError> {
    let owner = sandbox.installation();
    if owner.is_empty() || caller.is_empty() || owner == caller {
        return Ok(());
    }
    let id = &sandbox.facts.id;
    Err(ConnectError::failed_precondition(format!(
        "sandbox {id} belongs to installation {owner}, not to {caller}: it was created with \
         another database; to move it to this installation, run `wrenn sandbox adopt {id}`"
    )))
}

/// Makes the caller's installation the owner of a sandbox. The record is flushed to disk on return.
pub(super) async fn adopt(
    host: &HostContext,
    sandbox: &Arc<Sandbox>,
    caller: String,
) -> Result<(), ConnectError> {
    if caller.is_empty() {
        return Err(ConnectError::invalid_argument(format!(
            "the header `{INSTALLATION_HEADER}` is missing"
        )));
    }
    let sandbox_dir = host.sandbox_dirs.sandbox_dir(&sandbox.facts.id);
    let id = caller.clone();
    let written = tokio::task::spawn_blocking(move || sandbox_dir.write_installation(&id)).await;
    match written {
        Ok(Ok(())) => {
            tracing::warn!(sandbox_id = %sandbox.facts.id, installation = caller, "sandbox adopted");
            sandbox.set_installation(caller);
            Ok(())
        }
        Ok(Err(error)) => Err(record_failed(&error)),
        Err(_) => Err(ConnectError::internal(
            "internal error of the host agent; see its log",
        )),
    }
}

fn record_failed(error: &SandboxDirError) -> ConnectError {
    ConnectError::internal(format!(
        "failed to record the sandbox's owner: {}",
        error.to_report_string()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installation_id_is_short_and_plain() {
        assert!(is_id("0198f0c2-6f4e") && is_id("A"));
        for wrong in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(!is_id(wrong), "{wrong}");
        }
    }
}
