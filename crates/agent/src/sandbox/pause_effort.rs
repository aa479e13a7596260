//! Effort of a pause: how far it goes if the guest or the host does not help.
//!
//! The control plane chooses the effort. A pause that a client requests needs the guest: the client
//! sees a failure and decides. A pause at the end of a sandbox's lifetime must succeed in the end,
//! so its later attempts need neither the guest nor its agent ([`crate::sandbox`], and
//! `lifecycle::idle` in the control plane).

/// Effort of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PauseEffort {
    /// The guest agent prepares the guest. If it does not, the pause fails.
    WithGuest,
    /// The guest agent is not asked.
    WithoutGuest,
    /// The guest agent is not asked. If the pause fails, and not for lack of disk space, the VM is
    /// ended.
    OrEnd,
}

impl PauseEffort {
    /// True if the guest agent prepares the guest.
    pub(super) fn needs_guest(self) -> bool {
        self == Self::WithGuest
    }

    /// True if the VM is ended after a pause that failed.
    pub(super) fn ends_vm(self) -> bool {
        self == Self::OrEnd
    }

    /// Returns the warning about a complete pause, for the user; empty if there is none.
    pub(super) fn warning(self) -> String {
        if self.needs_guest() {
            return String::new();
        }
        "paused without the help of the guest agent, which did not answer or refused; if a resume \
         fails, boot the sandbox from its disk"
            .to_owned()
    }
}
