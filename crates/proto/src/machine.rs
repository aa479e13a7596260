//! Virtual hardware of a VM, as far as the saved state of its devices depends on it.
//!
//! A snapshot names its hardware and its CPU model, and a VM that is restored from the snapshot
//! gets exactly that. The machine type determines the kind of the VMM. A VM that boots gets
//! [`MachineProfile::current`]. Names are never changed or reused, because snapshots contain them.
//! Snapshots of release 0.1.0 name no hardware; theirs is [`MachineProfile::first`].
//!
//! Versions of the VMM: the machine types have no versions of their own, so only the VMMs' promise
//! for the releases of one series holds ([`can_load`]). See `docs/decisions/0028`.

use serde::{Deserialize, Serialize};

/// First patch number of QEMU's development versions: 7.2.50 precedes 8.0.
const FIRST_DEVELOPMENT_PATCH: u32 = 50;

/// Kind of a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmmKind {
    /// QEMU.
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl VmmKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Firecracker];

    /// Returns the name, as it stands in settings and in versions.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }

    /// Returns the kind of a VMM given by kind and version, such as `qemu 7.2.22`.
    #[must_use]
    pub fn of_version(vmm: &str) -> Option<Self> {
        let name = vmm.split(' ').next()?;
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl std::fmt::Display for VmmKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Virtual hardware of a VM, apart from its size and its CPU model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineProfile {
    /// Machine type.
    #[serde(rename = "type")]
    pub machine_type: MachineType,
    /// Devices in addition to those of every VM, in the order in which they are attached after
    /// them. Every VM has a disk, a network device, a source of random numbers and a serial port.
    pub devices: Vec<Device>,
}

/// Machine type of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineType {
    /// QEMU's `microvm`.
    Microvm,
    /// Firecracker's only machine.
    Firecracker,
    /// Machine type of a later version of Wrenn.
    #[serde(other)]
    Unknown,
}

/// Device that not every VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// Memory balloon, by which the guest reports free memory. The host never inflates it.
    Balloon,
    /// Device of a later version of Wrenn.
    #[serde(other)]
    Unknown,
}

impl MachineProfile {
    /// Returns the hardware of VMs that boot now with a VMM of this kind.
    #[must_use]
    pub fn current(kind: VmmKind) -> Self {
        Self {
            machine_type: match kind {
                VmmKind::Qemu => MachineType::Microvm,
                VmmKind::Firecracker => MachineType::Firecracker,
            },
            devices: vec![Device::Balloon],
        }
    }

    /// Returns the kind of VMM that provides the hardware. `None` if this version of Wrenn does not
    /// know it.
    #[must_use]
    pub const fn kind(&self) -> Option<VmmKind> {
        match self.machine_type {
            MachineType::Microvm => Some(VmmKind::Qemu),
            MachineType::Firecracker => Some(VmmKind::Firecracker),
            MachineType::Unknown => None,
        }
    }

    /// Returns the hardware of the VMs of release 0.1.0.
    #[must_use]
    pub const fn first() -> Self {
        Self {
            machine_type: MachineType::Microvm,
            devices: Vec::new(),
        }
    }

    /// True if this version of Wrenn can provide the hardware.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.machine_type != MachineType::Unknown && !self.devices.contains(&Device::Unknown)
    }
}

/// True if the VMM `here` can load a device state that the VMM `made` saved. Both are kind and
/// version, such as `qemu 7.2.22`.
///
/// The releases of a series (`7.2.x`) load each other's states. Two series are not compatible,
/// because the machine types have no versions. The same applies to development versions.
#[must_use]
pub fn can_load(made: &str, here: &str) -> bool {
    made == here || series(made).is_some_and(|made| series(here) == Some(made))
}

/// Returns kind, major and minor version. `None` if the text is not a release.
fn series(vmm: &str) -> Option<(&str, u32, u32)> {
    let (kind, version) = vmm.split_once(' ')?;
    let mut numbers = version.split('.').map(str::parse::<u32>);
    let mut number = || numbers.next().and_then(Result::ok);
    let (major, minor) = (number()?, number()?);
    let patch = number().unwrap_or(0);
    (patch < FIRST_DEVELOPMENT_PATCH).then_some((kind, major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_one_series_load_each_others_states() {
        for (made, here, expected) in [
            ("qemu 7.2.22", "qemu 7.2.22", true),
            ("qemu 7.2.4", "qemu 7.2.22", true),
            ("qemu 7.2.22", "qemu 7.2.4", true),
            ("qemu 7.2", "qemu 7.2.22", true),
            ("qemu 7.1.22", "qemu 7.2.22", false),
            ("qemu 8.2.1", "qemu 7.2.22", false),
            // The development of 8.0.
            ("qemu 7.2.90", "qemu 7.2.22", false),
            ("qemu 7.2.90", "qemu 7.2.90", true),
            ("other 7.2.22", "qemu 7.2.22", false),
            ("firecracker 1.16.0", "firecracker 1.16.1", true),
            ("firecracker 1.15.1", "firecracker 1.16.1", false),
            ("firecracker 7.2.22", "qemu 7.2.22", false),
            ("qemu unknown", "qemu 7.2.22", false),
            ("qemu", "qemu 7.2.22", false),
            ("", "qemu 7.2.22", false),
        ] {
            assert_eq!(can_load(made, here), expected, "{made} on {here}");
        }
    }

    #[test]
    fn profile_reads_as_it_was_written() {
        let first = MachineProfile::first();
        assert!(first.devices.is_empty());
        let [qemu, firecracker] = VmmKind::ALL.map(MachineProfile::current);
        for (profile, kind, expected) in [
            (first, "qemu", r#"{"type":"microvm","devices":[]}"#),
            (qemu, "qemu", r#"{"type":"microvm","devices":["balloon"]}"#),
            (
                firecracker,
                "firecracker",
                r#"{"type":"firecracker","devices":["balloon"]}"#,
            ),
        ] {
            assert_eq!(profile.kind().map(VmmKind::name), Some(kind));
            let text = serde_json::to_string(&profile).expect("plain data");
            assert_eq!(text, expected);
            let read: MachineProfile = serde_json::from_str(&text).expect("own output");
            assert!(read.is_known() && read == profile, "{text}");
        }
    }

    #[test]
    fn kind_is_the_first_word_of_a_version() {
        for (version, kind) in [
            ("qemu 7.2.22", Some(VmmKind::Qemu)),
            ("firecracker 1.16.1", Some(VmmKind::Firecracker)),
            ("qemu", Some(VmmKind::Qemu)),
            ("qemux 1", None),
            ("", None),
        ] {
            assert_eq!(VmmKind::of_version(version), kind, "{version}");
        }
    }

    #[test]
    fn hardware_of_a_later_version_is_read_and_not_known() {
        for text in [
            r#"{"type":"q35_9_1","devices":[]}"#,
            r#"{"type":"microvm","devices":["balloon","of_the_future"]}"#,
        ] {
            let profile: MachineProfile = serde_json::from_str(text).expect("valid");
            assert!(!profile.is_known(), "{text}");
        }
    }
}
