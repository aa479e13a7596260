//! Selects the accelerator, hardware virtualization (KVM) or software emulation (TCG), and the CPU
//! model.
//!
//! `/dev/kvm` may exist where no guest can run: nested hosts without the required CPU features
//! expose it, and a stock kernel hangs there. Hardware virtualization is therefore used only if the
//! CPU reports it and a tiny guest runs as fast as it does on hardware. The guest runs in a process
//! of its own, which can be killed whatever KVM does. A setting skips both checks, for hosts whose
//! KVM runs special kernels only.

use std::{path::Path, process::Command, time::Duration};

use anyhow::bail;
use wrenn_model::CpuModel;
use wrenn_proto::supervise::Accel;
use wrenn_sys::program::run_within;
use wrenn_vmm::qemu::{self, CpuError};

use crate::{
    config::{AccelChoice, Settings},
    output,
};

/// Maximum time for the tiny guest. With hardware virtualization it takes some 50 ms.
const GUEST_DEADLINE: Duration = Duration::from_secs(3);

/// Internal command that runs the tiny guest.
pub(crate) const RUN_GUEST: &str = "kvm-guest";

/// Selected accelerator and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Selected accelerator.
    pub(crate) accel: Accel,
    /// Reason why hardware virtualization is unavailable; `None` if it is available.
    pub(crate) no_kvm: Option<String>,
}

impl Decision {
    /// Combines the setting with the capabilities of the machine. `no_kvm` is the reason why KVM is
    /// unavailable, if it is.
    pub(crate) fn new(choice: AccelChoice, no_kvm: Option<String>) -> Self {
        let by_machine = if no_kvm.is_none() {
            Accel::Kvm
        } else {
            Accel::Tcg
        };
        Self {
            accel: choice.forced().unwrap_or(by_machine),
            no_kvm,
        }
    }

    /// Returns the reason why KVM is unavailable if the setting requires it.
    pub(crate) fn impossible(&self) -> Option<&str> {
        self.no_kvm.as_deref().filter(|_| self.accel == Accel::Kvm)
    }
}

/// Probes this machine and applies the settings.
pub(crate) fn decide(settings: &Settings) -> Decision {
    let no_kvm = match settings.kvm_check {
        true => {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            why_not_kvm(&cpuinfo)
        }
        false => why_no_vm(),
    };
    Decision::new(settings.accel, no_kvm)
}

/// Returns the CPU model of guests that boot: the setting, or the default of the accelerator.
pub(crate) fn cpu(settings: &Settings, accel: Accel) -> CpuModel {
    let set = settings.cpu.clone();
    set.unwrap_or_else(|| qemu::default_cpu(accel))
}

/// Returns the CPU model of guests that boot. Fails if the VMM does not have it: otherwise every
/// boot would fail.
pub(crate) async fn checked_cpu(settings: &Settings, accel: Accel) -> anyhow::Result<CpuModel> {
    let cpu = cpu(settings, accel);
    match qemu::check_cpu(accel, &cpu).await {
        Ok(()) => {}
        Err(error @ CpuError::Rejected { .. }) => {
            bail!("{error}; set another CPU model with --cpu or WRENN_CPU, or remove the setting")
        }
        // Each create and `wrenn doctor` report what is wrong with QEMU.
        Err(error) => {
            let error = output::in_full(&error);
            tracing::warn!(error, "failed to check the CPU model");
        }
    }
    Ok(cpu)
}

fn why_not_kvm(cpuinfo: &str) -> Option<String> {
    if !has_virtualization(cpuinfo) {
        return Some("the CPU reports neither vmx nor svm".to_owned());
    }
    why_no_vm().or_else(why_no_guest)
}

/// Returns the reason why KVM creates no virtual machine, if it does not.
fn why_no_vm() -> Option<String> {
    let probed = wrenn_sys::kvm::probe(Path::new("/dev/kvm"));
    probed.err().map(|e| output::in_full(&e))
}

/// Returns the reason why KVM runs no guest, if it does not.
fn why_no_guest() -> Option<String> {
    match run_guest() {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "a tiny guest under KVM did not finish within {GUEST_DEADLINE:?}, so no kernel would boot"
        )),
        Err(error) => Some(format!("a tiny guest could not be run under KVM: {error}")),
    }
}

/// Runs the tiny guest in a process of its own. Returns false if it does not end in time.
fn run_guest() -> std::io::Result<bool> {
    let mut guest = Command::new(std::env::current_exe()?);
    let ended = run_within(GUEST_DEADLINE, guest.arg(RUN_GUEST))?;
    if ended.is_killed || ended.output.status.success() {
        return Ok(!ended.is_killed);
    }
    let reason = String::from_utf8_lossy(&ended.output.stderr);
    Err(std::io::Error::other(reason.trim().to_owned()))
}

/// True if `/proc/cpuinfo` lists the virtualization extensions of Intel or AMD.
fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|f| f == "vmx" || f == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_of_the_processor_are_read() {
        assert!(has_virtualization("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock\n"));
        assert!(!has_virtualization(
            "vmx flags\t: ept vpid\nmodel name : vmx\n"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn setting_takes_precedence_over_detection() {
        let missing = || Some("no vmx".to_owned());
        let accel = |choice, no_kvm| Decision::new(choice, no_kvm).accel;
        assert_eq!(accel(AccelChoice::Auto, None), Accel::Kvm);
        assert_eq!(accel(AccelChoice::Auto, missing()), Accel::Tcg);
        assert_eq!(accel(AccelChoice::Tcg, None), Accel::Tcg);
        assert_eq!(accel(AccelChoice::Kvm, missing()), Accel::Kvm);
    }

    #[test]
    fn requesting_missing_kvm_is_an_error() {
        let missing = || Some("no vmx".to_owned());
        let impossible = |choice, no_kvm| {
            Decision::new(choice, no_kvm)
                .impossible()
                .map(str::to_owned)
        };
        assert_eq!(impossible(AccelChoice::Kvm, missing()), missing());
        assert_eq!(impossible(AccelChoice::Kvm, None), None);
        assert_eq!(impossible(AccelChoice::Auto, missing()), None);
        assert_eq!(impossible(AccelChoice::Tcg, missing()), None);
    }
}
