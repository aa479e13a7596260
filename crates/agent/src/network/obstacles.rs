//! Search for other firewalls of the host that block the traffic of sandboxes.

use parking_lot::Mutex;
use thiserror_ext::AsReport as _;

use super::{
    NetworkError,
    addresses::Subnets,
    firewall::{self, Obstacle, Traffic},
    generation,
    host_network::read_surroundings,
    io_failed,
};

/// Firewalls that were found. The search is repeated only if the packet filter changed.
#[derive(Debug, Default)]
pub(super) struct Obstacles {
    /// Generation of the packet filter, and what was found in it.
    last: Mutex<Option<(u32, Option<Obstacle>)>>,
}

impl Obstacles {
    /// Returns the first firewall that blocks packets of sandboxes with links in `subnets`. A failed
    /// search finds nothing, and is logged.
    pub(super) async fn find(&self, subnets: Subnets) -> Option<Obstacle> {
        let generation = generation::current().ok();
        if let Some((then, found)) = &*self.last.lock()
            && Some(*then) == generation
        {
            return found.clone();
        }
        let found = search(subnets).await.unwrap_or_else(|error| {
            let error = error.to_report_string();
            tracing::warn!(error, "failed to examine the host's firewall");
            None
        });
        if let Some(Obstacle { what, fix }) = &found {
            tracing::warn!(what, fix, "firewall blocks sandboxes");
        }
        // Rules of iptables' old implementation do not change the generation.
        if !firewall::has_legacy_rules() {
            *self.last.lock() = generation.map(|generation| (generation, found.clone()));
        }
        found
    }
}

/// Searches for the first firewall that blocks packets of sandboxes with links in `subnets`.
pub(super) async fn search(subnets: Subnets) -> Result<Option<Obstacle>, NetworkError> {
    let surroundings = read_surroundings().await?;
    let [_, links] = subnets.blocks();
    let traffic = Traffic {
        links,
        uplink: surroundings.default_link().unwrap_or_default().to_owned(),
    };
    let found = tokio::task::spawn_blocking(move || firewall::find(&traffic)).await;
    found
        .unwrap_or_else(|lost| Err(std::io::Error::other(lost)))
        .map_err(io_failed("list the rules of the host's firewall"))
}
