//! Guests that end by themselves.

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use wrenn_e2e::{
    Sandbox, Service,
    wait::{GENEROUS, until},
};

use crate::pause_faults::{nothing_left, warm};
use wrenn_e2e::vmms::Vmm;

/// `reboot(2)` without a shutdown of programs. Its first two arguments are constants. The kernel
/// shuts its devices down.
const REBOOT: &str =
    "import ctypes; ctypes.CDLL(None).syscall(169, 0xfee1dead, 672274793, 0x01234567, 0)";

/// Overwrites the code of the guest's first program, which the kernel does not survive. Works
/// without the kernel's debugging keys, which a kernel may not have.
const PANIC: &str = r#"
maps = [line.split() for line in open("/proc/1/maps")]
memory = open("/proc/1/mem", "r+b", buffering=0)
for span, mode, *_ in maps:
    if mode.startswith("r-x"):
        first, end = (int(address, 16) for address in span.split("-"))
        try:
            memory.seek(first)
            memory.write(b"\xf4" * (end - first))
        except OSError:
            pass
"#;

pub(super) async fn are_reported(vmm: &Vmm) -> Result<()> {
    let (service, before) = warm(vmm.service().await?).await?;
    for (what, program, panics) in [("reboot", REBOOT, false), ("panic", PANIC, true)] {
        let sandbox = match vmm.crashes_at_a_restored_shutdown && !panics {
            true => vmm.boot(&service).await?,
            false => vmm.restore(&service).await?,
        };
        let reason = end_by(&service, &sandbox, program).await?;
        assert!(reason.contains("guest"), "{what}: {reason}");
        let console = console(&service, sandbox.id())?;
        assert_eq!(
            console.contains("Kernel panic"),
            panics,
            "{what}: {console}"
        );
        nothing_left(&service, &before, what).await?;
    }
    Ok(())
}

/// Runs a program that ends the guest. Returns the reason in the record of the sandbox.
async fn end_by(service: &Service, sandbox: &Sandbox<'_>, program: &str) -> Result<String> {
    // The guest ends before the command does, so the response is ignored.
    let body = json!({
        "cmd": "python3", "args": ["-c", program], "user": "root", "background": true
    });
    let _ = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await;
    until("the end is reported", GENEROUS, async || {
        let record = sandbox.record().await?;
        let is_over = record["status"] == "error";
        let reason = record["error"].as_str().unwrap_or_default().to_owned();
        Ok(is_over.then_some(reason))
    })
    .await
}

/// Returns the console output of a sandbox that ended.
fn console(service: &Service, id: &str) -> Result<String> {
    let mut logs = service.command("sandbox");
    let output = logs.args(["logs", "--console", id]).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
