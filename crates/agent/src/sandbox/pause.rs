//! Pause, snapshot and resume of a sandbox.
//!
//! Steps of a pause:
//!
//! | # | step                                                   | failure                         |
//! |---|--------------------------------------------------------|---------------------------------|
//! | 1 | new calls are rejected, calls in progress drained      | none; continues after 2 s       |
//! | 2 | the guest prepares (`preparation.rs`), unless the      | guest fails or does not answer  |
//! |   | pause does without it (`pause_effort.rs`)              |                                 |
//! | 3 | the supervisor pauses vCPUs, writes devices and memory | disk full, VMM error, timeout   |
//! | 4 | disk linked, manifest written, snapshot published      | disk full                       |
//! | 5 | `snapshot.json` written by rename                      | disk full                       |
//! | 6 | VM ended, network and cgroup freed                     | a resource cannot be freed      |
//!
//! Result of a failed step, and state that the next agent finds if this agent is killed after the
//! step:
//!
//! | # | sandbox after the failure             | next agent finds                          |
//! |---|---------------------------------------|-------------------------------------------|
//! | 1 | -                                     | running VM                                |
//! | 2 | guest recovered, running              | running VM: recovers the guest            |
//! | 3 | VM resumed by the supervisor,         | snapshot in progress: waits for its end;  |
//! |   | guest recovered, running              | paused VM: resumes it, recovers the guest |
//! | 4 | VM resumed, guest recovered, running  | paused VM: resumes it, recovers the guest |
//! | 5 | as 4; the published files are garbage | **paused** sandbox: frees the rest        |
//! | 6 | paused; freed by resume or destroy    | paused sandbox: frees the rest            |
//!
//! A failed step of a pause that must succeed ([`PauseEffort::OrEnd`]) ends the VM instead, unless
//! the host's disk is full: the sandbox is paused at its last snapshot, or in state error without
//! one.
//!
//! A destroy aborts steps 1 to 3, the roll-back of any step, and the wait for a compacted chain. It
//! then frees everything, so nothing is rolled back. A snapshot that is being published is
//! completed first, which takes as long as the disk takes to flush it.
//!
//! A snapshot of a sandbox that keeps running (named snapshot, fork) is rejected if the host is
//! short of disk space or the sandbox has used up its budget. It takes steps 2 and 3, then resumes
//! the VM and recovers the guest at once. The guest keeps its connections and forwarded ports: what
//! is in progress stops for as long as the vCPUs do, and goes on. The snapshot is published while
//! the VM runs, with copies of the disk's files, because the VMM may still write to them. It is
//! compacted if its chain is long (`compact.rs`). The previous file of the sandbox's disk stays in
//! place, as a layer below the new file. If step 3 fails after the VM was switched to the new file,
//! the VM keeps using it: the new file is the sandbox's disk, and the old file is a layer that
//! belongs to no snapshot.
//!
//! Steps of a resume. After a failed step, all resources are freed and the sandbox is paused.
//!
//! | # | step                                        | failure               | next agent finds   |
//! |---|---------------------------------------------|-----------------------|--------------------|
//! | 0 | memory of the host reserved                 | host is full          | paused             |
//! | 1 | slot, network, cgroup, overlay, `spec.json` | none left, disk full  | paused: frees rest |
//! | 2 | the supervisor restores the VM              | bad file, VMM error   | paused: ends VM    |
//! | 3 | the guest recovers (`/snapshot/recover`)    | no answer             | paused: ends VM    |
//! | 4 | `snapshot.json` says running                | disk full             | running            |
//!
//! A cold boot is a resume that uses only the disk of the snapshot. In step 2 the VM boots. In step
//! 3 the guest agent starts and receives the settings of a new guest. The snapshot's memory is not
//! read, so a cold boot works if the memory is damaged or was saved by a VMM of another series. An
//! agent that starts warns of sandboxes that can only be booted. The sandbox
//! keeps its identity (ID, token, network). Its next snapshot has a memory chain of its own,
//! starting with a first generation.
//!
//! The snapshot that a sandbox was resumed from is kept until a newer one is complete. If the VM is
//! lost later, the sandbox is paused at that snapshot, with a warning. A sandbox that has no
//! snapshot when its VM is lost stays in state error.

use std::{path::Path, sync::Arc, time::Duration};

use thiserror_ext::AsReport as _;
use tokio::time::{Instant, timeout};
use wrenn_envd_client::Prepare;
use wrenn_proto::supervise::MachineStatus;
use wrenn_sys::failpoint;

use super::{
    PauseEffort, Reply, ResumeFrom, Running, State,
    actor::{SandboxActor, Step},
    error::{CreateError, LifecycleError},
    now_unix_ms,
    preparation::prepare,
    recovery::{recover, recover_later},
    state_machine::Event,
};
use crate::{
    admission::AdmissionError,
    disk_space::DiskReservation,
    sandbox_dir::{LastSnapshot, SandboxDir},
    snapshots::{SavedDisk, SnapshotError, SnapshotRef, StagedSnapshot},
    supervisor::Supervisor,
};

/// Maximum time for calls in progress to complete before the guest is paused.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Maximum time for a supervisor to report its status before a pause. A typical answer takes less
/// than a millisecond.
const STATUS_DEADLINE: Duration = Duration::from_secs(1);

/// Interval at which calls in progress are checked.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// Minimum of the time to pause vCPUs and devices and to write them and the memory.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(240);

/// Speed of a slow disk, in bytes per second. A snapshot may take the time in which it writes the
/// whole memory of the guest.
const SLOW_DISK: u64 = 10 << 20;

/// State of a paused VM that was written and is not yet published.
struct Captured {
    stage: StagedSnapshot,
    layers: Vec<std::path::PathBuf>,
    /// Version of the VMM that saved the state. `None` if the supervisor did not report it.
    vmm: Option<String>,
}

impl SandboxActor {
    /// Saves the VM and frees its resources. If a step fails, the sandbox keeps running, unless
    /// `effort` says otherwise.
    pub(super) async fn pause(
        &mut self,
        effort: PauseEffort,
        reply: Reply<(), LifecycleError>,
    ) -> Step {
        let State::Running(running) = self.sandbox.state() else {
            let _ = reply.send(Err(LifecycleError::NotNow("not running")));
            return Step::Watch;
        };
        let effort = self.effort_of(effort).await;
        let began = Instant::now();
        self.sandbox.apply(Event::PauseBegun);
        // From here on, no new tunnel is admitted. Existing tunnels are closed while the guest
        // still runs, because it would otherwise keep their connections forever.
        self.sandbox.tunnels.close_all();
        match self.drain_and_save(&running, effort).await {
            Ok(pin) => {
                self.pins.last = Some(pin);
                self.sandbox.set_warning(effort.warning());
                failpoint::hit("agent.pause.noted", None);
                let next = self.enter_paused(Event::PauseDone).await;
                failpoint::hit("agent.pause.freed", None);
                tracing::info!(ms = began.elapsed().as_millis(), "sandbox paused");
                let _ = reply.send(Ok(()));
                next
            }
            Err(error) => {
                tracing::warn!(
                    ?effort,
                    error = error.to_report_string(),
                    "failed to pause the sandbox"
                );
                let error = self.checked(error);
                let is_final = effort.ends_vm() && !error.is_out_of_space();
                let next = if is_final && !matches!(error, LifecycleError::Destroyed) {
                    let reason = format!("it could not be paused: {}", error.to_report_string());
                    self.on_vm_lost(reason).await
                } else {
                    self.roll_back(&error).await
                };
                let _ = reply.send(Err(error));
                next
            }
        }
    }

    /// Returns the error of a failed pause. A VMM that reports a full disk although there is space
    /// must not prolong its lifetime by that.
    fn checked(&self, error: LifecycleError) -> LifecycleError {
        match error {
            LifecycleError::Snapshot(error)
                if error.is_out_of_space() && !self.actors.host.disk_space.is_short() =>
            {
                LifecycleError::NoShortage(error.to_report_string())
            }
            error => error,
        }
    }

    /// Returns the effort of a pause. A guest whose vCPUs are paused for want of disk space cannot
    /// help, and its pause is what the reserve is kept for.
    async fn effort_of(&self, requested: PauseEffort) -> PauseEffort {
        let waits_for_disk = self
            .status()
            .await
            .is_some_and(|status| status.waits_for_disk);
        match requested {
            PauseEffort::WithGuest if waits_for_disk => PauseEffort::WithoutGuest,
            requested => requested,
        }
    }

    /// Returns the status of the VM, if its supervisor answers at once.
    pub(super) async fn status(&self) -> Option<MachineStatus> {
        let supervisor = self.resources.supervisor.as_ref()?;
        timeout(STATUS_DEADLINE, supervisor.status())
            .await
            .ok()?
            .ok()
    }

    /// Takes a snapshot of the running sandbox, which keeps running.
    pub(super) async fn snapshot(&mut self, reply: Reply<SnapshotRef, LifecycleError>) -> Step {
        let State::Running(running) = self.sandbox.state() else {
            let _ = reply.send(Err(LifecycleError::NotNow("not running")));
            return Step::Watch;
        };
        let _space = match self.reserve_space().await {
            Ok(space) => space,
            Err(error) => {
                let _ = reply.send(Err(LifecycleError::Space(error)));
                return Step::Watch;
            }
        };
        if self.is_too_deep_to_continue().await {
            return self.snapshot_and_shorten(reply).await;
        }
        match self.save_and_continue(&running).await {
            Ok(pin) => {
                self.sandbox.set_warning(String::new());
                self.pins.last = Some(pin.clone());
                self.answer_snapshot(pin, reply);
                Step::Watch
            }
            Err(error) => {
                tracing::warn!(
                    error = error.to_report_string(),
                    "failed to take a snapshot"
                );
                let next = self.roll_back(&error).await;
                let _ = reply.send(Err(error));
                next
            }
        }
    }

    /// Reserves disk space for a snapshot of the running sandbox: for its memory, and for copies of
    /// the layers that its VMM may write to. Memory that the guest has not used is not written.
    async fn reserve_space(&self) -> Result<DiskReservation, AdmissionError> {
        self.check_budget()?;
        let status = self.status().await;
        let resident = status.and_then(|status| resident_bytes(status.vmm_pid));
        let own = self.resources.sandbox_dir.as_ref();
        let open = own.and_then(|dir| dir.disks().ok()).unwrap_or_default();
        let memory_bytes = self.sandbox.facts.size.memory_bytes();
        let memory_bytes = memory_bytes.min(resident.unwrap_or(u64::MAX));
        let disk_space = &self.actors.host.disk_space;
        disk_space.reserve_snapshot(memory_bytes, &open)
    }

    /// Resumes the sandbox from its last snapshot. If a step fails, the previous state is kept:
    /// paused or lost.
    pub(super) async fn resume(&mut self, from: ResumeFrom) -> Step {
        // Begun now, because the compaction of a chain may take minutes.
        self.sandbox.apply(Event::ResumeBegun);
        // Resources that an earlier attempt failed to free are freed now. Otherwise this attempt
        // fails as well.
        if let Err(error) = self.free().await {
            let reason = CreateError::Ended(error.to_report_string());
            self.sandbox.apply(Event::ResumeFailed);
            self.answer_resumes(Err(LifecycleError::Restore(reason)));
            return Step::Wait;
        }
        self.shorten_if_needed().await;
        self.put_off_compaction();
        let Some(last) = self.pins.last.clone() else {
            self.sandbox.apply(Event::ResumeFailed);
            self.answer_resumes(Err(LifecycleError::NoSnapshot));
            return Step::Wait;
        };
        let (outcome, replies) = match self.reserve_memory() {
            Ok(()) => self.boot(async |boot| boot.resume(&last, from).await).await,
            Err(error) => (Err(error.into()), Vec::new()),
        };
        let noted = match outcome {
            Ok(running) => self.note_running(running, &last),
            Err(error) => Err(error),
        };
        match noted {
            _ if !replies.is_empty() => {
                self.answer_resumes(Err(LifecycleError::Gone));
                Step::Destroy(replies)
            }
            Ok(running) => {
                self.sandbox.touch();
                let warning = match self.lost.take() {
                    Some(reason) => {
                        format!("the VM was lost ({reason}); resumed from the last snapshot")
                    }
                    None => self.obstacle().await,
                };
                self.sandbox.set_warning(warning);
                self.resources.note_started();
                self.sandbox.apply(Event::ResumeDone(Arc::new(running)));
                self.answer_resumes(Ok(()));
                Step::Watch
            }
            Err(error) => {
                let error = LifecycleError::from_resume(error);
                tracing::warn!(
                    error = error.to_report_string(),
                    "failed to resume the sandbox"
                );
                // Resources that cannot be freed now are freed by the next attempt.
                let _ = self.free().await;
                self.pins.origin = None;
                self.sandbox.set_host_ip(None);
                self.sandbox.set_warning(error.to_report_string());
                self.sandbox.apply(Event::ResumeFailed);
                self.answer_resumes(Err(error));
                Step::Wait
            }
        }
    }

    /// Notes for the user that this host cannot load the memory of the last snapshot, if so.
    pub(super) fn warn_if_unloadable(&self) {
        let Some(last) = &self.pins.last else {
            return;
        };
        let located = self.actors.host.snapshots.locate(last);
        if let Err(SnapshotError::Incompatible(reason)) = located {
            let warning = LifecycleError::Unloadable(reason).to_report_string();
            self.sandbox.set_warning(warning);
        }
    }

    /// Reserves the memory of the VM that a resume starts.
    fn reserve_memory(&mut self) -> Result<(), AdmissionError> {
        let memory = match self.kept_memory.take() {
            Some(kept) => kept,
            None => {
                let size = self.sandbox.facts.size;
                self.actors.host.memory.reserve(size.memory_mib)?
            }
        };
        self.resources.memory = Some(memory);
        Ok(())
    }

    /// Records in the sandbox's directory, for the next agent, that the sandbox is paused. Returns
    /// false if the record cannot be written.
    pub(super) fn note_paused(&self, last: &SnapshotRef) -> bool {
        let Some(sandbox_dir) = &self.resources.sandbox_dir else {
            return false;
        };
        let noted = sandbox_dir.write_last(&LastSnapshot {
            build: last.build(),
            recorded_unix_ms: now_unix_ms(),
            running: false,
        });
        noted
            .inspect_err(|error| {
                tracing::warn!(
                    error = error.to_report_string(),
                    "failed to record the pause"
                )
            })
            .is_ok()
    }

    /// Enters the paused state, in which `event` results: frees all resources except files.
    pub(super) async fn enter_paused(&mut self, event: Event) -> Step {
        self.sandbox.apply(event);
        // The failure is logged where it happens. A resume or a destroy tries again.
        let _ = self.free().await;
        self.pins.origin = None;
        self.sandbox.set_host_ip(None);
        self.actors.collect_snapshots();
        self.begin_compaction();
        Step::Wait
    }

    /// Takes steps 1 to 5. After an error, either the VM runs or the supervisor is gone.
    async fn drain_and_save(
        &mut self,
        running: &Arc<Running>,
        effort: PauseEffort,
    ) -> Result<SnapshotRef, LifecycleError> {
        let drained = async {
            drain(running).await;
            Ok(())
        };
        self.sandbox.unless_destroyed(drained).await?;
        failpoint::hit("agent.pause.drained", None);
        let sandbox_dir = self.sandbox_dir()?;
        let captured = self.capture(running, None, effort).await?;
        let stored = self.store(captured, &sandbox_dir, false).await;
        match stored {
            Ok(pin) => Ok(pin),
            Err(error) => {
                self.abort_snapshot(running).await?;
                Err(error)
            }
        }
    }

    /// Takes steps 2 and 3, resumes the VM, and takes steps 4 and 5 while the VM runs.
    async fn save_and_continue(
        &mut self,
        running: &Running,
    ) -> Result<SnapshotRef, LifecycleError> {
        let sandbox_dir = self.sandbox_dir()?;
        let spec = sandbox_dir.read_spec()?;
        let next_disk = sandbox_dir.next_disk();
        wrenn_disk::create(&next_disk, spec.size.disk_mib, spec.uid).await?;
        let capture = self.capture(running, Some(&next_disk), PauseEffort::WithGuest);
        let captured = match capture.await {
            Ok(captured) => captured,
            Err(LifecycleError::Destroyed) => return Err(LifecycleError::Destroyed),
            Err(error) => {
                self.remove_unless_used(&next_disk).await;
                return Err(error);
            }
        };
        self.resume_vm(running).await?;
        let stored = self.store(captured, &sandbox_dir, true).await;
        let memory = self.actors.host.snapshots.memory_dir();
        let noted = self
            .supervisor()?
            .note_published(stored.is_ok(), &memory)
            .await;
        if let Err(error) = noted {
            // The next diff is larger then: the supervisor keeps the earlier parent.
            let error = error.to_report_string();
            tracing::warn!(error, "supervisor not notified of the stored snapshot");
        }
        stored
    }

    /// Removes a disk file that the VM never switched to. Keeps the file if that is not known.
    async fn remove_unless_used(&self, disk: &Path) {
        let Some(supervisor) = &self.resources.supervisor else {
            return;
        };
        let settled = async { supervisor.settled().await.map_err(LifecycleError::ResumeVm) };
        let status = self.sandbox.unless_destroyed(settled).await;
        if status.is_ok_and(|status| !status.disk.iter().any(|used| used == disk)) {
            // Best effort: the file is removed with the sandbox's directory.
            let _ = std::fs::remove_file(disk);
        }
    }

    /// Prepares the guest, pauses it, and has the supervisor write memory and devices. A VM that
    /// keeps running writes to `next_disk` from then on.
    async fn capture(
        &mut self,
        running: &Running,
        next_disk: Option<&Path>,
        effort: PauseEffort,
    ) -> Result<Captured, LifecycleError> {
        self.recovery = None;
        let stage = self.actors.host.snapshots.stage()?;
        let build = stage.build();
        if effort.needs_guest() {
            let snapshot = Prepare {
                snapshot_id: &build,
                keep_cache: self.actors.host.config.keep_page_cache,
                keeps_running: next_disk.is_some(),
            };
            self.prepare_guest(running, &snapshot).await?;
        }
        failpoint::hit("agent.snapshot.prepared", None);
        let supervisor = self.supervisor()?;
        let writing = self.sandbox.facts.size.memory_bytes() / SLOW_DISK;
        let deadline = SNAPSHOT_DEADLINE.max(Duration::from_secs(60 + writing));
        let snapshot = async {
            let taken = supervisor.snapshot(stage.path(), &build, next_disk, deadline);
            taken.await.map_err(LifecycleError::Snapshot)
        };
        let taken = self.sandbox.unless_destroyed(snapshot).await;
        match taken {
            Ok(machine) => Ok(Captured {
                stage,
                layers: machine.disk_layers,
                // A supervisor that is older than this agent may not report its VMM.
                vmm: Some(machine.vmm).filter(|vmm| !vmm.is_empty()),
            }),
            // The VM is about to be ended.
            Err(LifecycleError::Destroyed) => Err(LifecycleError::Destroyed),
            Err(error) => {
                // The VM may be paused all the same, if only the answer was lost.
                self.abort_snapshot(running).await?;
                Err(error)
            }
        }
    }

    /// Prepares the guest. If that fails, the guest is notified that it continues.
    async fn prepare_guest(
        &mut self,
        running: &Running,
        snapshot: &Prepare<'_>,
    ) -> Result<(), LifecycleError> {
        let prepared = prepare(&running.envd, snapshot);
        let prepared = self.sandbox.unless_destroyed(prepared).await;
        match &prepared {
            Ok(()) | Err(LifecycleError::Destroyed) => {}
            Err(LifecycleError::GuestSilent) => self.recovery = Some(recover_later(running)),
            Err(_) => self.recover_guest(running).await?,
        }
        prepared
    }

    /// Notifies the guest that it continues.
    async fn recover_guest(&mut self, running: &Running) -> Result<(), LifecycleError> {
        let recovered = async { Ok(recover(running).await) };
        self.recovery = Some(self.sandbox.unless_destroyed(recovered).await?);
        Ok(())
    }

    /// Completes and publishes the snapshot, and records it as the sandbox's last.
    async fn store(
        &self,
        captured: Captured,
        sandbox_dir: &SandboxDir,
        running: bool,
    ) -> Result<SnapshotRef, LifecycleError> {
        let Captured { stage, layers, vmm } = captured;
        let disk = SavedDisk {
            layers,
            is_open: running,
            last: self.pins.last.clone(),
        };
        failpoint::hit("agent.snapshot.captured", None);
        let (host, sandbox_dir) = (self.actors.host.clone(), sandbox_dir.clone());
        let stored = tokio::task::spawn_blocking(move || {
            let spec = sandbox_dir.read_spec()?;
            let pin = host.snapshots.publish(stage, &spec, &disk, vmm)?;
            failpoint::hit("agent.snapshot.published", None);
            sandbox_dir.write_last(&LastSnapshot {
                build: pin.build(),
                recorded_unix_ms: now_unix_ms(),
                running,
            })?;
            Ok(pin)
        });
        stored.await.unwrap_or(Err(LifecycleError::Gone))
    }

    /// Resumes a VM that an earlier agent left paused or in the middle of a snapshot. The files
    /// written so far are discarded.
    pub(super) async fn recover_interrupted(&mut self, running: Arc<Running>) -> Step {
        self.sandbox.apply(Event::FoundInterrupted(running.clone()));
        match self.abort_snapshot(&running).await {
            Ok(()) => {
                self.sandbox.apply(Event::RolledBack);
                Step::Watch
            }
            Err(LifecycleError::Destroyed) => self.await_destroy().await,
            Err(error) => self.on_vm_lost(error.to_report_string()).await,
        }
    }

    /// Discards the snapshot and resumes the VM. Waits first until the supervisor has finished
    /// writing.
    async fn abort_snapshot(&mut self, running: &Running) -> Result<(), LifecycleError> {
        let supervisor = self.supervisor()?;
        let settled = async { supervisor.settled().await.map_err(LifecycleError::ResumeVm) };
        self.sandbox.unless_destroyed(settled).await?;
        // If this message cannot be sent, the resume reports the failure.
        let _ = supervisor.note_published(false, Path::new("")).await;
        self.resume_vm(running).await
    }

    async fn resume_vm(&mut self, running: &Running) -> Result<(), LifecycleError> {
        let supervisor = self.supervisor()?;
        let resumed = async { supervisor.resume().await.map_err(LifecycleError::ResumeVm) };
        self.sandbox.unless_destroyed(resumed).await?;
        self.recover_guest(running).await
    }

    /// Handles a failed step: the sandbox either keeps running or is lost. A destroy that aborted
    /// the step frees everything.
    async fn roll_back(&mut self, error: &LifecycleError) -> Step {
        if matches!(error, LifecycleError::Destroyed) {
            return self.await_destroy().await;
        }
        let Some(supervisor) = self.resources.supervisor.clone() else {
            return self.on_machine_gone().await;
        };
        // A supervisor that is busy answers later. Only its end is the end of the VM.
        let settled = async { supervisor.settled().await.map_err(LifecycleError::ResumeVm) };
        let status = tokio::select! {
            () = supervisor.gone() => None,
            status = self.sandbox.unless_destroyed(settled) => Some(status),
        };
        match status {
            None => self.on_machine_gone().await,
            Some(Ok(status)) if !status.paused => {
                self.sandbox.set_warning(error.to_report_string());
                self.sandbox.apply(Event::RolledBack);
                Step::Watch
            }
            Some(Err(LifecycleError::Destroyed)) => self.await_destroy().await,
            Some(_) => self.on_vm_lost(error.to_report_string()).await,
        }
    }

    fn note_running(&self, running: Running, last: &SnapshotRef) -> Result<Running, CreateError> {
        let sandbox_dir = self.resources.sandbox_dir.as_ref();
        let sandbox_dir = sandbox_dir.ok_or(CreateError::Panicked)?;
        let noted = sandbox_dir.write_last(&LastSnapshot {
            build: last.build(),
            recorded_unix_ms: now_unix_ms(),
            running: true,
        });
        noted.map_err(CreateError::SandboxDir)?;
        failpoint::hit("agent.resume.noted", None);
        Ok(running)
    }

    fn supervisor(&self) -> Result<&Supervisor, LifecycleError> {
        self.resources
            .supervisor
            .as_deref()
            .ok_or(LifecycleError::Gone)
    }

    fn sandbox_dir(&self) -> Result<SandboxDir, LifecycleError> {
        self.resources
            .sandbox_dir
            .clone()
            .ok_or(LifecycleError::Gone)
    }
}

/// Returns the resident memory of a process, in bytes.
fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// Waits until no call uses the guest any more, or until the deadline.
async fn drain(running: &Arc<Running>) {
    // One reference is held by the state, one by the caller.
    const OWN: usize = 2;
    let drained = async {
        while Arc::strong_count(running) > OWN {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    };
    if timeout(DRAIN_DEADLINE, drained).await.is_err() {
        tracing::info!("drain deadline exceeded, cutting off calls in progress");
    }
}
