//! Signals that ask this program to end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for SIGINT, SIGTERM and SIGHUP. From its making on they no longer end the process by themselves.
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
    hup: Signal,
}

/// Which signal came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted {
    /// The signal's number.
    pub(crate) signal: i32,
}

impl Interrupted {
    /// The exit code by which a shell reports an end by this signal.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.signal
    }
}

impl Interrupts {
    /// Takes over the three signals.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    /// The next of them. May be dropped and called again.
    pub(crate) async fn recv(&mut self) -> Interrupted {
        let kind = tokio::select! {
            _ = self.int.recv() => SignalKind::interrupt(),
            _ = self.term.recv() => SignalKind::terminate(),
            _ = self.hup.recv() => SignalKind::hangup(),
        };
        Interrupted {
            signal: kind.as_raw_value(),
        }
    }
}
