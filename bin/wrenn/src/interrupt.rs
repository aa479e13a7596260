//! Signals that ask this program to stop.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Time within which a further signal counts as the same request: some senders signal a process and
/// then its group.
const REPEAT_WINDOW: Duration = Duration::from_secs(1);

/// Receiver of SIGINT, SIGTERM and SIGHUP. Once created, these signals no longer terminate the
/// process.
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
    hup: Signal,
    last: Option<Instant>,
}

/// Received signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted {
    /// Number of the signal.
    pub(crate) signal: i32,
}

impl Interrupted {
    /// Returns the exit code with which a shell reports termination by this signal.
    pub(crate) fn exit_code(self) -> i32 {
        128 + self.signal
    }
}

impl Interrupts {
    /// Installs handlers for the three signals.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hup: signal(SignalKind::hangup())?,
            last: None,
        })
    }

    /// Waits for the next signal. Cancel-safe. A signal shortly after another is ignored.
    pub(crate) async fn recv(&mut self) -> Interrupted {
        loop {
            let kind = tokio::select! {
                _ = self.int.recv() => SignalKind::interrupt(),
                _ = self.term.recv() => SignalKind::terminate(),
                _ = self.hup.recv() => SignalKind::hangup(),
            };
            let again = self.last.is_some_and(|last| last.elapsed() < REPEAT_WINDOW);
            if !again {
                self.last = Some(Instant::now());
                return Interrupted {
                    signal: kind.as_raw_value(),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal as Number, raise};

    use super::*;

    #[tokio::test]
    async fn repeated_signal_within_a_second_counts_once() {
        let mut interrupts = Interrupts::new().expect("handlers");
        raise(Number::SIGTERM).expect("sent");
        let first = interrupts.recv().await;
        assert_eq!(first.exit_code(), 143);
        raise(Number::SIGINT).expect("sent");
        let again = tokio::time::timeout(REPEAT_WINDOW / 2, interrupts.recv()).await;
        assert!(again.is_err(), "{again:?}");
    }
}
