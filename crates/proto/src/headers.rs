//! HTTP headers of the calls between parts of Wrenn.

/// Request header of `Start` that makes the guest agent return only the start event. The agent
/// keeps the output of the process for the first client that connects.
pub const DETACHED: &str = "wrenn-detached";

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
