//! Cold boot up to the response of a first exec, compared with bare QEMU with the same kernel up to
//! its first user-space line.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use wrenn_proto::supervise::{SupervisorSpec, files, marks};

use super::{median, rounded};
use crate::Service;

const ROUNDS: usize = 5;
const STEPS: [&str; 5] = [
    "prepared_ms",
    "vmm_started_ms",
    "kernel_ms",
    "init_ms",
    "envd_ms",
];

/// Measures both alternately, so that a change of the machine's speed affects both.
///
/// # Errors
/// A sandbox or the bare QEMU does not start.
pub async fn boot(service: &Service) -> Result<Value> {
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let mut steps = vec![Vec::new(); STEPS.len()];
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        // Differs from the template's size, which would be a restore.
        let sandbox = service.create_unready(json!({ "memory_mb": 520 })).await?;
        sandbox.exec("true", &[]).await?;
        ours.push(begun.elapsed().as_secs_f64() * 1000.0);
        let record = sandbox.record().await?;
        for (times, step) in steps.iter_mut().zip(STEPS) {
            times.push(record["boot"][step].as_f64().unwrap_or(f64::NAN));
        }
        let spec = std::fs::read(
            service
                .dir()
                .join("sandboxes")
                .join(sandbox.id())
                .join(files::SPEC),
        )?;
        let spec: SupervisorSpec = serde_json::from_slice(&spec)?;
        sandbox.destroy().await?;
        bare.push(bare_qemu(&spec)? * 1000.0);
    }
    let (ours, bare) = (median(ours), median(bare));
    let marks: serde_json::Map<_, _> = STEPS
        .iter()
        .zip(steps)
        .map(|(step, times)| ((*step).to_owned(), json!(rounded(median(times)))))
        .collect();
    Ok(json!({
        "create_to_first_exec_ms": rounded(ours),
        "reached_after": marks,
        "bare_qemu_to_first_user_space_line_ms": rounded(bare),
        "share_on_top": rounded(ours / bare - 1.0),
        "limit_share_on_top": 0.2,
        "rounds": ROUNDS,
    }))
}

/// Returns the seconds from the start of QEMU to the first line of user space. QEMU gets the
/// sandbox's kernel, initramfs, memory and CPU, but no jail, disk or network.
fn bare_qemu(spec: &SupervisorSpec) -> Result<f64> {
    let (accel, cpu) = (spec.accel.to_string(), spec.cpu());
    let begun = Instant::now();
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=on,pit=on,pic=on,rtc=on,isa-serial=on"])
        .args([
            "-accel",
            &accel,
            "-cpu",
            cpu.as_str(),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ])
        .args([
            "-m",
            &format!("{}M", spec.size.memory_mib),
            "-smp",
            &spec.size.vcpus.to_string(),
        ])
        .arg("-kernel")
        .arg(&spec.kernel)
        .arg("-initrd")
        .arg(&spec.initrd)
        .args([
            "-append",
            &spec.kernel_args,
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = child.stdout.take().context("no standard output")?;
    let mut seen = None;
    for line in BufReader::new(output).split(b'\n') {
        if String::from_utf8_lossy(&line?).contains(marks::KERNEL_DONE) {
            seen = Some(begun.elapsed().as_secs_f64());
            break;
        }
    }
    child.kill()?;
    child.wait()?;
    match seen {
        Some(seconds) => Ok(seconds),
        None => bail!("bare QEMU did not reach user space"),
    }
}
