//! Status of a sandbox, and its behavior at a time-out.

use serde::{Deserialize, Serialize};

/// Lifecycle status of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum SandboxStatus {
    /// Accepted. The create has not been sent to the host yet.
    Pending,
    /// The VM is booting.
    Starting,
    /// Ready for use.
    Running,
    /// Memory, CPU state and disk are being saved.
    Pausing,
    /// Saved. Only files are left on the host. The sandbox can be resumed.
    Paused,
    /// The saved state is being restored.
    Resuming,
    /// The sandbox is being destroyed.
    Stopping,
    /// Destroyed. The record can still be read.
    Stopped,
    /// The VM was lost or did not start; `error` contains the reason. All resources are freed.
    Error,
}

impl SandboxStatus {
    /// All values, in lifecycle order.
    pub const ALL: [Self; 9] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
        Self::Stopping,
        Self::Stopped,
        Self::Error,
    ];

    /// Returns the name used on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// Returns the status with this name, or `None` if there is none.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }
}

impl std::fmt::Display for SandboxStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Action when a sandbox has been idle for `timeout_sec`, or reaches `expires_at`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// Pauses the sandbox. If the pause fails, the sandbox keeps running and the pause is retried
    /// later.
    #[default]
    Pause,
    /// Destroys the sandbox.
    Kill,
}

impl OnTimeout {
    /// Returns the name used on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Kill => "kill",
        }
    }
}

impl std::str::FromStr for OnTimeout {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "pause" => Ok(Self::Pause),
            "kill" => Ok(Self::Kill),
            _ => Err(format!("expected `pause` or `kill`, got `{s}`")),
        }
    }
}
