//! What sandboxes used in the last day: one sample every 15 s of each that runs, and one as soon as it runs, in memory only.
//! Of what is older than an hour, one of five minutes is kept.
//!
//! Owns the samples and the tasks that take them. Nobody waits for a first sample: `lifecycle` says in passing that a sandbox
//! runs. Taking a sample is no use of a sandbox, and never resumes one. A history stays while its sandbox is there, paused or
//! not; a restart begins with empty ones.

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

/// Samples of the last hour, and between those of before.
const RECENT: usize = 240;
const OLDER_EVERY_MS: i64 = 5 * 60 * 1000;

/// A sample nearer to the one before it gives way to the next: however often somebody asks, the last hour fits.
const RECENT_EVERY_MS: i64 = 10 * 1000;

/// Samples of before the last hour: 23 hours.
const OLDER: usize = 276;

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

/// Statuses in which a history is kept.
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

/// What a sandbox used, oldest first.
#[derive(Debug, Default)]
struct History {
    older: VecDeque<Sample>,
    recent: VecDeque<Sample>,
}

impl History {
    fn push(&mut self, sample: Sample) {
        let mut newest = self.recent.iter().rev();
        if let (Some(last), Some(before)) = (newest.next(), newest.next())
            && last.at_ms - before.at_ms < RECENT_EVERY_MS
        {
            self.recent.pop_back();
        }
        self.recent.push_back(sample);
        if self.recent.len() > RECENT
            && let Some(left) = self.recent.pop_front()
        {
            self.keep_one_of_many(left);
        }
    }

    fn keep_one_of_many(&mut self, left: Sample) {
        let newest = self.older.back();
        if newest.is_some_and(|newest| left.at_ms - newest.at_ms < OLDER_EVERY_MS) {
            return;
        }
        self.older.push_back(left);
        if self.older.len() > OLDER {
            self.older.pop_front();
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Sample> {
        self.older.iter().chain(&self.recent)
    }
}

/// Sandboxes that begin to run: where that is said, and where it is heard.
pub(crate) fn begun() -> (mpsc::Sender<SandboxId>, mpsc::Receiver<SandboxId>) {
    mpsc::channel(MAX_BEGUN)
}

/// The histories.
pub(crate) struct Samples {
    db: Db,
    agent: AgentClient,
    histories: Mutex<HashMap<SandboxId, History>>,
}

impl Samples {
    pub(crate) fn new(db: Db, agent: AgentClient) -> Arc<Self> {
        Arc::new(Self {
            db,
            agent,
            histories: Mutex::default(),
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
        self.histories().retain(|id, _| kept.contains(id));
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
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(sandbox_id = %id, %error, "no sample"),
            Err(_) => tracing::debug!(sandbox_id = %id, "no sample in time"),
        }
    }

    /// Takes a sample of a running sandbox.
    pub(crate) async fn take(&self, id: &SandboxId) -> Result<Sample, AgentError> {
        let used = self.agent.metrics(id.as_str()).await?;
        let at_ms = clock::now_ms();
        let sample = Sample { at_ms, used };
        let mut histories = self.histories();
        let history = histories.entry(id.clone()).or_default();
        history.push(sample.clone());
        Ok(sample)
    }

    /// The newest sample.
    pub(crate) fn last(&self, id: &SandboxId) -> Option<Sample> {
        self.histories().get(id)?.recent.back().cloned()
    }

    /// The samples from one moment to another, both included, oldest first; milliseconds since 1970.
    pub(crate) fn between(&self, id: &SandboxId, start_ms: i64, end_ms: i64) -> Vec<Sample> {
        let inside = |sample: &&Sample| (start_ms..=end_ms).contains(&sample.at_ms);
        let histories = self.histories();
        let history = histories.get(id).into_iter().flat_map(History::iter);
        history.filter(inside).cloned().collect()
    }

    fn histories(&self) -> MutexGuard<'_, HashMap<SandboxId, History>> {
        self.histories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: i64) -> Sample {
        Sample {
            at_ms,
            used: rpc::GetMetricsResponse::default(),
        }
    }

    #[test]
    fn many_questions_do_not_push_the_past_out() {
        let mut history = History::default();
        for at_ms in (0..60_000).step_by(1000) {
            history.push(sample(at_ms));
        }
        let times: Vec<_> = history.iter().map(|sample| sample.at_ms).collect();
        assert_eq!(times, [0, 10_000, 20_000, 30_000, 40_000, 50_000, 59_000]);
    }

    #[test]
    fn the_last_hour_is_kept_whole_and_the_day_before_it_in_steps_of_five_minutes() {
        let mut history = History::default();
        let every_ms = 15_000;
        let day_and_a_half = 36 * 240;
        for n in 0..day_and_a_half {
            history.push(sample(n * every_ms));
        }
        let times: Vec<_> = history.iter().map(|sample| sample.at_ms).collect();
        assert_eq!(times.len(), RECENT + OLDER);
        let (older, recent) = times.split_at(OLDER);
        let steps = |times: &[i64]| -> HashSet<i64> {
            times.windows(2).map(|pair| pair[1] - pair[0]).collect()
        };
        assert_eq!(steps(recent), [every_ms].into());
        assert_eq!(steps(older), [OLDER_EVERY_MS].into());
        assert!(recent[0] > older[OLDER - 1] && recent[0] - older[OLDER - 1] <= OLDER_EVERY_MS);
        assert_eq!(recent.last(), Some(&((day_and_a_half - 1) * every_ms)));
    }
}
