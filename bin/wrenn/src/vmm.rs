//! Selects the VMM of guests that boot.
//!
//! | `WRENN_VMM`   | Firecracker usable        | not usable                     |
//! |---------------|---------------------------|--------------------------------|
//! | `auto`        | Firecracker               | QEMU                           |
//! | `qemu`        | QEMU                      | QEMU                           |
//! | `firecracker` | Firecracker               | error that names the reason    |
//!
//! Firecracker is usable if its program is installed, statically linked and new enough, and the
//! accelerator is KVM. Where it is usable, its snapshots are restored whatever the setting says.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use wrenn_agent::VmmConfig;
use wrenn_model::CpuModel;
use wrenn_proto::{machine::VmmKind, supervise::Accel};
use wrenn_vmm::firecracker;

use crate::{
    accel,
    config::{Settings, VmmChoice},
    output,
};

/// Name of Firecracker's program.
const PROGRAM: &str = "firecracker";

/// CPU model of Firecracker's guests. Firecracker shows the processor of the host.
const FIRECRACKER_CPU: &str = "host";

/// Selected VMM and the reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Accelerator of QEMU.
    pub(crate) accel: accel::Decision,
    /// VMM setting.
    pub(crate) choice: VmmChoice,
    /// Firecracker of this machine, or the reason why it cannot be used.
    pub(crate) firecracker: Result<Program, String>,
    /// False if the settings say that KVM is not checked.
    pub(crate) is_kvm_checked: bool,
}

/// Program of Firecracker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
}

impl Decision {
    /// Combines the setting with the capabilities of the machine. `program` is Firecracker's, or
    /// the reason why there is none.
    fn new(accel: accel::Decision, choice: VmmChoice, program: Result<Program, String>) -> Self {
        let firecracker = program.and_then(|program| match (accel.accel, &accel.no_kvm) {
            (Accel::Kvm, None) => Ok(program),
            (Accel::Kvm | Accel::Tcg, Some(why)) => Err(format!("KVM is not usable: {why}")),
            (Accel::Tcg, None) => Err("WRENN_ACCEL or --accel excludes KVM".to_owned()),
        });
        Self {
            accel,
            choice,
            firecracker,
            is_kvm_checked: true,
        }
    }

    /// Returns the VMM of guests that boot.
    pub(crate) fn boots(&self) -> VmmKind {
        match (self.choice, &self.firecracker) {
            (VmmChoice::Firecracker, _) | (VmmChoice::Auto, Ok(_)) => VmmKind::Firecracker,
            (VmmChoice::Qemu, _) | (VmmChoice::Auto, Err(_)) => VmmKind::Qemu,
        }
    }

    /// Returns the reason why the settings cannot be followed, with the settings to change.
    pub(crate) fn impossible(&self) -> Option<String> {
        if let Some(why) = self.accel.impossible() {
            return Some(format!(
                "kvm is required by the settings, but {why}; set --accel or WRENN_ACCEL to `auto` or `tcg`"
            ));
        }
        match (self.choice, &self.firecracker) {
            (VmmChoice::Firecracker, Err(why)) => Some(format!(
                "Firecracker is required by the settings and cannot be used: {why}; change that, or set --vmm or WRENN_VMM to `auto` or `qemu`"
            )),
            _ => None,
        }
    }

    /// Returns the configuration of the agent.
    pub(crate) fn config(&self, settings: &Settings) -> VmmConfig {
        VmmConfig {
            boots: self.boots(),
            accel: self.accel.accel,
            firecracker: self.firecracker.as_ref().ok().map(|p| p.path.clone()),
            kernel_args: settings.kernel_args.clone(),
        }
    }

    /// Returns the CPU model of guests that boot: the setting, or the default of the VMM.
    pub(crate) fn cpu(&self, settings: &Settings) -> CpuModel {
        match self.boots() {
            VmmKind::Qemu => accel::cpu(settings, self.accel.accel),
            VmmKind::Firecracker => FIRECRACKER_CPU.parse().expect("the model is valid"),
        }
    }

    /// Returns the CPU model of guests that boot. Fails if the VMM does not have it.
    pub(crate) async fn checked_cpu(&self, settings: &Settings) -> anyhow::Result<CpuModel> {
        match self.boots() {
            VmmKind::Qemu => accel::checked_cpu(settings, self.accel.accel).await,
            VmmKind::Firecracker => Ok(self.cpu(settings)),
        }
    }
}

/// Probes this machine and applies the settings.
pub(crate) fn decide(settings: &Settings) -> Decision {
    let search = env::var_os("PATH").unwrap_or_default();
    let program = match &settings.firecracker {
        Some(path) => examine(path),
        None => find(env::split_paths(&search))
            .ok_or_else(|| {
                "`firecracker` is not in PATH, and WRENN_FIRECRACKER is not set".to_owned()
            })
            .and_then(|path| examine(&path)),
    };
    let decision = Decision::new(accel::decide(settings), settings.vmm, program);
    if let (Some(path), Err(why)) = (&settings.firecracker, &decision.firecracker) {
        tracing::warn!(path = %path.display(), why, "Firecracker of the settings is not used");
    }
    Decision {
        is_kvm_checked: settings.kvm_check,
        ..decision
    }
}

/// Returns the first program of the name in a list of directories.
fn find(mut dirs: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    dirs.find_map(|dir| {
        let path = dir.join(PROGRAM);
        (path.is_absolute() && is_executable(&path)).then_some(path)
    })
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Checks a program, and reads its version.
fn examine(path: &Path) -> Result<Program, String> {
    let version = firecracker::examine(path);
    let version = version.map_err(|error| output::in_full(&error))?;
    Ok(Program {
        path: path.to_owned(),
        version,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AccelChoice;

    fn decision(accel: AccelChoice, no_kvm: bool, vmm: VmmChoice, installed: bool) -> Decision {
        let no_kvm = no_kvm.then(|| "no vmx".to_owned());
        let program = Program {
            path: "/opt/firecracker".into(),
            version: "1.16.1".to_owned(),
        };
        let program = installed
            .then_some(program)
            .ok_or("not installed".to_owned());
        Decision::new(accel::Decision::new(accel, no_kvm), vmm, program)
    }

    #[test]
    fn firecracker_is_the_default_where_it_can_run() {
        use AccelChoice::{Auto, Kvm, Tcg};
        for (accel, no_kvm, installed, expected) in [
            (Auto, false, true, VmmKind::Firecracker),
            (Kvm, false, true, VmmKind::Firecracker),
            (Auto, false, false, VmmKind::Qemu),
            (Auto, true, true, VmmKind::Qemu),
            (Tcg, false, true, VmmKind::Qemu),
        ] {
            let decision = decision(accel, no_kvm, VmmChoice::Auto, installed);
            assert_eq!(decision.boots(), expected, "{decision:?}");
            assert_eq!(decision.impossible(), None);
        }
    }

    #[test]
    fn setting_takes_precedence_and_must_be_possible() {
        use AccelChoice::{Auto, Tcg};
        let qemu = decision(Auto, false, VmmChoice::Qemu, true);
        assert_eq!((qemu.boots(), qemu.impossible()), (VmmKind::Qemu, None));
        for (accel, no_kvm, installed, word) in [
            (Auto, false, false, "not installed"),
            (Auto, true, true, "no vmx"),
            (Tcg, false, true, "WRENN_ACCEL"),
        ] {
            let decision = decision(accel, no_kvm, VmmChoice::Firecracker, installed);
            let why = decision.impossible().expect("impossible");
            assert!(why.contains(word) && why.contains("WRENN_VMM"), "{why}");
        }
    }

    #[test]
    fn first_executable_in_the_path_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let dirs = ["none", "plain", "good"].map(|name| dir.path().join(name));
        for (dir, mode) in [(&dirs[1], 0o644), (&dirs[2], 0o755)] {
            fs::create_dir(dir).expect("created");
            let program = dir.join(PROGRAM);
            fs::write(&program, "").expect("written");
            fs::set_permissions(&program, fs::Permissions::from_mode(mode)).expect("changed");
        }
        let good = dirs[2].join(PROGRAM);
        assert_eq!(find(dirs.into_iter()), Some(good));
        assert_eq!(find([PathBuf::from("relative")].into_iter()), None);
    }
}
