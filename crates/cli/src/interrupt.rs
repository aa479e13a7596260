//! Signals that ask this program to end.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What comes within this time of another signal is the same wish: some senders tell a process and then its group.
const SAME_WISH: Duration = Duration::from_secs(1);

/// Waits for SIGINT, SIGTERM and SIGHUP. From its making on they no longer end the process by themselves.
pub(crate) struct Interrupts {
    int: Signal,
    term: Signal,
    hup: Signal,
    last: Option<Instant>,
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
            last: None,
        })
    }

    /// The next of them. May be dropped and called again; a signal right after another does not count.
    pub(crate) async fn recv(&mut self) -> Interrupted {
        loop {
            let kind = tokio::select! {
                _ = self.int.recv() => SignalKind::interrupt(),
                _ = self.term.recv() => SignalKind::terminate(),
                _ = self.hup.recv() => SignalKind::hangup(),
            };
            let again = self.last.is_some_and(|last| last.elapsed() < SAME_WISH);
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
    async fn a_signal_right_after_another_is_the_same_wish() {
        let mut interrupts = Interrupts::new().expect("handlers");
        raise(Number::SIGTERM).expect("sent");
        let first = interrupts.recv().await;
        assert_eq!(first.exit_code(), 143);
        raise(Number::SIGINT).expect("sent");
        let again = tokio::time::timeout(SAME_WISH / 2, interrupts.recv()).await;
        assert!(again.is_err(), "{again:?}");
    }
}
