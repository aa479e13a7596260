//! Boot, commands, files and network policy.

use std::fs;

use anyhow::Result;
use serde_json::json;

use crate::network;
use wrenn_e2e::vmms::Vmm;

/// Number of this boot of a kernel, which may have the same version as that of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

pub(super) async fn boots_and_serves(vmm: &Vmm) -> Result<()> {
    let service = vmm.service().await?;
    let sandbox = vmm.boot(&service).await?;
    let record = sandbox.record().await?;
    for step in [
        "prepared_ms",
        "vmm_started_ms",
        "kernel_ms",
        "init_ms",
        "envd_ms",
    ] {
        let took = record["boot"][step].as_u64();
        assert!(took.is_some_and(|ms| ms > 0), "{step}: {record}");
    }
    let written: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    sandbox.write("/root/written", written.clone()).await?;
    assert_eq!(sandbox.read("/root/written").await?, written);
    let line = format!("cat {BOOT_ID}; echo to stderr >&2; exit 7");
    let output = sandbox.shell(&line).await?;
    assert_eq!((output.code, output.stderr.as_str()), (7, "to stderr\n"));
    assert_ne!(output.stdout, fs::read_to_string(BOOT_ID)?);
    sandbox.destroy().await
}

pub(super) async fn egress_follows_the_request(vmm: &Vmm) -> Result<()> {
    let service = vmm.service().await?;
    network::egress_follows_the_request(&service, &json!({ "memory_mb": 512 })).await
}
