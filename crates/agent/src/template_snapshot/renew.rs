//! Renewal of the template snapshots that this host can no longer load, because its VMM was
//! replaced.
//!
//! Until its snapshot is renewed, a template is booted by each create. Snapshots that can be loaded
//! are left alone: `wrenn image build` renews them. Templates without a snapshot stay without one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use thiserror_ext::AsReport as _;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wrenn_image::{ImageStore, StoreLock};
use wrenn_model::TemplateName;

use super::{TemplateSnapshotConfig, TemplateSnapshotError, make, step_failed};
use crate::{sandbox::resources::HostContext, snapshots::TemplateSnapshotState};

/// Interval at which the VMM is checked for a replacement.
const INTERVAL: Duration = Duration::from_secs(60);

/// Renews template snapshots until `shutdown` is cancelled. A failure is logged and not repeated
/// until the VMM is replaced again, or the agent restarted.
pub(crate) async fn run(host: Arc<HostContext>, shutdown: CancellationToken) {
    if !host.config.template_snapshots {
        return;
    }
    let mut failed: BTreeMap<TemplateName, String> = BTreeMap::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let Some((vmm, templates)) = unloadable(&host).await else {
            continue;
        };
        for template in templates {
            if failed.get(&template) == Some(&vmm) {
                continue;
            }
            match renew(&host, &template, &shutdown).await {
                Ok(true) => tracing::info!(%template, vmm, "template snapshot renewed"),
                // Another process holds the lock, and may be renewing it.
                Ok(false) => {}
                Err(TemplateSnapshotError::Stopped) => return,
                Err(error) => {
                    let error = error.to_report_string();
                    tracing::warn!(%template, vmm, error, "failed to renew the template snapshot");
                    failed.insert(template, vmm.clone());
                }
            }
        }
    }
}

/// Returns the version of the VMM, if it can be read, and the templates whose snapshot it cannot
/// load.
async fn unloadable(host: &Arc<HostContext>) -> Option<(String, Vec<TemplateName>)> {
    let host = host.clone();
    let look = move || {
        let vmm = host.snapshots.vmm()?;
        let templates = host.templates.templates().unwrap_or_default();
        let unloadable = templates.into_iter().filter(|template| {
            let state = host.snapshots.template_snapshot_state(template);
            state == TemplateSnapshotState::Unloadable
        });
        let names = unloadable.map(|template| template.name).collect();
        Some((vmm, names))
    };
    // A panic is logged where it happens. The next tick tries again.
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

/// Renews the snapshot of a template. Returns false if another process changes the images.
async fn renew(
    host: &HostContext,
    template: &TemplateName,
    shutdown: &CancellationToken,
) -> Result<bool, TemplateSnapshotError> {
    let Some(lock) = lock(host)? else {
        return Ok(false);
    };
    let config = TemplateSnapshotConfig {
        images_dir: host.config.images_dir.clone(),
        vmm: host.config.vmm.clone(),
        cpu: host.config.cpu.clone(),
        wrenn_exe: host.config.wrenn_exe.clone(),
        // Those that sandboxes depend on are not known here, so none is removed.
        in_use: None,
        stop: shutdown.child_token(),
    };
    let begins = || tracing::info!(%template, "renewing the template snapshot");
    make(config, &lock, template, begins).await
}

fn lock(host: &HostContext) -> Result<Option<StoreLock>, TemplateSnapshotError> {
    let store = ImageStore::open(&host.config.images_dir);
    let store = store.map_err(step_failed("open the image directory"))?;
    store
        .try_lock()
        .map_err(step_failed("lock the image directory"))
}
