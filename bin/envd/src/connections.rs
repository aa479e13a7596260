//! Client connections, grouped by generation.
//!
//! A guest that is restored from a snapshot has the connections of its past in memory, but their
//! other ends are gone. Connections therefore belong to generations. Before a snapshot, the
//! connections of the current generation are asked to end when they are idle. After a restore,
//! those that remain are cut.

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// Signals to the connections of one generation.
#[derive(Debug, Clone, Default)]
pub struct Generation {
    /// Ends the connection after the response in progress.
    pub drain: CancellationToken,
    /// Ends the connection immediately.
    pub cut: CancellationToken,
}

#[derive(Debug, Default)]
struct Generations {
    running: Generation,
    frozen: Vec<Generation>,
}

/// All generations that may have connections.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Generations>);

impl Connections {
    /// Returns the current generation, to which new connections belong.
    #[must_use]
    pub fn running(&self) -> Generation {
        self.lock().running.clone()
    }

    /// Ends existing connections when they are idle. Later connections belong to the next
    /// generation.
    pub fn drain(&self) {
        let mut generations = self.lock();
        let drained = std::mem::take(&mut generations.running);
        drained.drain.cancel();
        generations.frozen.push(drained);
    }

    /// Keeps the drained connections: their clients are still connected.
    pub fn keep(&self) {
        self.lock().frozen.clear();
    }

    /// Cuts the drained connections: their clients are gone.
    pub fn cut(&self) {
        for generation in self.lock().frozen.drain(..) {
            generation.cut.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        // Each change leaves a consistent state.
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_of_before_the_freeze_are_cut() {
        let connections = Connections::default();
        let before = connections.running();
        connections.drain();
        let after = connections.running();
        assert!(before.drain.is_cancelled() && !before.cut.is_cancelled());
        assert!(!after.drain.is_cancelled());
        connections.cut();
        assert!(before.cut.is_cancelled() && !after.cut.is_cancelled());
    }

    #[test]
    fn a_machine_that_was_not_frozen_in_the_end_keeps_them() {
        let connections = Connections::default();
        let before = connections.running();
        connections.drain();
        connections.keep();
        connections.cut();
        assert!(!before.cut.is_cancelled());
    }
}
