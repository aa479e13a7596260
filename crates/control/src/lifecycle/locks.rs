//! Lifecycle locks: one per sandbox. A lock exists only while a task holds it or waits for it.
//!
//! A destroy that a client requests does not wait for the operation in progress:
//! [`LockGuard::give_way`] releases the lock when the destroy asks for it. The operation then ends
//! without the lock, because the destroy aborts it at the host. Its events are valid in every
//! status of a destroyed sandbox ([`crate::state_machine`]), and each write requires the version of
//! the row that was read.

use std::{collections::HashMap, pin::pin, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;
use wrenn_model::SandboxId;

type Table = HashMap<SandboxId, Arc<Lock>>;

/// Locks that are held or waited for.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Lock {
    mutex: Arc<AsyncMutex<()>>,
    /// Cancelled when a destroy waits for the lock.
    is_wanted: CancellationToken,
}

/// Held lock.
pub(crate) struct LockGuard<'a> {
    // Dropped in this order: the lock is free before the ticket checks for other waiters.
    _held: OwnedMutexGuard<()>,
    ticket: Ticket<'a>,
}

/// Interest in a lock. The last ticket removes the lock from the table, also if its owner stops
/// waiting.
struct Ticket<'a> {
    locks: &'a Locks,
    id: SandboxId,
    lock: Arc<Lock>,
}

impl Locks {
    /// Waits for the lock.
    pub(crate) async fn lock(&self, id: &SandboxId) -> LockGuard<'_> {
        let ticket = self.ticket(id);
        LockGuard {
            _held: Arc::clone(&ticket.lock.mutex).lock_owned().await,
            ticket,
        }
    }

    /// Waits for the lock, which an operation in progress gives up.
    pub(crate) async fn lock_to_destroy(&self, id: &SandboxId) -> LockGuard<'_> {
        let ticket = self.ticket(id);
        ticket.lock.is_wanted.cancel();
        LockGuard {
            _held: Arc::clone(&ticket.lock.mutex).lock_owned().await,
            ticket,
        }
    }

    /// Returns the lock if it is free.
    pub(crate) fn try_lock(&self, id: &SandboxId) -> Option<LockGuard<'_>> {
        let ticket = self.ticket(id);
        let held = Arc::clone(&ticket.lock.mutex).try_lock_owned().ok()?;
        Some(LockGuard {
            _held: held,
            ticket,
        })
    }

    fn ticket(&self, id: &SandboxId) -> Ticket<'_> {
        let lock = Arc::clone(self.table().entry(id.clone()).or_default());
        Ticket {
            locks: self,
            id: id.clone(),
            lock,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

impl LockGuard<'_> {
    /// Runs an operation of the sandbox. Releases the lock when the operation ends, or when a
    /// destroy asks for it.
    pub(crate) async fn give_way<T>(self, operation: impl Future<Output = T>) -> T {
        let wanted = self.ticket.lock.is_wanted.clone();
        let mut operation = pin!(operation);
        tokio::select! {
            biased;
            done = &mut operation => return done,
            () = wanted.cancelled() => drop(self),
        }
        operation.await
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut table = self.locks.table();
        // One reference is the table's, one is this ticket's. No third can be created while the
        // table is locked.
        if Arc::strong_count(&self.lock) == 2 {
            table.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

    use super::*;

    fn id(n: u32) -> SandboxId {
        format!("sb-{n}").parse().unwrap()
    }

    #[tokio::test]
    async fn a_lock_excludes_others_of_the_same_sandbox_only() {
        let locks = Locks::default();
        let held = locks.lock(&id(1)).await;
        assert!(locks.try_lock(&id(1)).is_none());
        assert!(locks.try_lock(&id(2)).is_some());
        drop(held);
        assert!(locks.try_lock(&id(1)).is_some());
    }

    #[tokio::test]
    async fn operation_gives_way_to_a_destroy_only_and_continues() {
        let locks = Arc::new(Locks::default());
        let (end, ended) = tokio::sync::oneshot::channel::<u32>();
        let held = Arc::clone(&locks);
        let (begin, begun) = tokio::sync::oneshot::channel();
        let operation = tokio::spawn(async move {
            let lock = held.lock(&id(1)).await;
            let _ = begin.send(());
            lock.give_way(ended).await
        });
        begun.await.unwrap();
        assert!(locks.try_lock(&id(1)).is_none());
        let destroy = locks.lock_to_destroy(&id(1)).await;
        assert!(!operation.is_finished());
        end.send(7).unwrap();
        assert_eq!(operation.await.unwrap(), Ok(7));
        assert!(locks.try_lock(&id(1)).is_none());
        drop(destroy);
        // The next operation does not give way to an earlier destroy.
        let lock = locks.lock(&id(1)).await;
        assert!(!lock.ticket.lock.is_wanted.is_cancelled());
        drop(lock);
        assert!(locks.table().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn unused_lock_is_removed() {
        let locks = Arc::new(Locks::default());
        let inside = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..200_u32 {
            let (locks, inside) = (Arc::clone(&locks), Arc::clone(&inside));
            tasks.spawn(async move {
                let id = id(n % 3);
                let held = locks.lock(&id);
                // Some tasks stop waiting.
                let held = if n % 5 == 0 {
                    tokio::time::timeout(std::time::Duration::from_micros(50), held)
                        .await
                        .ok()
                } else {
                    Some(held.await)
                };
                if held.is_some() && n % 3 == 0 {
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        assert!(locks.table().is_empty());
    }
}
