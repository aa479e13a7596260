//! Client connections, grouped by generation.
//!
//! A guest that is restored from a snapshot has the connections of its past in memory, but their
//! other ends are gone. Connections therefore belong to generations. A snapshot ends the current
//! generation. Before a snapshot after which the guest stops, its connections are asked to end when
//! they are idle; before one after which it keeps running, they are left alone. After a restore,
//! those that remain are cut.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// Signals to the connections of one generation. Each connection holds a clone.
#[derive(Debug, Clone, Default)]
pub struct Generation {
    /// Ends the connection after the response in progress.
    pub drain: CancellationToken,
    /// Ends the connection immediately.
    pub cut: CancellationToken,
    members: Arc<()>,
}

impl Generation {
    /// True if a connection of this generation is open.
    fn has_members(&self) -> bool {
        Arc::strong_count(&self.members) > 1
    }
}

#[derive(Debug, Default)]
struct Generations {
    running: Generation,
    /// Generations before the last snapshot, until the agent reports how the guest continues.
    frozen: Vec<Generation>,
    /// Generations that have survived a snapshot.
    kept: Vec<Generation>,
}

impl Generations {
    /// Ends the current generation.
    fn freeze(&mut self) {
        let running = std::mem::take(&mut self.running);
        self.frozen.append(&mut self.kept);
        self.frozen.push(running);
        self.frozen.retain(Generation::has_members);
    }
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
        generations.freeze();
        for generation in &generations.frozen {
            generation.drain.cancel();
        }
    }

    /// Leaves existing connections alone. Later connections belong to the next generation.
    pub fn freeze(&self) {
        self.lock().freeze();
    }

    /// Keeps the connections from before the snapshot: their clients are still connected.
    pub fn keep(&self) {
        let mut generations = self.lock();
        let frozen = std::mem::take(&mut generations.frozen);
        generations.kept.extend(frozen);
    }

    /// Cuts the connections from before the snapshot: their clients are gone.
    pub fn cut(&self) {
        let mut generations = self.lock();
        let frozen = std::mem::take(&mut generations.frozen);
        for generation in frozen.into_iter().chain(generations.kept.drain(..)) {
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
    fn a_guest_that_keeps_running_keeps_them_and_its_copies_do_not() {
        let connections = Connections::default();
        let before = connections.running();
        for _ in 0..2 {
            connections.freeze();
            connections.keep();
        }
        assert!(!before.drain.is_cancelled() && !before.cut.is_cancelled());
        connections.freeze();
        connections.cut();
        assert!(before.cut.is_cancelled());
    }

    #[test]
    fn a_guest_whose_pause_failed_keeps_them() {
        let connections = Connections::default();
        let before = connections.running();
        connections.drain();
        connections.keep();
        assert!(!before.cut.is_cancelled());
        // Until a later snapshot is restored.
        connections.freeze();
        connections.cut();
        assert!(before.cut.is_cancelled());
    }

    #[test]
    fn a_generation_without_connections_is_forgotten() {
        let connections = Connections::default();
        for _ in 0..10 {
            drop(connections.running());
            connections.freeze();
            connections.keep();
        }
        assert!(connections.lock().kept.is_empty());
    }
}
