//! CPU models of QEMU: the defaults, and a check of a configured one.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};
use wrenn_model::CpuModel;
use wrenn_proto::supervise::Accel;

/// CPU model under TCG: x86-64-v3, with AVX2, as far as QEMU 7.2 emulates it. Many programs require
/// AVX2 and end with SIGILL otherwise. `docs/decisions/0020` contains the measurements.
///
/// `arat` declares that the local timer keeps running while the CPU sleeps, which is always true
/// here. Without it Linux keeps a 250 Hz tick, which costs an idle guest 3 % of a host CPU, and has
/// no timers finer than 4 ms.
const TCG_CPU: &str =
    "Nehalem-v1,+arat,+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+abm,+movbe,+xsave,+xsaveopt";

/// CPU model under KVM: that of the host, without nested virtualization and performance counters.
/// Both let a guest reach much more code of KVM, and counters measure other guests on the same
/// core. An operator who wants them sets `WRENN_CPU=host`. `docs/decisions/0032` has more.
const KVM_CPU: &str = "host,-vmx,-svm,pmu=off";

/// Maximum time for QEMU to start and to exit.
const CHECK_DEADLINE: Duration = Duration::from_secs(10);

/// QMP commands that end QEMU.
const QUIT: &[u8] = b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n";

/// Failure to check a CPU model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// QEMU does not have the model, or the model does not have a feature.
    #[error("QEMU rejects the CPU model `{model}` with {accel}: {reason}")]
    Rejected {
        /// The model.
        model: CpuModel,
        /// Accelerator for which it was checked.
        accel: Accel,
        /// Output of QEMU.
        reason: String,
    },
    /// QEMU could not be run.
    #[error("failed to run QEMU")]
    Run(#[source] io::Error),
    /// QEMU did not exit in time.
    #[error("QEMU did not exit within {0:?}")]
    Deadline(Duration),
}

/// Returns the CPU model that guests have by default.
#[must_use]
pub fn default_cpu(accel: Accel) -> CpuModel {
    let model = match accel {
        Accel::Kvm => KVM_CPU,
        Accel::Tcg => TCG_CPU,
    };
    model.parse().expect("the defaults are valid models")
}

/// Checks that QEMU has a CPU model, by creating a VM that does not run.
///
/// # Errors
/// See [`CpuError`].
pub async fn check_cpu(accel: Accel, model: &CpuModel) -> Result<(), CpuError> {
    let output = timeout(CHECK_DEADLINE, run(accel, model)).await;
    let output = output.map_err(|_| CpuError::Deadline(CHECK_DEADLINE))?;
    let output = output.map_err(CpuError::Run)?;
    if output.status.success() {
        return Ok(());
    }
    Err(CpuError::Rejected {
        model: model.clone(),
        accel,
        reason: reason(&String::from_utf8_lossy(&output.stderr)),
    })
}

async fn run(accel: Accel, model: &CpuModel) -> io::Result<std::process::Output> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", &accel.to_string(), "-cpu", model.as_str()])
        .args([
            "-M",
            "microvm",
            "-m",
            "32",
            "-nodefaults",
            "-no-user-config",
            "-S",
        ])
        .args(["-display", "none", "-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut commands) = qemu.stdin.take() {
        // A QEMU that has exited already reads nothing. Its output says why.
        let _ = commands.write_all(QUIT).await;
    }
    qemu.wait_with_output().await
}

/// Returns QEMU's messages in one line, without the name of the program.
fn reason(stderr: &str) -> String {
    let lines = stderr.lines().map(|line| {
        let line = line.trim();
        line.split_once("qemu-system-x86_64: ")
            .map_or(line, |(_, message)| message)
    });
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn qemu_has_the_default_models_and_those_of_release_0_1_0() {
        for model in [default_cpu(Accel::Tcg), Accel::Tcg.cpu_of_0_1_0()] {
            // A warning would be printed for each feature that QEMU does not emulate.
            let output = run(Accel::Tcg, &model).await.expect("QEMU runs");
            let messages = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!((output.status.code(), &*messages), (Some(0), ""), "{model}");
            check_cpu(Accel::Tcg, &model).await.expect("accepted");
        }
    }

    /// QEMU cannot be asked without KVM: `host` exists only there. The features are the same for
    /// any model.
    #[tokio::test]
    async fn the_default_under_kvm_has_no_nested_virtualization_and_no_performance_counters() {
        let model = default_cpu(Accel::Kvm);
        assert_eq!(model.as_str(), "host,-vmx,-svm,pmu=off");
        let emulated = model
            .as_str()
            .replace("host", "max")
            .parse()
            .expect("valid");
        let output = run(Accel::Tcg, &emulated).await.expect("QEMU runs");
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), &*messages), (Some(0), ""));
        // The state of VMs of release 0.1.0 requires the unchanged model.
        assert_eq!(Accel::Kvm.cpu_of_0_1_0().as_str(), "host");
    }

    #[tokio::test]
    async fn a_model_or_a_feature_that_qemu_does_not_have_is_named() {
        for (model, named) in [("no-such-cpu", "no-such-cpu"), ("max,+no-such", "no-such")] {
            let model: CpuModel = model.parse().expect("valid");
            let error = check_cpu(Accel::Tcg, &model).await.expect_err("rejected");
            let CpuError::Rejected { reason, .. } = &error else {
                panic!("{error}");
            };
            assert!(reason.contains(named), "{error}");
            assert!(
                !reason.contains("qemu-system") && !reason.contains('\n'),
                "{error}"
            );
        }
    }
}
