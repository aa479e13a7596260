//! Allocation of network slots on this host.
//!
//! A slot is claimed by the file `/run/wrenn/slots/<number>`. The file appears together with its
//! content in one step (`link(2)`), so agents of several data directories can share a host. The
//! file is removed last when a network is removed, so anything left of a network still has a claim
//! that names its owner.
//!
//! Never touches a slot of another data directory.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wrenn_model::SandboxId;

use super::{addresses::Slot, namespace};

/// Directory of the slot claims of this host.
pub(crate) const SLOTS_DIR: &str = "/run/wrenn/slots";

/// Failure to allocate or release a slot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SlotError {
    /// All slots are claimed.
    #[error("all {} network slots of this host are in use", Slot::MAX)]
    Exhausted,
    /// A file operation failed.
    #[error("failed to {step} in {SLOTS_DIR}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Content of a slot file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// Data directory of the agent that claimed the slot.
    owner: PathBuf,
    /// Sandbox that uses the slot.
    sandbox: SandboxId,
}

/// Slots of this host, as seen by one agent.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    dir: PathBuf,
    owner: PathBuf,
}

impl Slots {
    /// Opens the slots of this host for the agent of the data directory `owner`.
    pub(crate) fn open(owner: &Path) -> Result<Self, SlotError> {
        Self::open_in(Path::new(SLOTS_DIR), owner)
    }

    fn open_in(dir: &Path, owner: &Path) -> Result<Self, SlotError> {
        fs::create_dir_all(dir).map_err(slot_failed("create the directory"))?;
        Ok(Self {
            dir: dir.to_owned(),
            owner: owner.to_owned(),
        })
    }

    /// Claims the lowest free slot for `sandbox`.
    pub(crate) fn claim(&self, sandbox: &SandboxId) -> Result<Slot, SlotError> {
        let claim = Claim {
            owner: self.owner.clone(),
            sandbox: sandbox.clone(),
        };
        let draft = self.draft_path();
        let text =
            serde_json::to_vec(&claim).map_err(|e| slot_failed("write a claim")(e.into()))?;
        fs::write(&draft, text).map_err(slot_failed("write a claim"))?;
        let slot = self.link_lowest(&draft);
        // A draft that remains is removed at the next start.
        let _ = fs::remove_file(&draft);
        slot
    }

    fn link_lowest(&self, draft: &Path) -> Result<Slot, SlotError> {
        let taken = self.taken()?;
        for slot in Slot::all().filter(|slot| !taken.contains(slot)) {
            match fs::hard_link(draft, self.path(slot)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(slot_failed("claim a slot")(error)),
            }
            if !namespace::exists(&slot.netns()) {
                return Ok(slot);
            }
            // The slot directory was emptied while a sandbox was running. Its namespace must not be
            // replaced.
            tracing::warn!(%slot, "slot skipped: its network namespace exists");
            fs::remove_file(self.path(slot)).map_err(slot_failed("release a slot"))?;
        }
        Err(SlotError::Exhausted)
    }

    /// Releases a slot. Does nothing if the slot is free or belongs to another agent.
    pub(crate) fn release(&self, slot: Slot) -> Result<(), SlotError> {
        if self
            .read(slot)
            .is_none_or(|claim| claim.owner != self.owner)
        {
            return Ok(());
        }
        match fs::remove_file(self.path(slot)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(slot_failed("release a slot")(error))
            }
            _ => Ok(()),
        }
    }

    /// Returns the slots claimed for this data directory, each with its sandbox.
    pub(crate) fn owned(&self) -> Result<Vec<(Slot, SandboxId)>, SlotError> {
        let mine = |slot| {
            let claim = self.read(slot)?;
            (claim.owner == self.owner).then_some((slot, claim.sandbox))
        };
        Ok(self.taken()?.into_iter().filter_map(mine).collect())
    }

    fn taken(&self) -> Result<BTreeSet<Slot>, SlotError> {
        let entries = fs::read_dir(&self.dir).map_err(slot_failed("list the slots"))?;
        let number = |entry: io::Result<fs::DirEntry>| {
            let name = entry.ok()?.file_name();
            Slot::new(name.to_str()?.parse().ok()?)
        };
        Ok(entries.filter_map(number).collect())
    }

    fn read(&self, slot: Slot) -> Option<Claim> {
        let text = fs::read(self.path(slot)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn path(&self, slot: Slot) -> PathBuf {
        self.dir.join(slot.to_string())
    }

    /// Path of a new draft claim, unique per process and per call. The sandbox ID is not part of
    /// the name, because two agents in one process may have sandboxes with the same ID.
    fn draft_path(&self) -> PathBuf {
        let (process, number) = (std::process::id(), rand::random::<u64>());
        self.dir.join(format!(".claim-{process}-{number:016x}"))
    }

    /// Removes draft claims of processes that no longer exist.
    pub(crate) fn remove_stale_drafts(&self) -> Result<(), SlotError> {
        for entry in fs::read_dir(&self.dir).map_err(slot_failed("list the slots"))? {
            let name = entry.map_err(slot_failed("list the slots"))?.file_name();
            let pid = name.to_str().and_then(|name| {
                let (pid, _) = name.strip_prefix(".claim-")?.split_once('-')?;
                pid.parse::<u32>().ok()
            });
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
        Ok(())
    }
}

fn slot_failed(step: &'static str) -> impl FnOnce(io::Error) -> SlotError {
    move |source| SlotError::Io { step, source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn id(text: &str) -> SandboxId {
        text.parse().unwrap()
    }

    #[test]
    fn the_lowest_free_slot_is_taken_and_a_released_one_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open_in(dir.path(), Path::new("/a")).unwrap();
        let first = slots.claim(&id("sb-1")).unwrap();
        let second = slots.claim(&id("sb-2")).unwrap();
        assert!(first < second);
        slots.release(first).unwrap();
        assert_eq!(slots.claim(&id("sb-3")).unwrap(), first);
    }

    #[test]
    fn the_slots_of_another_data_directory_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Slots::open_in(dir.path(), Path::new("/a")).unwrap();
        let theirs = Slots::open_in(dir.path(), Path::new("/b")).unwrap();
        let slot = theirs.claim(&id("sb-1")).unwrap();
        ours.release(slot).unwrap();
        assert_eq!(theirs.owned().unwrap(), vec![(slot, id("sb-1"))]);
        assert!(ours.owned().unwrap().is_empty());
        assert_ne!(ours.claim(&id("sb-2")).unwrap(), slot);
    }

    #[test]
    fn two_agents_that_claim_at_once_never_get_the_same_slot() {
        let dir = tempfile::tempdir().unwrap();
        let claim_20 = |owner: &'static str| {
            let slots = Slots::open_in(dir.path(), Path::new(owner)).unwrap();
            move || {
                let claim = |n| slots.claim(&id(&format!("sb-{}{n}", &owner[1..]))).unwrap();
                (0..20).map(claim).collect::<Vec<_>>()
            }
        };
        let all: Vec<Slot> = std::thread::scope(|scope| {
            let threads: Vec<_> = ["/a", "/b", "/c"]
                .map(|owner| scope.spawn(claim_20(owner)))
                .into();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap())
                .collect()
        });
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 60);
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 60, "a claim's draft was left");
    }

    #[test]
    fn when_all_are_taken_the_error_says_so() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let slots = Slots::open_in(dir.path(), Path::new("/a")).unwrap();
        for slot in Slot::all() {
            fs::write(slots.path(slot), "").unwrap();
        }
        let error = slots.claim(&id("sb-1")).unwrap_err();
        assert!(matches!(error, SlotError::Exhausted));
        assert!(error.to_string().contains("32767"), "{error}");
    }
}
