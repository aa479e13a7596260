//! Decides how guest code runs on this machine.
//!
//! `/dev/kvm` may exist where no guest can run (nested hosts without the processor's help show it, and a stock kernel
//! hangs there), so hardware virtualization counts only if the processor has it and a machine can be made.

use std::path::Path;

use wrenn_proto::supervise::Accel;

use crate::{config::AccelChoice, output};

/// What was decided, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// How guest code runs.
    pub(crate) accel: Accel,
    /// Why hardware virtualization cannot be used; `None` if it can.
    pub(crate) no_kvm: Option<String>,
}

impl Decision {
    /// Applies the setting to what the machine can do. `no_kvm` says why KVM is not usable, if it is not.
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

    /// Whether the setting asks for what this machine does not have.
    pub(crate) fn impossible(&self) -> Option<&str> {
        self.no_kvm.as_deref().filter(|_| self.accel == Accel::Kvm)
    }
}

/// Asks this machine, and applies the setting.
pub(crate) fn decide(choice: AccelChoice) -> Decision {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Decision::new(choice, why_not_kvm(&cpuinfo))
}

fn why_not_kvm(cpuinfo: &str) -> Option<String> {
    if !has_virtualization(cpuinfo) {
        return Some("the processor shows neither vmx nor svm".to_owned());
    }
    wrenn_sys::kvm::probe(Path::new("/dev/kvm"))
        .err()
        .map(|e| output::in_full(&e))
}

/// Whether `/proc/cpuinfo` lists Intel's or AMD's virtualization.
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
    fn only_the_processors_own_flags_count() {
        assert!(has_virtualization("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock\n"));
        assert!(!has_virtualization(
            "vmx flags\t: ept vpid\nmodel name : vmx\n"
        ));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn the_setting_beats_the_machine() {
        let missing = || Some("no vmx".to_owned());
        let accel = |choice, no_kvm| Decision::new(choice, no_kvm).accel;
        assert_eq!(accel(AccelChoice::Auto, None), Accel::Kvm);
        assert_eq!(accel(AccelChoice::Auto, missing()), Accel::Tcg);
        assert_eq!(accel(AccelChoice::Tcg, None), Accel::Tcg);
        assert_eq!(accel(AccelChoice::Kvm, missing()), Accel::Kvm);
    }

    #[test]
    fn asking_for_kvm_where_there_is_none_is_impossible() {
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
