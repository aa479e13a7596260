//! Limits and defaults of sandboxes, files and commands. Each is defined once, here.

/// Maximum number of virtual CPUs per sandbox. The minimum is 1. See also [`VCPUS_PER_CPU`].
pub const MAX_VCPUS: u32 = 32;

/// Maximum number of virtual CPUs of one sandbox per processor of the host.
pub const VCPUS_PER_CPU: u32 = 4;

/// Minimum memory per sandbox, in MiB. With less memory, the guest does not boot reliably.
pub const MIN_MEMORY_MIB: u32 = 128;

/// Maximum memory per sandbox, in MiB. A sandbox never gets more memory than the host has.
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;

/// Default disk size of a sandbox as seen by the guest, in MiB. Blocks use space on the host only
/// after they are written.
pub const DEFAULT_DISK_MIB: u32 = 5120;

/// Maximum disk size of a sandbox, in MiB.
pub const MAX_DISK_MIB: u32 = 1024 * 1024;

/// Maximum number of copies per fork.
pub const MAX_FORK_COPIES: u32 = 100;

/// Maximum size of a sandbox's environment, names and values together, in bytes. Far below the
/// limit of exec.
pub const MAX_SANDBOX_ENVS_BYTES: usize = 64 * 1024;

/// Default idle time after which a sandbox is paused or destroyed, in seconds.
pub const DEFAULT_TIMEOUT_SEC: u32 = 300;

/// Maximum idle time in a request, in seconds: 30 days. An idle time of 0 means never.
pub const MAX_TIMEOUT_SEC: u32 = 30 * 24 * 3600;

/// Maximum size of a file in `/files/write` and in the unary file calls, in bytes.
pub const MAX_FILE_MESSAGE_BYTES: usize = 100 * 1024 * 1024;

/// Size of one chunk of a streamed file, in bytes.
pub const FILE_CHUNK_BYTES: usize = 64 * 1024;

/// Maximum output that a collected `exec` returns, in bytes per stream.
pub const MAX_EXEC_OUTPUT_BYTES: usize = 16 * 1024 * 1024;
