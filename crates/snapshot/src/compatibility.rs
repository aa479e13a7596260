//! Compatibility of a snapshot's device state with the VMM and the processor of a host.
//!
//! Only the memory and the device state depend on them. The disk of a snapshot can be booted on any
//! host.

use wrenn_proto::{
    machine::{VmmKind, can_load},
    supervise::Accel,
};

use crate::Manifest;

/// Means of a host to run VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVmms {
    /// VMM of VMs that boot.
    pub boots: InstalledVmm,
    /// VMM of another kind, for its snapshots.
    pub other: Option<InstalledVmm>,
    /// Model of the processor, such as `GenuineIntel 6/85/7`.
    pub cpu: String,
}

/// VMM of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledVmm {
    /// Kind of the VMM.
    pub kind: VmmKind,
    /// Kind and version, such as `qemu 7.2.22`.
    pub version: String,
    /// Accelerator with which it runs guest code.
    pub accel: Accel,
}

impl HostVmms {
    /// Returns the VMM of a kind, if the host has it.
    #[must_use]
    pub fn of_kind(&self, kind: VmmKind) -> Option<&InstalledVmm> {
        std::iter::once(&self.boots)
            .chain(&self.other)
            .find(|vmm| vmm.kind == kind)
    }

    /// Returns the VMM that loads a device state which `made` saved, given by kind and version. If
    /// the host has none of the kind, returns the VMM of VMs that boot.
    fn closest(&self, made: &str) -> &InstalledVmm {
        VmmKind::of_version(made)
            .and_then(|kind| self.of_kind(kind))
            .unwrap_or(&self.boots)
    }
}

/// Reason why a host cannot load the device state of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// The accelerator differs.
    #[error("the snapshot was made under {made}, but this host runs guests under {here}")]
    Accel {
        /// Accelerator that ran the guest.
        made: Accel,
        /// Accelerator of the host.
        here: Accel,
    },
    /// The VMM belongs to another series of releases.
    #[error(
        "the snapshot was made with {made}, but this host has {here}, and only releases of the same series load it"
    )]
    Vmm {
        /// Kind and version of the VMM that saved the state.
        made: String,
        /// Kind and version of the host's VMM.
        here: String,
    },
    /// The VM has hardware that only a later version of Wrenn provides.
    #[error("the snapshot needs virtual hardware that this version of Wrenn does not provide")]
    Machine,
    /// The guest saw the processor of the host, which was another one.
    #[error("the snapshot was made on a processor {made}, but this host has a processor {here}")]
    Cpu {
        /// Processor that ran the guest.
        made: String,
        /// Processor of the host.
        here: String,
    },
}

impl Manifest {
    /// Checks that `host` can load the snapshot's device state.
    ///
    /// # Errors
    /// The first difference that matters.
    pub fn check(&self, host: &HostVmms) -> Result<(), Incompatible> {
        let needed = &self.requires;
        let made = needed.vmm.to_string();
        let here = host.closest(&made);
        if needed.accel != here.accel && VmmKind::of_version(&made) == Some(here.kind) {
            return Err(Incompatible::Accel {
                made: needed.accel,
                here: here.accel,
            });
        }
        if !can_load(&made, &here.version) {
            let here = here.version.clone();
            return Err(Incompatible::Vmm { made, here });
        }
        if !needed.machine.is_known() {
            return Err(Incompatible::Machine);
        }
        let shows_host = needed.accel.shows_host_cpu(&needed.cpu);
        match &needed.host_cpu {
            Some(made) if shows_host && *made != host.cpu => Err(Incompatible::Cpu {
                made: made.clone(),
                here: host.cpu.clone(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use wrenn_proto::machine::{Device, MachineProfile};

    use super::*;

    fn host(accel: Accel) -> HostVmms {
        HostVmms {
            boots: InstalledVmm {
                kind: VmmKind::Qemu,
                version: "qemu 7.2.22".to_owned(),
                accel,
            },
            other: None,
            cpu: "GenuineIntel 6/85/7".to_owned(),
        }
    }

    /// Returns a host that also has Firecracker.
    fn host_of_both(qemu: Accel) -> HostVmms {
        HostVmms {
            other: Some(InstalledVmm {
                kind: VmmKind::Firecracker,
                version: "firecracker 1.16.1".to_owned(),
                accel: Accel::Kvm,
            }),
            ..host(qemu)
        }
    }

    /// Returns a manifest of release 0.1.0, with further fields.
    fn manifest(accel: &str, vmm: &str, more: &str) -> Manifest {
        let text = format!(
            r#"{{"version":1,"build":"00112233445566778899aabbccddeeff","created_unix_ms":1,
            "vmm":"{vmm}","accel":"{accel}","vcpus":1,"memory_mib":512,"disk_mib":5120,
            "kernel":"/k","initrd":"/i","base_disk":"/b","disk_layers":[],"template":"minimal",
            "default_user":"root","guest_token":"t"{more}}}"#
        );
        Manifest::parse(text.as_bytes()).expect("valid")
    }

    #[test]
    fn snapshot_of_release_0_1_0_requires_the_series_of_its_vmm() {
        for vmm in ["qemu 7.2.22", "qemu 7.2.4"] {
            let manifest = manifest("tcg", vmm, "");
            assert_eq!(manifest.check(&host(Accel::Tcg)), Ok(()));
            assert_eq!(manifest.requires.machine, MachineProfile::first());
            assert_eq!(manifest.requires.cpu, Accel::Tcg.cpu_of_0_1_0());
        }
        let error = manifest("tcg", "qemu 8.2.1", "").check(&host(Accel::Tcg));
        let text = error.expect_err("another series").to_string();
        assert!(
            text.contains("qemu 8.2.1") && text.contains("qemu 7.2.22"),
            "{text}"
        );
        let error = manifest("kvm", "qemu 7.2.22", "").check(&host(Accel::Tcg));
        let text = error.expect_err("another accelerator").to_string();
        assert!(
            text.contains("under kvm") && text.contains("under tcg"),
            "{text}"
        );
    }

    #[test]
    fn snapshot_is_loaded_by_the_kind_that_made_it() {
        let here = host_of_both(Accel::Tcg);
        for (accel, vmm) in [("tcg", "qemu 7.2.4"), ("kvm", "firecracker 1.16.0")] {
            assert_eq!(manifest(accel, vmm, "").check(&here), Ok(()), "{vmm}");
        }
        for (accel, vmm, words) in [
            ("kvm", "qemu 7.2.4", ["under kvm", "under tcg"]),
            (
                "kvm",
                "firecracker 1.15.0",
                ["firecracker 1.15.0", "firecracker 1.16.1"],
            ),
            ("kvm", "other 1.0", ["other 1.0", "qemu 7.2.22"]),
        ] {
            let error = manifest(accel, vmm, "").check(&here);
            let text = error.expect_err("another VMM").to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        // A host without the kind names what it has.
        let error = manifest("kvm", "firecracker 1.16.1", "").check(&host(Accel::Tcg));
        let text = error.expect_err("no Firecracker").to_string();
        assert!(text.contains("qemu 7.2.22"), "{text}");
    }

    #[test]
    fn hardware_is_recorded_and_must_be_known() {
        let with = |devices: &str| {
            let machine = format!(r#","machine":{{"type":"microvm","devices":[{devices}]}}"#);
            manifest("tcg", "qemu 7.2.22", &machine)
        };
        let balloon = with(r#""balloon""#);
        assert_eq!(balloon.check(&host(Accel::Tcg)), Ok(()));
        assert_eq!(balloon.requires.machine.devices, [Device::Balloon]);
        let error = with(r#""balloon","later""#).check(&host(Accel::Tcg));
        assert_eq!(error, Err(Incompatible::Machine));
    }

    #[test]
    fn processor_must_match_where_the_guest_sees_it() {
        let made_with = |accel: &str, model: &str, cpu: &str| {
            let cpu = format!(r#","cpu":"{model}","host_cpu":"{cpu}""#);
            manifest(accel, "qemu 7.2.22", &cpu)
        };
        let made_on = |accel: &str, cpu: &str| made_with(accel, "host,-avx512f", cpu);
        let here = host(Accel::Kvm);
        assert_eq!(made_on("kvm", &here.cpu).check(&here), Ok(()));
        let error = made_on("kvm", "AuthenticAMD 25/1/1").check(&here);
        let text = error.expect_err("another processor").to_string();
        assert!(
            text.contains("AuthenticAMD") && text.contains("GenuineIntel"),
            "{text}"
        );
        // Recorded by no version, but harmless.
        let emulated = made_with("tcg", "max", "AuthenticAMD 25/1/1");
        assert_eq!(emulated.check(&host(Accel::Tcg)), Ok(()));
        let named = made_with("kvm", "EPYC-v1", "AuthenticAMD 25/1/1");
        assert_eq!(named.check(&here), Ok(()));
        assert_eq!(manifest("kvm", "qemu 7.2.22", "").check(&here), Ok(()));
    }
}
