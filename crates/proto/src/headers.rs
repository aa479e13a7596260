//! HTTP headers of the calls between parts of Wrenn.

/// Request header of `Start` that makes the guest agent return only the start event. The agent
/// keeps the output of the process for the first client that connects.
pub const DETACHED: &str = "wrenn-detached";

/// Request header of `Start` and `Connect` that makes the guest agent report lost output as an event
/// of its own. Without the header, the guest agent reports it as text in the output.
pub const LOST_OUTPUT: &str = "wrenn-lost-output";

/// Trailer of an error of `Start`: exit code that a shell reports for a program that cannot be
/// executed.
pub const EXIT_CODE: &str = "wrenn-exit-code";

/// Request header of an upload that makes the guest agent replace the target file only after the
/// upload is complete.
pub const WHOLE_UPLOAD: &str = "wrenn-upload-whole";

/// Header of calls to the host agent that names the caller's installation: the id in the control
/// plane's database.
pub const INSTALLATION: &str = "wrenn-installation";

/// Header with the token that the guest agent requires from its clients. Source: E2B's SDKs.
pub const ACCESS_TOKEN: &str = "x-access-token";

/// Value of the `Upgrade` header with which a connection to the host agent becomes a tunnel.
pub const TUNNEL_PROTOCOL: &str = "wrenn-tunnel";
