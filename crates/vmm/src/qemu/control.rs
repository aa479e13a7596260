//! Pausing, saving and restoring a QEMU VM.
//!
//! CPU and device state is transferred as a migration stream without memory (`x-ignore-shared`:
//! QEMU assumes that its memory is a shared file). Source: QEMU's `docs/devel/migration.rst` and
//! `qapi/migration.json`.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::sleep;
use wrenn_proto::supervise::DiskRate;
use wrenn_qmp::{QmpError, Session};

use super::{
    command_line::{DISK_DEVICE, ROOT_NODE},
    events::Events,
    process::QemuMachine,
};
use crate::ControlError;

/// Deadline for writing or reading the device state (about 50 kB), or for flushing the disk.
const STATE_DEADLINE: Duration = Duration::from_secs(60);

/// Interval between checks for the end of a migration. Finalizing takes less.
const FINALIZE_PAUSE: Duration = Duration::from_millis(1);

/// Step that adds an overlay.
const OPEN_LAYER: &str = "open a new disk layer";

/// Name of a state file's descriptor in QEMU.
const STATE_FD: &str = "state";

/// Topmost node of the disk's tree.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// Number of the overlay that is written to. 0 is the overlay that the VM started with.
    uppermost: u32,
    /// Number of the overlay opened last. An overlay that could not be put on top stays open and
    /// unused, so its number is not used again.
    opened: u32,
}

impl Disks {
    fn node(number: u32) -> String {
        match number {
            0 => ROOT_NODE.to_owned(),
            n => format!("overlay-{n}"),
        }
    }
}

impl QemuMachine {
    /// Sets the options that every migration of this process needs, and the limits of the disk.
    pub(super) async fn prepare(&mut self, rate: DiskRate) -> Result<(), ControlError> {
        self.limit_disk(rate).await?;
        let capabilities = json!({ "capabilities": [
            { "capability": "x-ignore-shared", "state": true },
            { "capability": "events", "state": true },
        ] });
        self.execute("migrate-set-capabilities", capabilities)
            .await?;
        // A restored guest is reachable as before, because the host's end of its link has a
        // constant address. An announcement would be among the guest's first actions after a
        // restore.
        let parameters = json!({ "announce-rounds": 0 });
        self.execute("migrate-set-parameters", parameters).await
    }

    /// Limits the requests of the guest. The limits belong to the device, so they stay in place
    /// when an overlay is put on top of the disk, and they do not count space that the guest trims.
    /// A rate of 0 is no limit.
    async fn limit_disk(&mut self, rate: DiskRate) -> Result<(), ControlError> {
        let limits = json!({
            "id": DISK_DEVICE,
            "bps": rate.bytes_per_sec, "bps_rd": 0, "bps_wr": 0,
            "iops": rate.ops_per_sec, "iops_rd": 0, "iops_wr": 0,
        });
        self.execute("block_set_io_throttle", limits).await
    }

    pub(super) async fn pause_cpus(&mut self) -> Result<(), ControlError> {
        self.execute("stop", Value::Null).await
    }

    pub(super) async fn resume_cpus(&mut self) -> Result<(), ControlError> {
        self.execute("cont", Value::Null).await
    }

    pub(super) async fn save_devices(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.migrate("save the device state", "migrate", file).await
    }

    pub(super) async fn load_devices(&mut self, file: OwnedFd) -> Result<(), ControlError> {
        self.migrate("load the device state", "migrate-incoming", file)
            .await
    }

    async fn migrate(
        &mut self,
        step: &'static str,
        command: &'static str,
        file: OwnedFd,
    ) -> Result<(), ControlError> {
        let name = json!({ "fdname": STATE_FD });
        let mut qmp = self.qmp.within(step, STATE_DEADLINE);
        qmp.command_with_fd("getfd", name, file.as_fd()).await?;
        // The status of the previous migration does not count.
        qmp.subscriber_mut().migration = None;
        let uri = json!({ "uri": format!("fd:{STATE_FD}") });
        qmp.command(command, uri).await?;
        if qmp.wait_for(Events::migrated).await? {
            return await_finalized(&mut qmp).await;
        }
        let info = qmp.command("query-migrate", Value::Null).await?;
        let reason = info["error-desc"].as_str().unwrap_or("no reason reported");
        Err(ControlError::Failed {
            step,
            reason: reason.to_owned(),
        })
    }

    pub(super) async fn put_overlay(&mut self, overlay: OwnedFd) -> Result<(), ControlError> {
        self.disks.opened += 1;
        let number = self.disks.opened;
        let (below, node) = (Disks::node(self.disks.uppermost), Disks::node(number));
        self.add_overlay(number, &node, overlay).await?;
        let switch = json!({ "node": below, "overlay": node });
        self.execute("blockdev-snapshot", switch).await?;
        self.disks.uppermost = number;
        Ok(())
    }

    /// Adds an overlay. The new file is not visible in the jail, so QEMU receives it as
    /// descriptors, one per access mode in which it opens the file.
    async fn add_overlay(
        &mut self,
        number: u32,
        node: &str,
        overlay: OwnedFd,
    ) -> Result<(), ControlError> {
        let read_only = rustix::fs::open(
            format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&overlay)
            ),
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .map_err(|error| ControlError::Io {
            step: OPEN_LAYER,
            source: error.into(),
        })?;
        let mut qmp = self.qmp.within(OPEN_LAYER, STATE_DEADLINE);
        for fd in [&overlay, &read_only] {
            let set = json!({ "fdset-id": number });
            qmp.command_with_fd("add-fd", set, fd.as_fd()).await?;
        }
        // Locking is off: QEMU keeps the first descriptor of the set, and with it the write lock,
        // when it reopens the file read-only. No other process uses the file.
        let file = json!({
            "driver": "file",
            "filename": format!("/dev/fdset/{number}"),
            "discard": "unmap",
            "locking": "off",
        });
        let device = json!({
            "driver": "qcow2",
            "node-name": node,
            "discard": "unmap",
            "file": file,
            "backing": null,
        });
        qmp.command("blockdev-add", device).await?;
        Ok(())
    }

    async fn execute(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<(), ControlError> {
        self.qmp.command(command, arguments).await?;
        Ok(())
    }
}

/// Waits until QEMU accepts `cont`. QEMU reports the end of a migration slightly before it leaves
/// the state in which it rejects `cont`.
async fn await_finalized(qmp: &mut Session<'_, Events>) -> Result<(), ControlError> {
    loop {
        let info = qmp.command("query-status", Value::Null).await?;
        if info["status"] != "finish-migrate" {
            return Ok(());
        }
        sleep(FINALIZE_PAUSE).await;
    }
}

impl From<QmpError> for ControlError {
    fn from(error: QmpError) -> Self {
        let source = match error {
            QmpError::Command { command, desc, .. } => {
                return Self::Rejected {
                    command,
                    reason: desc,
                };
            }
            QmpError::Deadline { step, deadline } => return Self::Deadline { step, deadline },
            QmpError::Io(source) => source,
            QmpError::Closed => io::ErrorKind::UnexpectedEof.into(),
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        };
        let step = "communicate with QEMU";
        Self::Io { step, source }
    }
}
