//! QEMU's state as reported by its events.

use serde_json::Value;
use wrenn_qmp::Subscriber;

/// State of a VM that QEMU reports by events.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Reason for the guest's shutdown, if QEMU has reported one.
    pub(super) shutdown_reason: Option<String>,
    /// Last migration status reported by QEMU.
    pub(super) migration: Option<String>,
    /// True if QEMU has paused the guest after a failed write.
    pub(super) stalled: bool,
}

impl Events {
    /// Returns true if the last migration succeeded, false if it failed, and `None` if it has not
    /// ended.
    pub(super) fn migrated(&self) -> Option<bool> {
        match self.migration.as_deref()? {
            "completed" => Some(true),
            "failed" | "cancelled" => Some(false),
            _ => None,
        }
    }
}

impl Subscriber for Events {
    fn on_event(&mut self, name: &str, data: &Value) {
        match name {
            "SHUTDOWN" => {
                let reason = data["reason"].as_str().unwrap_or("unknown");
                self.shutdown_reason = Some(reason.to_owned());
            }
            // By default a full disk pauses the guest. Other errors are reported to the guest.
            "BLOCK_IO_ERROR" if data["action"] == "stop" => self.stalled = true,
            "RESUME" => self.stalled = false,
            "MIGRATION" => self.migration = data["status"].as_str().map(str::to_owned),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_full_disk_stalls_the_guest_until_it_resumes() {
        let mut events = Events::default();
        events.on_event("BLOCK_IO_ERROR", &json!({ "action": "report" }));
        assert!(!events.stalled);
        events.on_event("BLOCK_IO_ERROR", &json!({ "action": "stop" }));
        assert!(events.stalled);
        events.on_event("RESUME", &Value::Null);
        assert!(!events.stalled);
    }

    #[test]
    fn a_migration_ends_by_success_or_failure() {
        let mut events = Events::default();
        for (status, migrated) in [
            ("setup", None),
            ("active", None),
            ("completed", Some(true)),
            ("failed", Some(false)),
            ("cancelled", Some(false)),
        ] {
            events.on_event("MIGRATION", &json!({ "status": status }));
            assert_eq!(events.migrated(), migrated, "{status}");
        }
    }
}
