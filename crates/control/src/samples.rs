//! What sandboxes used in the last hour: one sample every 15 s of each that runs, in memory only.
//!
//! Owns the rings and the task that fills them. Taking a sample is no use of a sandbox, and never resumes one. A ring stays while
//! its sandbox is there, paused or not; a restart begins with empty ones.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wrenn_proto::{SandboxId, rest::SandboxStatus, rpc::hostagent::v1 as rpc};

use crate::{
    agent_client::{AgentClient, AgentError},
    clock,
    db::Db,
};

/// Between two samples.
const EVERY: Duration = Duration::from_secs(15);

/// Samples of one sandbox: an hour.
const RING: usize = 240;

/// A sample that is no older than this is as good as a new one.
const FRESH_MS: i64 = 2000;

/// Sandboxes asked at the same time.
const AT_ONCE: usize = 4;

/// What asking one may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Sandboxes looked at, at most: more than a host can have slots.
const MAX_ROWS: u32 = 100_000;

/// Statuses in which a ring is kept.
const KEPT: [SandboxStatus; 4] = [
    SandboxStatus::Running,
    SandboxStatus::Pausing,
    SandboxStatus::Paused,
    SandboxStatus::Resuming,
];

/// What a sandbox used at a moment, by this host's clock.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// Milliseconds since 1970.
    pub(crate) at_ms: i64,
    pub(crate) used: rpc::GetMetricsResponse,
}

/// The rings.
pub(crate) struct Samples {
    db: Db,
    agent: AgentClient,
    rings: Mutex<HashMap<SandboxId, VecDeque<Sample>>>,
}

impl Samples {
    pub(crate) fn new(db: Db, agent: AgentClient) -> Arc<Self> {
        Arc::new(Self {
            db,
            agent,
            rings: Mutex::default(),
        })
    }

    /// Takes samples until told to stop.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.look() => {}
            }
        }
    }

    async fn look(&self) {
        let rows = match self.db.sandboxes(&KEPT, MAX_ROWS).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(%error, "cannot take samples");
                return;
            }
        };
        let kept: HashSet<_> = rows.iter().map(|row| row.id.clone()).collect();
        self.rings().retain(|id, _| kept.contains(id));
        let running = rows
            .into_iter()
            .filter(|row| row.status == SandboxStatus::Running);
        futures::stream::iter(running)
            .for_each_concurrent(AT_ONCE, async |row| self.try_take(&row.id).await)
            .await;
    }

    /// Takes a sample unless there is one of this moment. A guest that does not answer has none.
    pub(crate) async fn take_now(&self, id: &SandboxId) {
        let fresh = |sample: &Sample| clock::now_ms().saturating_sub(sample.at_ms) < FRESH_MS;
        if !self.last(id).as_ref().is_some_and(fresh) {
            self.try_take(id).await;
        }
    }

    async fn try_take(&self, id: &SandboxId) {
        match tokio::time::timeout(ASK_TIMEOUT, self.take(id)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(sandbox_id = %id, %error, "no sample"),
            Err(_) => tracing::debug!(sandbox_id = %id, "no sample in time"),
        }
    }

    async fn take(&self, id: &SandboxId) -> Result<(), AgentError> {
        let used = self.agent.metrics(id.as_str()).await?;
        let mut rings = self.rings();
        let ring = rings.entry(id.clone()).or_default();
        if ring.len() == RING {
            ring.pop_front();
        }
        let at_ms = clock::now_ms();
        ring.push_back(Sample { at_ms, used });
        Ok(())
    }

    /// The newest sample.
    pub(crate) fn last(&self, id: &SandboxId) -> Option<Sample> {
        self.rings().get(id)?.back().cloned()
    }

    /// The samples of these seconds, both included, oldest first.
    pub(crate) fn between(&self, id: &SandboxId, start_sec: i64, end_sec: i64) -> Vec<Sample> {
        let inside = |sample: &&Sample| {
            let second = sample.at_ms.div_euclid(1000);
            (start_sec..=end_sec).contains(&second)
        };
        let rings = self.rings();
        let ring = rings.get(id).into_iter().flatten();
        ring.filter(inside).cloned().collect()
    }

    fn rings(&self) -> MutexGuard<'_, HashMap<SandboxId, VecDeque<Sample>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
