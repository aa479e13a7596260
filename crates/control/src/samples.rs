//! Resource usage of sandboxes over the last day, in memory only. Every running sandbox is sampled
//! every 15 s, and once soon after it starts to run. Of the samples older than one hour, one per
//! five minutes is kept.
//!
//! Owns the samples and the tasks that take them. No caller waits for a first sample; `lifecycle`
//! only notifies this module that a sandbox runs. A sample does not count as activity and never
//! resumes a sandbox. A history is kept as long as its sandbox exists, paused or not. After a
//! restart of the control plane, all histories are empty.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use wrenn_db::{Db, Owner, Sandbox};
use wrenn_model::{SandboxId, SandboxStatus};
use wrenn_proto::rpc::hostagent::v1 as rpc;

use crate::{
    clock,
    fleet::{Fleet, FleetError},
};

/// Interval between two samples.
const EVERY: Duration = Duration::from_secs(15);

/// Number of samples of the last hour, and the interval of older samples.
const RECENT: usize = 240;
const OLDER_EVERY: Duration = Duration::from_secs(5 * 60);

/// A sample closer than this to its predecessor is replaced by the next one. The last hour
/// therefore fits, no matter how often samples are requested.
const RECENT_EVERY: Duration = Duration::from_secs(10);

/// Number of samples older than one hour: 23 hours.
const OLDER: usize = 276;

/// Maximum age of a sample that is used instead of taking a new one.
const FRESH: Duration = Duration::from_secs(2);

/// Number of sandboxes queried concurrently.
const AT_ONCE: usize = 4;

/// Delay of the first sample after a sandbox starts to run. Its client is waiting for a first
/// command.
const FIRST_AFTER: Duration = Duration::from_secs(2);

/// Deadline of one query.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of sandboxes that wait for their first sample. A sandbox beyond that gets its
/// first sample with the regular ones.
const MAX_BEGUN: usize = 256;

/// Statuses in which a history is kept.
const KEPT: [SandboxStatus; 4] = [
    SandboxStatus::Running,
    SandboxStatus::Pausing,
    SandboxStatus::Paused,
    SandboxStatus::Resuming,
];

/// Resource usage of a sandbox at one time, by this host's clock.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// The same by the monotonic clock, which decides how long a sample is kept and used.
    taken: Instant,
    /// Usage that the host reported.
    pub used: rpc::GetMetricsResponse,
}

/// Samples of one sandbox, oldest first.
#[derive(Debug, Default)]
struct History {
    older: VecDeque<Sample>,
    recent: VecDeque<Sample>,
}

impl History {
    fn push(&mut self, sample: Sample) {
        let mut newest = self.recent.iter().rev();
        if let (Some(last), Some(before)) = (newest.next(), newest.next())
            && last.taken.duration_since(before.taken) < RECENT_EVERY
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
        if newest.is_some_and(|newest| left.taken.duration_since(newest.taken) < OLDER_EVERY) {
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

/// Returns the two ends of the queue of sandboxes that start to run.
pub fn begun() -> (mpsc::Sender<SandboxId>, mpsc::Receiver<SandboxId>) {
    mpsc::channel(MAX_BEGUN)
}

/// Histories of all sandboxes.
pub struct Samples {
    db: Db,
    fleet: Fleet,
    histories: Mutex<HashMap<SandboxId, History>>,
}

impl Samples {
    /// Returns an empty history.
    pub fn new(db: Db, fleet: Fleet) -> Arc<Self> {
        Arc::new(Self {
            db,
            fleet,
            histories: Mutex::default(),
        })
    }

    /// Takes samples until shutdown.
    pub async fn run(
        self: Arc<Self>,
        mut begun: mpsc::Receiver<SandboxId>,
        shutdown: CancellationToken,
    ) {
        let begun = futures::stream::poll_fn(|cx| begun.poll_recv(cx));
        let first = begun.for_each_concurrent(MAX_BEGUN, |id| {
            let samples = Arc::clone(&self);
            async move {
                tokio::time::sleep(FIRST_AFTER).await;
                samples.take_first(&id).await;
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
        let rows = match self.db.states(&KEPT).await {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!(%error, "failed to list the sandboxes to sample");
                return;
            }
        };
        let kept: HashSet<_> = rows.iter().map(|row| row.id.clone()).collect();
        self.histories().retain(|id, _| kept.contains(id));
        let running = rows
            .into_iter()
            .filter(|row| row.status == SandboxStatus::Running);
        futures::stream::iter(running)
            .for_each_concurrent(AT_ONCE, async |row| {
                self.try_take(&row.id, &row.host_id).await
            })
            .await;
    }

    /// Takes a sample, unless there is a fresh one. A guest that does not answer gets none.
    pub async fn take_now(&self, row: &Sandbox) {
        let fresh = |sample: &Sample| sample.taken.elapsed() < FRESH;
        if !self.last(&row.id).as_ref().is_some_and(fresh) {
            self.try_take(&row.id, &row.host_id).await;
        }
    }

    /// Takes the first sample of a sandbox that started to run, unless it has ended.
    async fn take_first(&self, id: &SandboxId) {
        match self.db.sandbox(Owner::Any, id).await {
            Ok(Some(row)) => self.try_take(&row.id, &row.host_id).await,
            Ok(None) => {}
            Err(error) => tracing::debug!(sandbox_id = %id, %error, "failed to take a sample"),
        }
    }

    async fn try_take(&self, id: &SandboxId, host_id: &str) {
        match tokio::time::timeout(ASK_TIMEOUT, self.take_of(id, host_id)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(sandbox_id = %id, %error, "failed to take a sample"),
            Err(_) => tracing::debug!(sandbox_id = %id, "timed out taking a sample"),
        }
    }

    /// Takes a sample of a running sandbox.
    pub async fn take(&self, row: &Sandbox) -> Result<Sample, FleetError> {
        self.take_of(&row.id, &row.host_id).await
    }

    async fn take_of(&self, id: &SandboxId, host_id: &str) -> Result<Sample, FleetError> {
        let host = self.fleet.host(host_id).await?;
        let used = host.agent.metrics(id.as_str()).await?;
        let sample = Sample {
            at_ms: clock::now_ms(),
            taken: Instant::now(),
            used,
        };
        let mut histories = self.histories();
        let history = histories.entry(id.clone()).or_default();
        history.push(sample.clone());
        Ok(sample)
    }

    /// Returns the newest sample.
    pub fn last(&self, id: &SandboxId) -> Option<Sample> {
        self.histories().get(id)?.recent.back().cloned()
    }

    /// Returns the samples of an interval, both ends included, oldest first. Times are in
    /// milliseconds since the Unix epoch.
    pub fn between(&self, id: &SandboxId, start_ms: i64, end_ms: i64) -> Vec<Sample> {
        let inside = |sample: &&Sample| (start_ms..=end_ms).contains(&sample.at_ms);
        let histories = self.histories();
        let history = histories.get(id).into_iter().flat_map(History::iter);
        history.filter(inside).cloned().collect()
    }

    fn histories(&self) -> MutexGuard<'_, HashMap<SandboxId, History>> {
        self.histories.lock()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    static BEGUN: LazyLock<Instant> = LazyLock::new(Instant::now);

    fn sample(at_ms: i64) -> Sample {
        let since = Duration::from_millis(u64::try_from(at_ms).expect("after 1970"));
        Sample {
            at_ms,
            taken: *BEGUN + since,
            used: rpc::GetMetricsResponse::default(),
        }
    }

    #[test]
    fn frequent_samples_do_not_displace_old_ones() {
        let mut history = History::default();
        for at_ms in (0..60_000).step_by(1000) {
            history.push(sample(at_ms));
        }
        let times: Vec<_> = history.iter().map(|sample| sample.at_ms).collect();
        assert_eq!(times, [0, 10_000, 20_000, 30_000, 40_000, 50_000, 59_000]);
    }

    #[test]
    fn last_hour_is_kept_in_full_and_the_day_before_in_five_minute_steps() {
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
        let older_every_ms = 5 * 60 * 1000;
        assert_eq!(steps(older), [older_every_ms].into());
        assert!(recent[0] > older[OLDER - 1] && recent[0] - older[OLDER - 1] <= older_every_ms);
        assert_eq!(recent.last(), Some(&((day_and_a_half - 1) * every_ms)));
    }
}
