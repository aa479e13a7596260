//! Check of a sandbox's network access against the ceiling of the operator.

use super::AdmissionError;
use crate::{network::egress::Access, sandbox::resources::HostContext};

/// Rejects access that exceeds the operator's ceiling. Applies to requests of clients only: a
/// sandbox that exists keeps its lists when the ceiling is lowered.
pub(crate) fn check(host: &HostContext, access: &Access) -> Result<(), AdmissionError> {
    Ok(host.network.ceiling().check(access)?)
}
