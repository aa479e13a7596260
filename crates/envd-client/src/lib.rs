//! Client of the guest agent (`envd`): Connect calls and whole-file transfers, over HTTP/1.1.
//!
//! There is one [`EnvdClient`] per sandbox, with its own pool of connections. A connection carries
//! one call at a time, so a command that hangs blocks only its own connection, and a guest that
//! hangs affects no other sandbox. The client does not know how a connection is opened: the host's
//! agent dials the guest's address, the control plane a tunnel through the agent ([`Dial`]). Never
//! repeats a call that may have been executed.
//!
//! Deadlines of all calls to a guest agent:
//!
//! | call                                                | deadline                              |
//! |-----------------------------------------------------|---------------------------------------|
//! | lists, signals, sizes, directories, metrics         | 30 s ([`CALL_DEADLINE`])              |
//! | start of a stream: `start`, `connect`, `download`   | 30 s ([`CALL_DEADLINE`])              |
//! | [`exec`](EnvdClient::exec), also its output         | its own limit and 15 s                |
//! |                                                     | ([`EXEC_MARGIN`]); none without limit |
//! | input of a process                                  | none: a process that does not read    |
//! |                                                     | blocks the sender, as a pipe does     |
//! | events of a process                                 | none: a process may be silent         |
//! | content of a file                                   | 120 s of silence of the guest         |
//! |                                                     | ([`STALL_DEADLINE`])                  |
//! | `/init`, `/snapshot/prepare`, `/snapshot/recover`   | 60 s ([`HOST_CALL_DEADLINE`])         |
//! | `/health` of a guest that boots                     | 40 ms to connect, then 5 s            |
//! | `/health` of a running guest                        | the caller's                          |
//!
//! Opening a connection takes part of the call's deadline. Calls without a deadline end with their
//! connection, which ends with the sandbox.
//!
//! | failure                                  | error                                            |
//! |------------------------------------------|--------------------------------------------------|
//! | the connection cannot be opened          | the error of [`Dial::dial`]                      |
//! | the connection breaks                    | `unavailable`, with a source                     |
//! | no answer within the deadline            | `deadline_exceeded`                              |
//! | the guest agent rejects the call         | its code and message; an unknown user is         |
//! |                                          | `invalid_argument`                               |
//! | the program of a command cannot run      | `invalid_argument`, with an [`exit_code`]        |
//! | events are not taken for 5 minutes       | `data_loss`; the process goes on                 |
#![forbid(unsafe_code)]

mod broken;
mod client;
mod deadline;
mod dial;
mod exec;
mod files;
mod filesystem;
mod guest_error;
mod host_calls;
mod process;

pub use client::EnvdClient;
pub use deadline::{CALL_DEADLINE, EXEC_MARGIN, HOST_CALL_DEADLINE, STALL_DEADLINE};
pub use dial::{Dial, Stream};
pub use exec::{Exec, ExecOutput};
pub use files::Download;
pub use host_calls::{Init, Metrics, Prepare, Recover, entropy};
pub use process::{ProcessEvents, exit_code};
