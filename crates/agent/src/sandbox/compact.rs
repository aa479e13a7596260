//! Background compaction of the snapshot chain that a sandbox depends on.
//!
//! A pause whose snapshot depends on many files starts a compaction: a copy of the snapshot is made
//! that depends on few files ([`crate::snapshots`]). The compaction starts after a delay, because a
//! sandbox that is resumed at once needs the disk itself. If the sandbox is still paused at the
//! original when the copy is complete, it is paused at the copy from then on. A sandbox that was
//! resumed in the meantime is left alone; its next pause tries again.
//!
//! Only a very long chain blocks:
//!
//! | chain has more than | resume, spawn, fork | snapshot of a running sandbox                       |
//! |---------------------|---------------------|-----------------------------------------------------|
//! | 8 files             | as usual            | as usual                                            |
//! | 32 files            | waits for the copy  | taken as usual; its caller gets the compacted copy  |
//! | 64 files            | waits for the copy  | the sandbox is paused and resumed once, which       |
//! |                     |                     | closes its connections                              |
//!
//! The chain of a running VM cannot be changed, so the VM keeps its own until the next pause. Each
//! of its files costs the VMM a descriptor and a cache, which is why there is a limit. If a copy of
//! the second row cannot be made, for example because the disk is full, the caller gets the
//! snapshot with the long chain.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use thiserror_ext::AsReport as _;
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use wrenn_sys::failpoint;

use super::{
    PauseEffort, Reply, ResumeFrom, State,
    actor::{SandboxActor, Step},
    error::LifecycleError,
    resources::HostContext,
};
use crate::{
    admission::AdmissionError,
    snapshots::{Depth, SnapshotError, SnapshotRef},
};

/// Compaction in progress.
pub(super) struct Compaction {
    /// Snapshot that is compacted.
    original: SnapshotRef,
    task: JoinHandle<Result<SnapshotRef, SnapshotError>>,
    /// Cancelled to start the work immediately.
    hurry: CancellationToken,
    /// True once the work has started.
    begun: Arc<AtomicBool>,
}

/// Minimum time that a sandbox must be paused before its files are merged.
const MIN_PAUSED: Duration = Duration::from_secs(5);

/// Result of a compaction.
pub(super) struct Compacted {
    /// Snapshot that was compacted.
    original: SnapshotRef,
    compacted_copy: Option<SnapshotRef>,
}

impl SandboxActor {
    /// Starts a compaction of the last snapshot, if it is worthwhile and none is in progress.
    pub(super) fn begin_compaction(&mut self) {
        let Some(original) = self.pins.last.clone() else {
            return;
        };
        // A VMM that still exists can write to the last layer.
        let is_in_use = self.resources.are_left();
        if is_in_use || self.compaction.is_some() || !self.is_worthwhile(&original) {
            return;
        }
        let (host, pin) = (self.actors.host.clone(), original.clone());
        let (hurry, begun) = (CancellationToken::new(), Arc::<AtomicBool>::default());
        let (hurried, begins, shutdown) =
            (hurry.clone(), begun.clone(), self.actors.shutdown.clone());
        let task = self.actors.tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(MIN_PAUSED) => {}
                () = hurried.cancelled() => {}
                () = shutdown.cancelled() => return Err(io::Error::from(io::ErrorKind::Interrupted).into()),
            }
            // One at a time, so that a resume that waits for its copy does not queue behind all
            // others.
            let _turn = tokio::select! {
                turn = host.background_compactions.acquire() => turn.ok(),
                () = hurried.cancelled() => None,
                () = shutdown.cancelled() => return Err(io::Error::from(io::ErrorKind::Interrupted).into()),
            };
            begins.store(true, Ordering::Relaxed);
            compact(&host, &pin).await
        });
        self.compaction = Some(Compaction {
            original,
            task,
            hurry,
            begun,
        });
    }

    /// True if a snapshot depends on many files, or its sandbox has used up its disk space.
    fn is_worthwhile(&self, snapshot: &SnapshotRef) -> bool {
        let depth = self.actors.host.snapshots.depth(snapshot);
        depth.is_worthwhile() || (depth.is_reducible() && self.check_budget().is_err())
    }

    /// Checks that the files of the sandbox are within its budget: its disk, and the files that its
    /// last snapshot depends on.
    pub(super) fn check_budget(&self) -> Result<(), AdmissionError> {
        let host = &self.actors.host;
        let own = self.resources.sandbox_dir.as_ref();
        let mut files = own.and_then(|dir| dir.disks().ok()).unwrap_or_default();
        if let Some(last) = &self.pins.last {
            files.extend(host.snapshots.own_files(last));
        }
        host.disk_space
            .check_sandbox(self.sandbox.facts.size, &files)
    }

    /// Abandons the compaction. Neither the original nor the copy will be used. A file that is
    /// being written is completed first.
    pub(super) fn give_up_compaction(&mut self) {
        let Some(Compaction { original, task, .. }) = self.compaction.take() else {
            return;
        };
        task.abort();
        let actors = self.actors.clone();
        self.actors.tasks.spawn(async move {
            let _ = task.await;
            drop(original);
            actors.collect_snapshots();
        });
    }

    /// Abandons a compaction that has not started its work. The next pause may start another.
    pub(super) fn put_off_compaction(&mut self) {
        let waits = |compaction: &mut Compaction| !compaction.begun.load(Ordering::Relaxed);
        if let Some(compaction) = self.compaction.take_if(waits) {
            // If the work started concurrently, its files are garbage and are collected as such.
            compaction.task.abort();
        }
    }

    /// Waits until the compaction has completed or failed. Never returns if there is none. Cancel
    /// safe.
    pub(super) async fn compacted(compaction: &mut Option<Compaction>) -> Compacted {
        let Some(under_way) = compaction else {
            return std::future::pending().await;
        };
        let made = (&mut under_way.task).await;
        let original = under_way.original.clone();
        *compaction = None;
        let reason = match made {
            Ok(Ok(compacted_copy)) => {
                tracing::info!(snapshot = %original.id(), compacted_copy = %compacted_copy.id(), "chain compacted");
                let compacted_copy = Some(compacted_copy);
                return Compacted {
                    original,
                    compacted_copy,
                };
            }
            Ok(Err(error)) => error.to_report_string(),
            Err(lost) => lost.to_report_string(),
        };
        tracing::warn!(snapshot = %original.id(), error = reason, "chain compaction failed");
        Compacted {
            original,
            compacted_copy: None,
        }
    }

    /// Replaces the last snapshot by its compacted copy. If a newer snapshot was taken in the
    /// meantime, that one is compacted instead. A running sandbox is left alone.
    pub(super) fn move_to_compacted(&mut self, compacted: Compacted) {
        let Compacted {
            original,
            compacted_copy,
        } = compacted;
        let is_paused = matches!(self.sandbox.state(), State::Paused | State::Resuming(_));
        let is_last = self.pins.last.as_ref().map(SnapshotRef::id) == Some(original.id());
        if is_paused && !is_last {
            self.begin_compaction();
        } else if let Some(compacted_copy) = compacted_copy.filter(|_| is_paused)
            && self.note_paused(&compacted_copy)
        {
            self.pins.last = Some(compacted_copy);
            failpoint::hit("agent.merge.noted", None);
        }
        drop(original);
        self.actors.collect_snapshots();
    }

    /// Returns the depth of the sandbox's chain.
    fn depth(&self) -> Option<Depth> {
        // A sandbox without a snapshot of its own depends on the snapshot that it was created from.
        let base = self.pins.last.as_ref().or(self.pins.origin.as_ref());
        base.map(|snapshot| self.actors.host.snapshots.depth(snapshot))
    }

    /// True if the chain is so long that the running VM must be replaced. The VM has more layers
    /// than its last snapshot if later snapshots failed.
    pub(super) async fn is_too_deep_to_continue(&self) -> bool {
        let layers = self.status().await.map_or(0, |status| status.disk.len());
        self.depth().is_some_and(Depth::is_too_much_to_continue)
            || Depth::of_layers(layers).is_too_much_to_continue()
    }

    /// Answers with a snapshot of the running sandbox. If its chain is too long to start a VM from,
    /// with a compacted copy, which is made while the sandbox runs.
    pub(super) fn answer_snapshot(
        &self,
        snapshot: SnapshotRef,
        reply: Reply<SnapshotRef, LifecycleError>,
    ) {
        let host = self.actors.host.clone();
        if !host.snapshots.depth(&snapshot).is_too_much() {
            let _ = reply.send(Ok(snapshot));
            return;
        }
        let (turn, shutdown) = (self.copying.clone(), self.actors.shutdown.clone());
        let copy = async move {
            let copied = async {
                let _turn = turn.lock().await;
                compact(&host, &snapshot).await
            };
            let copied = tokio::select! {
                copied = copied => copied,
                () = shutdown.cancelled() => Err(io::Error::from(io::ErrorKind::Interrupted).into()),
            };
            let answer = copied.unwrap_or_else(|error| {
                tracing::warn!(snapshot = %snapshot.id(), error = error.to_report_string(), "chain compaction failed");
                snapshot
            });
            // The caller may be gone.
            let _ = reply.send(Ok(answer));
        };
        self.actors.tasks.spawn(copy.in_current_span());
    }

    /// Waits for the compacted copy if the chain is too long to start a VM from.
    pub(super) async fn shorten_if_needed(&mut self) {
        // The compaction in progress may be of an earlier snapshot.
        for _ in 0..2 {
            if !self.depth().is_some_and(Depth::is_too_much) {
                return;
            }
            self.begin_compaction();
            if let Some(compaction) = &self.compaction {
                compaction.hurry.cancel();
            }
            let requested = self.sandbox.destroy_requested();
            let compacted = tokio::select! {
                compacted = Self::compacted(&mut self.compaction) => compacted,
                // The boot that follows is aborted by the destroy.
                () = requested.cancelled() => return,
            };
            self.move_to_compacted(compacted);
        }
    }

    /// Takes a snapshot of a running sandbox whose chain is too long: pauses the sandbox and
    /// resumes it from the compacted copy.
    pub(super) async fn snapshot_and_shorten(
        &mut self,
        reply: Reply<SnapshotRef, LifecycleError>,
    ) -> Step {
        let (paused, outcome) = oneshot::channel();
        // Another sandbox must not get the memory between the pause and the resume.
        self.kept_memory = self.resources.memory.take();
        let next = self.pause(PauseEffort::WithGuest, paused).await;
        let outcome = match outcome.await.unwrap_or(Err(LifecycleError::Gone)) {
            Ok(()) => self.pins.last.clone().ok_or(LifecycleError::Gone),
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            let kept = self.kept_memory.take();
            // The VM may still run.
            self.resources.memory = kept.filter(|_| self.resources.are_left());
            let _ = reply.send(outcome);
            return next;
        }
        // If the resume fails, the sandbox stays paused with a warning. The snapshot is complete in
        // either case.
        let next = self.resume(ResumeFrom::Memory).await;
        // The VM of the failed pause may still exist.
        let kept = self.kept_memory.take();
        if self.resources.memory.is_none() && self.resources.are_left() {
            self.resources.memory = kept;
        }
        let _ = reply.send(self.pins.last.clone().ok_or(LifecycleError::Gone));
        next
    }
}

/// Makes the compacted copy of a snapshot, if the host has space for it.
async fn compact(host: &HostContext, snapshot: &SnapshotRef) -> Result<SnapshotRef, SnapshotError> {
    let files = host.snapshots.own_files(snapshot);
    let space = host.disk_space.reserve_copy(&files);
    let _space = space.map_err(|error| SnapshotError::Space(error.to_report_string()))?;
    host.snapshots.compact(snapshot).await
}
