//! Keeping the chains that a sandbox stands on short, in the background.
//!
//! After a pause whose moment stands on many files, a twin of it is made that stands on few ([`crate::snapshots`]); a little later, for
//! a sandbox that is resumed at once needs the disk itself. A sandbox that is still
//! paused there when the twin is whole is paused at the twin from then on. One that was resumed in between is left alone; the next
//! pause tries again. Only a chain that became very long holds a resume up until its twin is there, and has a running sandbox of
//! which many moments are frozen paused and resumed once.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    Reply, ResumeFrom, State,
    error::{FreezeError, chain},
    owner::{Next, Owner},
};
use crate::snapshots::{PinnedBuild, SnapshotError};

/// A twin in the making.
pub(super) struct Compaction {
    /// Whose.
    of: PinnedBuild,
    task: JoinHandle<Result<PinnedBuild, SnapshotError>>,
    /// Cancelled to begin now.
    hurry: CancellationToken,
    /// Whether the work has begun.
    begun: Arc<AtomicBool>,
}

/// How long a sandbox has to be at rest before its files are merged.
const REST: Duration = Duration::from_secs(5);

/// A twin that is made, or has failed.
pub(super) struct Compacted {
    /// Whose.
    of: PinnedBuild,
    twin: Option<PinnedBuild>,
}

impl Owner {
    /// Begins to make a twin of the last moment, if that is worth it and none is being made.
    pub(super) fn begin_compaction(&mut self) {
        let Some(of) = self.pins.last.clone() else {
            return;
        };
        if self.compaction.is_some() || !self.owners.host.snapshots.depth(&of).is_worthwhile() {
            return;
        }
        let (snapshots, pin) = (self.owners.host.snapshots.clone(), of.clone());
        let (hurry, begun) = (CancellationToken::new(), Arc::<AtomicBool>::default());
        let (hurried, begins, shutdown) =
            (hurry.clone(), begun.clone(), self.owners.shutdown.clone());
        let task = self.owners.tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(REST) => {}
                () = hurried.cancelled() => {}
                () = shutdown.cancelled() => return Err(io::Error::from(io::ErrorKind::Interrupted).into()),
            }
            begins.store(true, Ordering::Relaxed);
            snapshots.compact(&pin).await
        });
        self.compaction = Some(Compaction {
            of,
            task,
            hurry,
            begun,
        });
    }

    /// Gives a twin up, and what it was to be a twin of: nobody will stand on either. A file that is being written is finished
    /// first.
    pub(super) fn give_up_compaction(&mut self) {
        let Some(Compaction { of, task, .. }) = self.compaction.take() else {
            return;
        };
        task.abort();
        let owners = self.owners.clone();
        self.owners.tasks.spawn(async move {
            let _ = task.await;
            drop(of);
            owners.collect_snapshots();
        });
    }

    /// Gives a twin up whose making has not begun; the next pause thinks of it again.
    pub(super) fn put_off_compaction(&mut self) {
        let waits = |compaction: &mut Compaction| !compaction.begun.load(Ordering::Relaxed);
        if let Some(compaction) = self.compaction.take_if(waits) {
            // If it began at this very moment its files are garbage, and collected as such.
            compaction.task.abort();
        }
    }

    /// Waits until the twin is made or has failed; never ends if none is being made. Cancel safe.
    pub(super) async fn compacted(compaction: &mut Option<Compaction>) -> Compacted {
        let Some(under_way) = compaction else {
            return std::future::pending().await;
        };
        let made = (&mut under_way.task).await;
        let of = under_way.of.clone();
        *compaction = None;
        let failed = match made {
            Ok(Ok(twin)) => {
                tracing::info!(moment = %of.id(), twin = %twin.id(), "a chain is short again");
                let twin = Some(twin);
                return Compacted { of, twin };
            }
            Ok(Err(error)) => chain(&error),
            Err(lost) => chain(&lost),
        };
        tracing::warn!(moment = %of.id(), error = failed, "a chain stays long");
        Compacted { of, twin: None }
    }

    /// Stands on the twin of its last moment from now on. One that was frozen again in between gets another twin; one that runs
    /// is left alone.
    pub(super) fn move_to_twin(&mut self, compacted: Compacted) {
        let Compacted { of, twin } = compacted;
        let rests = matches!(self.sandbox.state(), State::Paused | State::Resuming);
        let stands_there = self.pins.last.as_ref().map(PinnedBuild::id) == Some(of.id());
        if let Some(twin) = twin.filter(|_| rests) {
            if !stands_there {
                self.begin_compaction();
            } else if self.note_paused(&twin) {
                self.pins.last = Some(twin);
            }
        }
        drop(of);
        self.owners.collect_snapshots();
    }

    /// Whether its last moment stands on far too many files.
    pub(super) fn is_deep(&self) -> bool {
        let depth = |pin| self.owners.host.snapshots.depth(pin);
        // One that was never frozen itself stands on what it was made from.
        let stands_on = self.pins.last.as_ref().or(self.pins.origin.as_ref());
        stands_on.is_some_and(|moment| depth(moment).is_too_much())
    }

    /// Lets no machine be started from a chain that is far too long: waits for the twin.
    pub(super) async fn shorten_if_needed(&mut self) {
        // What is being made may be the twin of an earlier moment.
        for _ in 0..2 {
            if !self.is_deep() {
                return;
            }
            self.begin_compaction();
            if let Some(compaction) = &self.compaction {
                compaction.hurry.cancel();
            }
            let compacted = Self::compacted(&mut self.compaction).await;
            self.move_to_twin(compacted);
        }
    }

    /// Freezes a moment of a machine whose chain is far too long: it is paused, and resumed from the twin.
    pub(super) async fn freeze_and_shorten(
        &mut self,
        reply: Reply<PinnedBuild, FreezeError>,
    ) -> Next {
        let (paused, outcome) = oneshot::channel();
        let next = self.pause(paused).await;
        let outcome = match outcome.await.unwrap_or(Err(FreezeError::Gone)) {
            Ok(()) => self.pins.last.clone().ok_or(FreezeError::Gone),
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            let _ = reply.send(outcome);
            return next;
        }
        // If this fails it is paused, and says why; the moment is frozen all the same.
        let next = self.resume(ResumeFrom::Memory).await;
        let _ = reply.send(self.pins.last.clone().ok_or(FreezeError::Gone));
        next
    }
}
