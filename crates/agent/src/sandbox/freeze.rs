//! Pausing, freezing and resuming.
//!
//! | # | step of a pause                            | failure                      | the sandbox afterwards             | agent killed after the step: the next one finds |
//! |---|--------------------------------------------|------------------------------|------------------------------------|--------------------------------------|
//! | 1 | new calls refused, those under way drained | (goes on after 2 s)          | -                                  | running                              |
//! | 2 | guest gets ready (`/snapshot/prepare`)     | guest refuses, or is silent  | recovered, runs on                 | running; recovers it                 |
//! | 3 | supervisor: vCPUs stop, devices and memory are written | disk full, VMM refuses, or it takes too long | the supervisor lets it go on; recovered | being written: waits for its end; frozen: thaws and recovers it |
//! | 4 | disk linked, manifest written, published   | disk full                    | thawed, recovered, runs on         | frozen: thaws and recovers it        |
//! | 5 | `snapshot.json` by rename                  | disk full                    | as 4; what was published is garbage| **paused**: frees what is left       |
//! | 6 | machine ended, network and cgroup freed    | a part stays                 | paused; freed again by resume or destroy | paused: frees what is left     |
//!
//! A frozen moment of a machine that goes on (named snapshot, fork): steps 2 and 3, then it is thawed and recovered at once, and
//! the moment is published beside it. The frozen file of its disk stays where it is, as a layer below the new one. If step 3 fails
//! after the machine was put on the new file, it goes on there: the new file is its disk, the old one a layer that no moment has.
//!
//! | # | step of a resume                           | failure                      | the sandbox afterwards             | agent killed after the step: the next one finds |
//! |---|--------------------------------------------|------------------------------|------------------------------------|--------------------------------------|
//! | 1 | slot, network, cgroup, overlay, `spec.json`| none left, disk full         | all freed, paused                  | paused: frees what is left           |
//! | 2 | supervisor restores the machine            | file damaged, VMM refuses    | all freed, paused                  | paused: ends it                      |
//! | 3 | guest recovers (`/snapshot/recover`)       | guest is silent              | all freed, paused                  | paused: ends it                      |
//! | 4 | `snapshot.json`: running                   | disk full                    | all freed, paused                  | running                              |
//!
//! A cold boot is a resume that takes the moment's disk alone: in step 2 the machine boots, in step 3 the guest agent starts and is
//! told what a new guest is told. Nothing of the memory is looked at, so it works where that is damaged, or of another VMM. The
//! sandbox stays who it is (id, token, network), its next moment has a memory of its own: a first generation.
//!
//! The moment that it was brought back from is kept until a newer one is complete: a machine that is lost later is paused there,
//! with a warning that tells so. A machine that was never frozen and is lost is in error for good.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::time::Instant;
use wrenn_sys::fault;

use super::{
    Reply, ResumeFrom, Running, State,
    error::{CreateError, FreezeError, chain},
    now_unix_ms,
    owner::{Next, Owner},
    recovery::recover,
};
use crate::{
    disk,
    folder::{Folder, LastMoment},
    snapshots::{PinnedBuild, Stage},
    supervisor::Supervisor,
};

/// How long calls that are under way may go on before the guest is frozen.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

/// Pause between two looks at them.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// How long vCPUs, devices and memory may take to be stopped and written: the guest's whole memory at the pace of a slow disk.
const FREEZE_DEADLINE: Duration = Duration::from_secs(240);

/// What is frozen and not yet let go on.
struct Frozen {
    stage: Stage,
    layers: Vec<std::path::PathBuf>,
    /// What saved it.
    vmm: Option<String>,
}

impl Owner {
    /// Saves the machine and gives back what it has. If a step fails, it runs on.
    pub(super) async fn pause(&mut self, reply: Reply<(), FreezeError>) -> Next {
        let State::Running(running) = self.sandbox.state() else {
            let _ = reply.send(Err(FreezeError::NotNow("not running")));
            return Next::Watch;
        };
        let began = Instant::now();
        self.sandbox.set_state(State::Pausing(running.clone()));
        // From here on no new one is let in. Their ends reach the guest while it still runs, or it would keep them for ever.
        running.tunnels.close_all();
        drain(&running).await;
        fault::point("agent.pause.drained", None);
        match self.save(&running).await {
            Ok(pin) => {
                self.pins.last = Some(pin);
                self.sandbox.set_warning(String::new());
                fault::point("agent.pause.noted", None);
                let next = self.rest().await;
                fault::point("agent.pause.freed", None);
                tracing::info!(ms = began.elapsed().as_millis(), "sandbox is paused");
                let _ = reply.send(Ok(()));
                next
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "sandbox was not paused");
                let next = self.run_on(running, &error).await;
                let _ = reply.send(Err(error));
                next
            }
        }
    }

    /// Freezes this moment; the machine goes on.
    pub(super) async fn freeze(&mut self, reply: Reply<PinnedBuild, FreezeError>) -> Next {
        let State::Running(running) = self.sandbox.state() else {
            let _ = reply.send(Err(FreezeError::NotNow("not running")));
            return Next::Watch;
        };
        if self.is_deep() {
            return self.freeze_and_shorten(reply).await;
        }
        match self.save_and_go_on(&running).await {
            Ok(pin) => {
                self.sandbox.set_warning(String::new());
                self.pins.last = Some(pin.clone());
                let _ = reply.send(Ok(pin));
                Next::Watch
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "moment was not frozen");
                let next = self.run_on(running, &error).await;
                let _ = reply.send(Err(error));
                next
            }
        }
    }

    /// Brings it back from its last moment. If a step fails, it is as it was: paused, or lost.
    pub(super) async fn resume(&mut self, from: ResumeFrom) -> Next {
        let before = self.sandbox.state();
        // From here on: to shorten a chain may take minutes.
        self.sandbox.set_state(State::Resuming);
        self.shorten_if_needed().await;
        self.put_off_compaction();
        let Some(last) = self.pins.last.clone() else {
            self.sandbox.set_state(before);
            self.answer_resumes(Err(FreezeError::NeverFrozen));
            return Next::Wait;
        };
        // What an earlier attempt could not free is freed now, or this one fails too.
        if let Err(error) = self.resources.free(&self.owners.host).await {
            let reason = CreateError::Ended(chain(&error));
            self.sandbox.set_state(before);
            self.answer_resumes(Err(FreezeError::Restore(reason)));
            return Next::Wait;
        }
        let (outcome, replies) = self.boot(async |boot| boot.resume(&last, from).await).await;
        let noted = match outcome {
            Ok(running) => self.note_running(running, &last),
            Err(error) => Err(error),
        };
        match noted {
            _ if !replies.is_empty() => {
                self.answer_resumes(Err(FreezeError::Gone));
                Next::Destroy(replies)
            }
            Ok(running) => {
                self.sandbox.touch();
                let lost = self.lost.take();
                self.sandbox.set_warning(lost.map_or_else(String::new, |reason| {
                    format!("its machine was lost ({reason}) and brought back from where it was last frozen")
                }));
                self.sandbox.set_state(State::Running(Arc::new(running)));
                self.answer_resumes(Ok(()));
                Next::Watch
            }
            Err(error) => {
                let error = FreezeError::Restore(error);
                tracing::warn!(error = chain(&error), "sandbox was not resumed");
                // What could not be freed is freed by the next attempt.
                let _ = self.resources.free(&self.owners.host).await;
                self.pins.origin = None;
                self.sandbox.set_host_ip(None);
                self.sandbox.set_warning(chain(&error));
                self.sandbox.set_state(before);
                self.answer_resumes(Err(error));
                Next::Wait
            }
        }
    }

    /// Notes in the folder that it is paused, for the next agent. False if that cannot be written.
    pub(super) fn note_paused(&self, last: &PinnedBuild) -> bool {
        let Some(folder) = &self.resources.folder else {
            return false;
        };
        let noted = folder.write_last(&LastMoment {
            build: last.build(),
            frozen_unix_ms: now_unix_ms(),
            running: false,
        });
        noted
            .inspect_err(|error| tracing::warn!(error = chain(error), "could not note the pause"))
            .is_ok()
    }

    /// It is files and nothing else from here on; all the rest is freed.
    pub(super) async fn rest(&mut self) -> Next {
        self.sandbox.set_state(State::Paused);
        // Logged where it fails, and tried again by a resume or a destroy.
        let _ = self.resources.free(&self.owners.host).await;
        self.pins.origin = None;
        self.sandbox.set_host_ip(None);
        self.owners.collect_snapshots();
        self.begin_compaction();
        Next::Wait
    }

    /// Steps 2 to 5. On an error the machine runs, or the supervisor is gone.
    async fn save(&mut self, running: &Running) -> Result<PinnedBuild, FreezeError> {
        let folder = self.folder()?;
        let frozen = self.take(running, None).await?;
        let stored = self.store(frozen, &folder, false).await;
        match stored {
            Ok(pin) => Ok(pin),
            Err(error) => {
                self.let_go(running).await?;
                Err(error)
            }
        }
    }

    /// Steps 2 and 3, thaw, then 4 and 5 beside the running machine.
    async fn save_and_go_on(&mut self, running: &Running) -> Result<PinnedBuild, FreezeError> {
        let folder = self.folder()?;
        let spec = folder.read_spec()?;
        let next_disk = folder.next_disk();
        disk::create_at(&next_disk, spec.disk_mib, spec.uid).await?;
        let frozen = match self.take(running, Some(&next_disk)).await {
            Ok(frozen) => frozen,
            Err(error) => {
                self.forget_unless_used(&next_disk).await;
                return Err(error);
            }
        };
        self.thaw(running).await?;
        let stored = self.store(frozen, &folder, true).await;
        let memory = self.owners.host.snapshots.memory_dir();
        self.supervisor()?
            .note_published(stored.is_ok(), &memory)
            .await
            .map_err(FreezeError::Freeze)?;
        stored
    }

    /// Removes a file that the machine did not come to write to. If that is not known, it stays.
    async fn forget_unless_used(&self, disk: &Path) {
        let Some(supervisor) = &self.resources.supervisor else {
            return;
        };
        let status = supervisor.settled().await;
        if status.is_ok_and(|status| !status.disk.iter().any(|used| used == disk)) {
            // It lies in the sandbox's folder, and goes with it.
            let _ = std::fs::remove_file(disk);
        }
    }

    /// Gets the guest ready, stops it, and has memory and devices written.
    async fn take(
        &mut self,
        running: &Running,
        next_disk: Option<&Path>,
    ) -> Result<Frozen, FreezeError> {
        self.recovery = None;
        let stage = self.owners.host.snapshots.stage()?;
        let build = stage.build();
        let keep_cache = self.owners.host.config.keep_page_cache;
        if let Err(error) = running.envd.prepare(&build, keep_cache).await {
            self.recovery = recover(running).await;
            return Err(FreezeError::Prepare(error));
        }
        fault::point("agent.freeze.prepared", None);
        let asked = self
            .supervisor()?
            .freeze(stage.path(), &build, next_disk, FREEZE_DEADLINE)
            .await;
        match asked {
            Ok(machine) => Ok(Frozen {
                stage,
                layers: machine.disk_layers,
                // A supervisor that was there before this agent may not tell.
                vmm: Some(machine.vmm).filter(|vmm| !vmm.is_empty()),
            }),
            Err(error) => {
                // It may be frozen all the same, if only the answer was lost.
                self.let_go(running).await?;
                Err(FreezeError::Freeze(error))
            }
        }
    }

    /// Makes the snapshot whole, puts it in its place, and notes it as the sandbox's last.
    async fn store(
        &self,
        frozen: Frozen,
        folder: &Folder,
        running: bool,
    ) -> Result<PinnedBuild, FreezeError> {
        let Frozen { stage, layers, vmm } = frozen;
        fault::point("agent.freeze.frozen", None);
        let (host, folder) = (self.owners.host.clone(), folder.clone());
        let stored = tokio::task::spawn_blocking(move || {
            let spec = folder.read_spec()?;
            let vmm = vmm.as_deref().unwrap_or(host.snapshots.vmm());
            let pin = host.snapshots.publish(stage, &spec, &layers, vmm)?;
            fault::point("agent.freeze.published", None);
            folder.write_last(&LastMoment {
                build: pin.build(),
                frozen_unix_ms: now_unix_ms(),
                running,
            })?;
            Ok(pin)
        });
        stored.await.unwrap_or(Err(FreezeError::Gone))
    }

    /// A machine that an agent left frozen, or in the middle of it, goes on, and what was written is forgotten.
    pub(super) async fn thaw_left(&mut self, running: Arc<Running>) -> Next {
        self.sandbox.set_state(State::Pausing(running.clone()));
        match self.let_go(&running).await {
            Ok(()) => {
                self.sandbox.set_state(State::Running(running));
                Next::Watch
            }
            Err(error) => self.lose(chain(&error)).await,
        }
    }

    /// What was written is forgotten, and the machine goes on; first comes the end of what is being written.
    async fn let_go(&mut self, running: &Running) -> Result<(), FreezeError> {
        let supervisor = self.supervisor()?;
        supervisor.settled().await.map_err(FreezeError::Thaw)?;
        // If it cannot be told, the thaw says so.
        let _ = supervisor.note_published(false, Path::new("")).await;
        self.thaw(running).await
    }

    async fn thaw(&mut self, running: &Running) -> Result<(), FreezeError> {
        let thawed = self.supervisor()?.thaw().await;
        thawed.map_err(FreezeError::Thaw)?;
        self.recovery = recover(running).await;
        Ok(())
    }

    /// After a step that failed: it runs as before, or it is lost.
    async fn run_on(&mut self, running: Arc<Running>, error: &FreezeError) -> Next {
        let alive = match &self.resources.supervisor {
            Some(supervisor) => supervisor.status().await.is_ok_and(|status| !status.frozen),
            None => false,
        };
        if alive {
            self.sandbox.set_warning(chain(error));
            self.sandbox.set_state(State::Running(running));
            return Next::Watch;
        }
        match &self.resources.supervisor {
            Some(supervisor) if supervisor.status().await.is_ok() => self.lose(chain(error)).await,
            _ => self.lose_machine().await,
        }
    }

    fn note_running(&self, running: Running, last: &PinnedBuild) -> Result<Running, CreateError> {
        let folder = self.resources.folder.as_ref();
        let folder = folder.ok_or(CreateError::Panicked)?;
        let noted = folder.write_last(&LastMoment {
            build: last.build(),
            frozen_unix_ms: now_unix_ms(),
            running: true,
        });
        noted.map_err(CreateError::Folder)?;
        fault::point("agent.resume.noted", None);
        Ok(running)
    }

    fn supervisor(&self) -> Result<&Supervisor, FreezeError> {
        self.resources.supervisor.as_ref().ok_or(FreezeError::Gone)
    }

    fn folder(&self) -> Result<Folder, FreezeError> {
        self.resources.folder.clone().ok_or(FreezeError::Gone)
    }
}

/// Waits until nobody uses the guest any more, or until that has taken long enough.
async fn drain(running: &Arc<Running>) {
    // The state holds one, the caller another.
    const OWN: usize = 2;
    let drained = async {
        while Arc::strong_count(running) > OWN {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    };
    if tokio::time::timeout(DRAIN_DEADLINE, drained).await.is_err() {
        tracing::info!("calls under way are cut off");
    }
}
