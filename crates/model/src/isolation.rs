//! Isolation of guests: the boundary between a guest and its host.

/// Statement about software emulation. Every place that names the accelerator shows it.
pub const EMULATION_NOTE: &str = "software emulation is not a security boundary: run only trusted code, \
     or use a host with KVM and set WRENN_ACCEL=kvm";

/// Boundary between a guest and its host, as the accelerator determines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Hardware virtualization. Defects that let a guest out are security defects of KVM, the CPU
    /// or the VMM.
    Vm,
    /// Software emulation. The VMM's developers do not treat a guest that gets out as a security
    /// defect.
    None,
}

impl Boundary {
    /// Returns the boundary of an accelerator, `kvm` or `tcg`. An unknown accelerator counts as
    /// none.
    #[must_use]
    pub fn of_accel(accel: &str) -> Self {
        match accel {
            "kvm" => Self::Vm,
            _ => Self::None,
        }
    }

    /// Returns the warning that belongs to the boundary.
    #[must_use]
    pub const fn note(self) -> Option<&'static str> {
        match self {
            Self::Vm => None,
            Self::None => Some(EMULATION_NOTE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hardware_virtualization_is_a_boundary() {
        assert_eq!(Boundary::of_accel("kvm"), Boundary::Vm);
        assert_eq!(Boundary::of_accel("kvm").note(), None);
        for accel in ["tcg", "", "KVM", "other"] {
            let note = Boundary::of_accel(accel).note().unwrap_or_default();
            assert!(note.contains("not a security boundary"), "{accel}");
            assert!(note.contains("WRENN_ACCEL=kvm"), "{accel}");
        }
    }
}
