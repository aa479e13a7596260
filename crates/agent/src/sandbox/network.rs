//! Changing what a sandbox may reach while it is there.
//!
//! | # | step                                       | failure             | the sandbox afterwards        | agent killed after the step: the next one finds |
//! |---|--------------------------------------------|---------------------|-------------------------------|-------------------------------------------------|
//! | 1 | `spec.json` with the new lists, by rename  | disk full           | as it was                     | the new lists, and sets the rules by them       |
//! | 2 | rules of host and namespace (one that runs)| kernel or nft refuses | back to the old lists and rules | the new lists, and sets the rules by them   |
//!
//! A paused sandbox has no rules: they are made from the lists at its resume. Nameservers are told to a guest when it starts or is
//! brought back; one that runs keeps those that it has until then.

use super::{
    State,
    error::{FreezeError, chain},
    owner::Owner,
};
use crate::{
    folder::{Folder, FolderError},
    network::{self, access::Access},
};

impl Owner {
    /// Changes what it may reach: at once if it runs, else from its resume on. If that fails it is as it was.
    pub(super) async fn set_access(&mut self, access: Access) -> Result<(), FreezeError> {
        let folder = self.resources.folder.clone().ok_or(FreezeError::Gone)?;
        let before = self.sandbox.access();
        note(&folder, &access).await?;
        let runs = matches!(self.sandbox.state(), State::Running(_));
        if let Some(slot) = self.resources.slot.filter(|_| runs)
            && let Err(error) = network::update(slot, &access).await
        {
            tracing::warn!(error = chain(&error), "the network was not changed");
            // What cannot be undone either is told by the first failure; the next change, or the next agent, sets all of it.
            let _ = note(&folder, &before).await;
            let _ = network::update(slot, &before).await;
            return Err(FreezeError::Access(error));
        }
        self.sandbox.note_access(access);
        Ok(())
    }
}

/// Flushing to disk blocks, so it is done aside.
async fn note(folder: &Folder, access: &Access) -> Result<(), FreezeError> {
    let (folder, access) = (folder.clone(), access.clone());
    let noted = tokio::task::spawn_blocking(move || {
        let mut spec = folder.read_spec()?;
        (spec.network.allow, spec.network.deny) = access.lists();
        spec.network.egress = access.egress;
        folder.write_spec(&spec)
    });
    let noted: Result<(), FolderError> = noted.await.map_err(|_| FreezeError::Gone)?;
    Ok(noted?)
}
