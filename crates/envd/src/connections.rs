//! Connections of clients, by the time in which they came.
//!
//! A machine that is frozen and goes on elsewhere has the connections of its past in its memory, and their other ends are
//! gone. So connections belong to generations: at a freeze those of the running one are asked to end when they are idle; after
//! a restore those that still hang are cut.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// What a connection listens to.
#[derive(Debug, Clone, Default)]
pub struct Generation {
    /// End when the answer that is under way is out.
    pub drain: CancellationToken,
    /// End now.
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
    /// That of connections which come now.
    #[must_use]
    pub fn running(&self) -> Generation {
        self.lock().running.clone()
    }

    /// Those that there are end when they are idle; others belong to the next generation.
    pub fn drain(&self) {
        let mut generations = self.lock();
        let drained = std::mem::take(&mut generations.running);
        drained.drain.cancel();
        generations.frozen.push(drained);
    }

    /// Those that were drained may go on: their clients are still there.
    pub fn keep(&self) {
        self.lock().frozen.clear();
    }

    /// Those that were drained are cut: their clients are gone.
    pub fn cut(&self) {
        for generation in self.lock().frozen.drain(..) {
            generation.cut.cancel();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        // Each change leaves a state that holds.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
