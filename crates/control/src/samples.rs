//! What sandboxes used in the last hour: one sample every 15 s of each that runs, and one as soon as it runs, in memory only.
//!
//! Owns the rings and the tasks that fill them. Nobody waits for a first sample: `lifecycle` says in passing that a sandbox runs. Taking a sample is no use of a sandbox, and never resumes one. A ring stays while
//! its sandbox is there, paused or not; a restart begins with empty ones.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use tokio::{sync::mpsc, time::MissedTickBehavior};
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

/// How long a sandbox that begins to run is left alone: its client is waiting for a first command.
const FIRST_AFTER: Duration = Duration::from_secs(2);

/// What asking one may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Sandboxes looked at, at most: more than a host can have slots.
const MAX_ROWS: u32 = 100_000;

/// Sandboxes that began to run and wait for their first sample, at most. One that finds no room has one with the others.
const MAX_BEGUN: usize = 256;

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

/// Sandboxes that begin to run: where that is said, and where it is heard.
pub(crate) fn begun() -> (mpsc::Sender<SandboxId>, mpsc::Receiver<SandboxId>) {
    mpsc::channel(MAX_BEGUN)
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
    pub(crate) async fn run(
        self: Arc<Self>,
        mut begun: mpsc::Receiver<SandboxId>,
        shutdown: CancellationToken,
    ) {
        let begun = futures::stream::poll_fn(|cx| begun.poll_recv(cx));
        let first = begun.for_each_concurrent(MAX_BEGUN, |id| {
            let samples = Arc::clone(&self);
            async move {
                tokio::time::sleep(FIRST_AFTER).await;
                samples.try_take(&id).await;
            }
        });
        tokio::select! {
            () = shutdown.cancelled() => {}
            ((), ()) = futures::future::join(first, self.run_regularly()) => {}
        }
    }

    async fn run_regularly(&self) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.look().await;
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

    /// The samples from one moment to another, both included, oldest first; milliseconds since 1970.
    pub(crate) fn between(&self, id: &SandboxId, start_ms: i64, end_ms: i64) -> Vec<Sample> {
        let inside = |sample: &&Sample| (start_ms..=end_ms).contains(&sample.at_ms);
        let rings = self.rings();
        let ring = rings.get(id).into_iter().flatten();
        ring.filter(inside).cloned().collect()
    }

    fn rings(&self) -> MutexGuard<'_, HashMap<SandboxId, VecDeque<Sample>>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
