//! Boots from disk: attempts, the watch over their progress, and the priority of a booting kernel.
//!
//! A restore is not a boot: its kernel runs already.

use std::{sync::atomic::Ordering, time::Duration};

use tokio::{
    sync::SemaphorePermit,
    time::{Instant, MissedTickBehavior},
};
use wrenn_proto::supervise::{SupervisorSpec, files, marks};
use wrenn_sys::failpoint;

use super::{
    super::{Running, Stall, boot_watch::BootWatch, error::CreateError, resources::HostContext},
    Boot,
};
use crate::{
    cgroup::Limits,
    disk,
    sandbox_dir::{BootTimes, SandboxDir},
    supervisor::{Supervisor, final_reason},
};
/// Interval at which the progress of a boot is checked.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// Length of the end of the console output that is logged when a boot makes no progress, in bytes.
const LOGGED_CONSOLE_BYTES: usize = 2000;

/// Start of the first attempt of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::sandbox) enum Attempt {
    /// A new supervisor is started.
    First,
    /// The VM that an earlier agent started is used.
    Adopted,
}

impl Boot<'_> {
    /// Boots the kernel until the guest answers. A boot that makes no progress is ended and
    /// repeated, as often as the policy says.
    ///
    /// | end of an attempt         | next                                                       |
    /// |---------------------------|------------------------------------------------------------|
    /// | guest answers             | sandbox runs                                               |
    /// | no progress               | VM ended, new overlay, next attempt; after the last one:   |
    /// |                           | `Stalled`, and the actor frees everything                  |
    /// | VM ends, deadline expires | create fails without a retry, because a retry cannot help  |
    /// | destroy, agent shuts down | attempt abandoned                                          |
    /// | agent killed              | next agent adopts the attempt, and repeats it if necessary |
    pub(in crate::sandbox) async fn boot_from_disk(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        first: Attempt,
    ) -> Result<Running, CreateError> {
        let policy = self.host.config.boot;
        let boots = &self.host.boots;
        boots.started.fetch_add(1, Ordering::Relaxed);
        let mut attempt = 0;
        loop {
            let booted = match first {
                Attempt::Adopted if attempt == 0 => self.await_adopted(sandbox_dir, spec).await,
                _ => self.try_boot(sandbox_dir, spec, attempt).await,
            };
            let Err(CreateError::Stalled(stall)) = booted else {
                return booted;
            };
            attempt += 1;
            let console = sandbox_dir.tail(files::CONSOLE, LOGGED_CONSOLE_BYTES);
            tracing::warn!(sandbox_id = %spec.id, attempt, %stall, console, "boot made no progress");
            if attempt >= policy.attempts_after(&stall) {
                boots.stalled.fetch_add(1, Ordering::Relaxed);
                return Err(CreateError::Stalled(stall));
            }
            boots.retried.fetch_add(1, Ordering::Relaxed);
            self.end_attempt(sandbox_dir).await?;
        }
    }

    /// Makes one attempt to boot, from the overlay to a guest that answers.
    async fn try_boot(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
        attempt: u32,
    ) -> Result<Running, CreateError> {
        let tolerance = self.host.config.boot.tolerance_percent(attempt);
        let spec = &with_timer_tolerance(spec, tolerance);
        self.prepare(sandbox_dir, spec).await?;
        let host = self.host;
        let permit = tokio::select! {
            permit = host.boots.enter() => permit,
            abort = self.abort.requested() => return Err(abort),
        };
        let (mut times, started_ms) = self.prepared();
        let limits = Limits::for_guest(spec.size);
        host.cgroups.set_booting(&spec.id, limits, true);
        self.start_supervisor(sandbox_dir, None, false).await?;
        failpoint::hit("agent.start.supervised", None);
        let Some(supervisor) = self.resources.supervisor.clone() else {
            return Err(CreateError::Ended(final_reason(sandbox_dir)));
        };
        let running = tokio::select! {
            running = self.await_guest(sandbox_dir, spec, &mut times, started_ms) => running?,
            stall = watch(host, spec, &supervisor, permit) => return Err(CreateError::Stalled(stall)),
        };
        host.cgroups.set_booting(&spec.id, limits, false);
        failpoint::hit("agent.start.recovered", None);
        tracing::info!(sandbox_id = %spec.id, ?times, "sandbox running");
        Ok(running)
    }

    /// Completes an attempt that an earlier agent started.
    async fn await_adopted(
        &mut self,
        sandbox_dir: &SandboxDir,
        spec: &SupervisorSpec,
    ) -> Result<Running, CreateError> {
        let host = self.host;
        let Some(supervisor) = self.resources.supervisor.clone() else {
            return Err(CreateError::Ended(final_reason(sandbox_dir)));
        };
        let mut times = BootTimes::default();
        let guest = self.await_guest(sandbox_dir, spec, &mut times, 0);
        let running = tokio::select! {
            running = guest => running?,
            stall = watch(host, spec, &supervisor, None), if spec.restore.is_none() => {
                return Err(CreateError::Stalled(stall));
            }
        };
        let limits = Limits::for_guest(spec.size);
        host.cgroups.set_booting(&spec.id, limits, false);
        Ok(running)
    }

    /// Ends the VM of an attempt, so that the next attempt starts from the same state as the first.
    async fn end_attempt(&mut self, sandbox_dir: &SandboxDir) -> Result<(), CreateError> {
        if let Some(supervisor) = &self.resources.supervisor {
            supervisor.stop(self.host.deadlines.stop).await?;
            self.resources.supervisor = None;
        }
        disk::remove(sandbox_dir)?;
        sandbox_dir
            .forget_final_status()
            .map_err(CreateError::SandboxDir)?;
        self.abort.check()
    }
}

/// Returns when a boot makes no progress. Ends the priority of a booting kernel once the kernel is
/// up.
async fn watch(
    host: &HostContext,
    spec: &SupervisorSpec,
    supervisor: &Supervisor,
    permit: Option<SemaphorePermit<'_>>,
) -> Stall {
    let limits = Limits::for_guest(spec.size);
    let (mut watch, mut permit, mut booting) = (BootWatch::new(), permit, true);
    let mut ticks = tokio::time::interval(WATCH_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Ok(status) = supervisor.status().await else {
            watch.reset();
            continue;
        };
        if booting && status.kernel_ms.is_some() {
            host.cgroups.set_booting(&spec.id, limits, false);
            drop(permit.take());
            booting = false;
        }
        if let Some(stall) = watch.observe(Instant::now(), &status) {
            return stall;
        }
    }
}

/// Returns the specification of an attempt that tolerates this error of the guest's timer, in
/// percent.
fn with_timer_tolerance(spec: &SupervisorSpec, percent: u32) -> SupervisorSpec {
    let kernel_args = format!("{} {}{percent}", spec.kernel_args, marks::TIMER_TOLERANCE);
    SupervisorSpec {
        kernel_args,
        ..spec.clone()
    }
}
