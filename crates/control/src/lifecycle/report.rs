//! Report of the host on one sandbox: the input of decisions about the sandbox's row, and the
//! source of some fields of the row.
//!
//! [`HostReport`] is the only place that reads the state in an agent's answer.

use std::fmt;

use wrenn_db::Sandbox;
use wrenn_model::BootTimes;
use wrenn_proto::rpc::hostagent::v1::{SandboxInfo, SandboxState};

/// State that the host reports for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostState {
    Starting,
    Running,
    /// Being paused or resumed.
    Changing,
    Paused,
    Error {
        reason: String,
    },
    Stopping,
}

/// Report of the host on one sandbox.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct HostReport {
    pub(crate) state: HostState,
    /// Time of the last activity known to the agent, in milliseconds since 1970.
    pub(crate) last_active_ms: i64,
    /// Warning about the sandbox, or empty.
    pub(crate) warning: String,
    /// Address of the sandbox on the host, or empty.
    pub(crate) host_ip: String,
    /// Address inside the guest, or empty.
    pub(crate) guest_ip: String,
    /// Token of the guest agent, or empty.
    pub(crate) envd_token: String,
    pub(crate) boot: Option<BootTimes>,
    /// CPU model of the running VM, or empty.
    pub(crate) cpu: String,
    /// Accelerator of the running VM, or empty.
    pub(crate) accel: String,
}

impl fmt::Debug for HostReport {
    /// Omits the token, because reports are logged.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostReport")
            .field("state", &self.state)
            .field("warning", &self.warning)
            .finish_non_exhaustive()
    }
}

impl From<&SandboxInfo> for HostReport {
    fn from(info: &SandboxInfo) -> Self {
        Self {
            state: host_state(info),
            last_active_ms: info.last_active_unix_ms,
            warning: info.warning.clone(),
            host_ip: info.host_ip.clone(),
            guest_ip: info.guest_ip.clone(),
            envd_token: info.envd_token.clone(),
            cpu: info.cpu.clone(),
            accel: info.accel.clone(),
            boot: info.boot.as_option().map(|boot| BootTimes {
                prepared_ms: boot.prepared_ms,
                vmm_started_ms: boot.vmm_started_ms,
                kernel_ms: boot.kernel_ms,
                init_ms: boot.init_ms,
                envd_ms: boot.envd_ms,
            }),
        }
    }
}

impl HostReport {
    /// Returns a report of this state without any other data.
    #[cfg(test)]
    pub(crate) fn in_state(state: HostState) -> Self {
        Self {
            state,
            ..Self::from(&SandboxInfo::default())
        }
    }

    /// Copies the host's data of a sandbox that runs again to the row. Restarts the idle time, and
    /// the lifetime with the length that the resume requested.
    pub(super) fn fill_resumed(&self, row: &mut Sandbox, now_ms: i64) {
        self.fill(row, now_ms);
        // The host's warning is empty, unless the VM had been lost.
        row.warning.clone_from(&self.warning);
        row.last_active_at = row.last_active_at.max(now_ms);
        row.renew_lifetime(now_ms);
    }

    /// Copies the host's data of a running sandbox to the row.
    pub(super) fn fill(&self, row: &mut Sandbox, now_ms: i64) {
        self.refresh(row);
        row.options.paused_disk_only = false;
        // An agent of an earlier release does not report them.
        if !self.cpu.is_empty() {
            row.options.cpu.clone_from(&self.cpu);
        }
        if !self.accel.is_empty() {
            row.options.accel.clone_from(&self.accel);
        }
        if row.started_at == 0 {
            row.started_at = now_ms;
        }
        row.error.clear();
    }

    /// Copies the data that may change while the sandbox runs to the row. Activity times only
    /// increase.
    pub(crate) fn refresh(&self, row: &mut Sandbox) {
        if !self.host_ip.is_empty() {
            row.host_ip.clone_from(&self.host_ip);
        }
        if !self.guest_ip.is_empty() {
            row.guest_ip.clone_from(&self.guest_ip);
        }
        row.last_active_at = row.last_active_at.max(self.last_active_ms);
        // A warning in the row has at least as much detail as the host's.
        if row.warning.is_empty() {
            row.warning.clone_from(&self.warning);
        }
        if !self.envd_token.is_empty() {
            row.envd_token.clone_from(&self.envd_token);
        }
        if self.boot.is_some() {
            row.boot = self.boot;
        }
    }
}

/// Converts the state that the host reports. A state that is unknown to this version requires no
/// step, like `stopping`.
fn host_state(info: &SandboxInfo) -> HostState {
    match info.state.as_known() {
        Some(SandboxState::SANDBOX_STATE_STARTING) => HostState::Starting,
        Some(SandboxState::SANDBOX_STATE_RUNNING) => HostState::Running,
        Some(SandboxState::SANDBOX_STATE_PAUSING | SandboxState::SANDBOX_STATE_RESUMING) => {
            HostState::Changing
        }
        Some(SandboxState::SANDBOX_STATE_PAUSED) => HostState::Paused,
        Some(SandboxState::SANDBOX_STATE_ERROR) => HostState::Error {
            reason: lost_reason(info),
        },
        Some(SandboxState::SANDBOX_STATE_STOPPING | SandboxState::SANDBOX_STATE_UNSPECIFIED)
        | None => HostState::Stopping,
    }
}

/// Returns the reason why the host reports the sandbox in state error.
fn lost_reason(info: &SandboxInfo) -> String {
    if info.reason.is_empty() {
        return "the VM is gone".to_owned();
    }
    info.reason.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(state: SandboxState) -> SandboxInfo {
        SandboxInfo {
            state: state.into(),
            envd_token: "a-token".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_logged_report_does_not_contain_the_token() {
        let report = HostReport::from(&info(SandboxState::SANDBOX_STATE_RUNNING));
        assert_eq!(report.envd_token, "a-token");
        assert!(!format!("{report:?}").contains("a-token"));
    }

    #[test]
    fn a_loss_without_a_reason_gets_a_default_reason() {
        let report = HostReport::from(&info(SandboxState::SANDBOX_STATE_ERROR));
        let reason = "the VM is gone".to_owned();
        assert_eq!(report.state, HostState::Error { reason });
    }

    #[test]
    fn an_unknown_state_requires_no_step() {
        for state in [
            SandboxState::SANDBOX_STATE_UNSPECIFIED,
            SandboxState::SANDBOX_STATE_STOPPING,
        ] {
            assert_eq!(HostReport::from(&info(state)).state, HostState::Stopping);
        }
    }
}
