//! Network of the host, as far as sandboxes need it: the desired state of its rules and of its
//! forwarding, which is applied, checked and restored.
//!
//! The desired state follows from the settings, from the slots with egress, and from the host's
//! routes. [`HostNetwork::keep`] compares it with the kernel's every [`CHECK_INTERVAL`] and applies
//! it again if another program removed or changed a part, for example a firewall that was
//! restarted. Each restoration is logged and counted. An idle check costs a few system calls: the
//! rules are listed only if the generation of the packet filter changed.
//!
//! Never touches rules, routes or settings that are not its own. See [`super::rules`] for what it
//! owns in the packet filter, and [`super::forwarding`] for the rest.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use thiserror_ext::AsReport as _;
use tokio_util::sync::CancellationToken;

use super::{
    NetworkError,
    addresses::{Slot, Subnets},
    ceiling::{Ceiling, EgressCeiling},
    check::Listing,
    egress::Access,
    forwarding::Forwarding,
    generation, io_failed,
    nameservers::{GuestNameservers, Nameservers},
    netlink_failed, nft,
    obstacles::Obstacles,
    open_netlink,
    rules::{self, GuestAccess, HostState, TrafficLimits},
    subnets,
    surroundings::Surroundings,
};

/// Interval at which the host's rules and settings are checked.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Settings of the host's network.
#[derive(Debug, Clone, Default)]
pub(crate) struct NetworkSettings {
    pub(crate) ceiling: EgressCeiling,
    /// Subnets of the sandboxes; `None` to choose some that the host does not use.
    pub(crate) subnets: Option<Subnets>,
    /// Nameservers of the host.
    pub(crate) nameservers: Vec<IpAddr>,
    /// Limits of each sandbox's traffic.
    pub(crate) traffic: TrafficLimits,
}

/// Network of the host.
pub(crate) struct HostNetwork {
    /// Short name of the agent in rules and notes.
    agent: String,
    subnets: Subnets,
    ceiling: Ceiling,
    traffic: TrafficLimits,
    nameservers: Nameservers,
    forwarding: Forwarding,
    /// MTU of links to sandboxes.
    mtu: AtomicU32,
    /// Number of times that the state of the host was restored.
    restored: AtomicU64,
    held: tokio::sync::Mutex<Held>,
    obstacles: Obstacles,
}

/// Desired state of the host, and the state that was applied last.
#[derive(Debug, Default)]
struct Held {
    /// Slots of sandboxes with egress.
    egress: BTreeSet<Slot>,
    /// Slots whose link forwards: those with egress, and those that had it before and may have open
    /// connections.
    forwarding: BTreeSet<Slot>,
    /// Slots whose link was seen to forward, so that a link that does not is a deviation.
    seen: BTreeSet<Slot>,
    /// True once all sandboxes of an earlier agent are known. Until then, no interface is switched
    /// off, because one of them may need it.
    is_complete: bool,
    applied: Option<Applied>,
}

/// Rules that were applied last.
#[derive(Debug)]
struct Applied {
    rules: rules::HostRules,
    /// Table of the kernel after that.
    listing: Listing,
    /// Generation in which the table was found to be right; `None` if that is not known.
    generation: Option<u32>,
}

/// Occasion of a reconciliation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occasion {
    /// The agent starts. Sandboxes of an earlier agent are not known yet.
    Start,
    /// A sandbox's egress changes.
    Change,
    /// Periodic check.
    Check,
}

impl HostNetwork {
    /// Reads the host's routes, chooses the subnets, and applies the rules that hold for all
    /// sandboxes.
    pub(crate) async fn open(agent: &str, settings: NetworkSettings) -> Result<Self, NetworkError> {
        let surroundings = read_surroundings().await?;
        let subnets = subnets::choose(settings.subnets, &surroundings)?;
        let nameservers = Nameservers::of_host(&settings.nameservers, &surroundings);
        let network = Self {
            agent: agent.to_owned(),
            subnets,
            ceiling: Ceiling::new(settings.ceiling, subnets),
            traffic: settings.traffic,
            nameservers,
            forwarding: Forwarding::of(agent),
            mtu: AtomicU32::new(surroundings.mtu()),
            restored: AtomicU64::default(),
            held: tokio::sync::Mutex::default(),
            obstacles: Obstacles::default(),
        };
        tracing::info!(
            %subnets,
            nameservers = %network.nameservers,
            mtu = surroundings.mtu(),
            "host network ready"
        );
        let mut held = network.held.lock().await;
        network.reconcile(&mut held, Occasion::Start, None).await?;
        drop(held);
        Ok(network)
    }

    /// Returns a description of another firewall that blocks the traffic of a sandbox with this
    /// access, and the command that permits it.
    pub(crate) async fn obstacle(&self, access: &Access) -> Option<String> {
        if !self.reaches_anything(access) {
            return None;
        }
        let found = self.obstacles.find(self.subnets).await;
        found.map(|obstacle| obstacle.to_string())
    }

    pub(super) const fn subnets(&self) -> Subnets {
        self.subnets
    }

    /// Returns the most that any sandbox of this host may reach.
    pub(crate) const fn ceiling(&self) -> &Ceiling {
        &self.ceiling
    }

    /// Returns the MTU of links to sandboxes: that of the host's uplink, at most that of Ethernet.
    pub(super) fn mtu(&self) -> u32 {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Returns the number of times that rules or settings of the host were restored.
    pub(crate) fn restored(&self) -> u64 {
        self.restored.load(Ordering::Relaxed)
    }

    /// Returns the nameservers of a sandbox.
    pub(crate) fn nameservers(&self, access: &Access) -> GuestNameservers {
        self.nameservers.for_guest(access, &self.ceiling)
    }

    /// True if a sandbox may reach at least one address.
    pub(super) fn reaches_anything(&self, access: &Access) -> bool {
        !access.permitted(&self.ceiling).is_empty()
    }

    /// Returns the destinations of a sandbox, for the rules of its namespace.
    pub(super) fn guest_access(&self, access: &Access) -> GuestAccess {
        let names = self.nameservers(access);
        let direct = self.nameservers.direct(&self.ceiling);
        GuestAccess {
            permitted: access.permitted(&self.ceiling),
            nameservers: direct
                .into_iter()
                .filter(|address| names.guest.contains(address))
                .collect(),
            forwarder: !names.upstreams.is_empty(),
            traffic: self.traffic,
        }
    }

    /// Gives a sandbox's link egress, or revokes it. Open connections stay open. Succeeds if the
    /// link does not exist yet: it must then be made to forward when it is created.
    pub(super) async fn set_egress(&self, slot: Slot, on: bool) -> Result<(), NetworkError> {
        let mut held = self.held.lock().await;
        if !on {
            // An earlier agent may have given it egress.
            if Forwarding::is_link_on(slot) {
                held.forwarding.insert(slot);
            }
            return self.revoke(&mut held, slot).await;
        }
        let was = (held.egress.insert(slot), held.forwarding.insert(slot));
        if let Err(error) = self.reconcile(&mut held, Occasion::Change, None).await {
            if was.0 {
                held.egress.remove(&slot);
            }
            if was.1 {
                held.forwarding.remove(&slot);
            }
            return Err(error);
        }
        let switched = Forwarding::set_link(slot, true);
        switched
            .map(drop)
            .map_err(io_failed("set the forwarding of a link"))
    }

    /// Revokes the egress of a link that is about to be removed.
    pub(super) async fn release(&self, slot: Slot) -> Result<(), NetworkError> {
        let mut held = self.held.lock().await;
        let forwarded = held.forwarding.remove(&slot);
        held.seen.remove(&slot);
        self.revoke(&mut held, slot).await?;
        match forwarded {
            // An uplink may not be needed any more.
            true => self.reconcile(&mut held, Occasion::Change, None).await,
            false => Ok(()),
        }
    }

    async fn revoke(&self, held: &mut Held, slot: Slot) -> Result<(), NetworkError> {
        let had_egress = held.egress.remove(&slot);
        if !had_egress && held.is_complete {
            return Ok(());
        }
        let reconciled = self.reconcile(held, Occasion::Change, Some(slot)).await;
        if reconciled.is_err() && had_egress {
            // The next attempt must not assume that there is nothing to revoke.
            held.egress.insert(slot);
        }
        if held.egress.is_empty() {
            // The chain has no effect without links. It stays if a link of a sandbox that is not
            // adopted yet leads to it.
            let _ = nft::apply(&rules::remove_agent(&self.agent)).await;
        }
        reconciled
    }

    /// Checks and restores the host's rules and settings until `shutdown` is cancelled. Called once
    /// all sandboxes of an earlier agent are adopted.
    pub(crate) async fn keep(self: Arc<Self>, shutdown: CancellationToken) {
        let mut last_error = String::new();
        self.held.lock().await.is_complete = true;
        while shutdown
            .run_until_cancelled(tokio::time::sleep(CHECK_INTERVAL))
            .await
            .is_some()
        {
            let mut held = self.held.lock().await;
            let checked = self.reconcile(&mut held, Occasion::Check, None).await;
            let error = checked.err().map(|error| error.to_report_string());
            let error = error.unwrap_or_default();
            if !error.is_empty() && error != last_error {
                tracing::warn!(error, "failed to check the host's network rules");
            }
            last_error = error;
        }
    }

    /// Makes the host what it should be. With `revoked`, the link of that slot has no egress
    /// afterwards, whatever it had before.
    async fn reconcile(
        &self,
        held: &mut Held,
        occasion: Occasion,
        revoked: Option<Slot>,
    ) -> Result<(), NetworkError> {
        let surroundings = read_surroundings().await?;
        self.mtu.store(surroundings.mtu(), Ordering::Relaxed);
        let permitted = self.ceiling.permitted_beside(&surroundings.neighbours());
        let mut restored = Vec::new();
        if occasion != Occasion::Start {
            let mut uplinks = match held.forwarding.is_empty() {
                true => BTreeSet::new(),
                false => surroundings.uplinks(&permitted),
            };
            if !held.is_complete {
                uplinks.extend(self.noted_links()?);
            }
            restored = self.hold_forwarding(held, &uplinks, occasion)?;
        }
        let state = HostState {
            agent: &self.agent,
            permitted,
            nameservers: self.nameservers.direct(&self.ceiling),
            egress: held.egress.clone(),
            routed: self.noted_links()?,
        };
        let wanted = rules::host_rules(&state);
        let mut revoked: BTreeSet<Slot> = revoked.into_iter().collect();
        let is_applied = held
            .applied
            .as_ref()
            .is_some_and(|applied| applied.rules == wanted);
        if !is_applied || !revoked.is_empty() {
            self.apply(held, wanted, &revoked).await?;
        } else if let Some((generation, table)) = changed_table(held).await? {
            let known = held.applied.as_ref().map(|applied| &applied.listing);
            let deviations = known.map_or_else(Vec::new, |known| {
                table.deviations(known, &self.agent, &state.egress, &state.routed)
            });
            if self.noted_links()? != state.routed {
                // Another agent is changing its links right now. The next check sees the result.
                return Ok(());
            }
            let is_right = deviations.is_empty();
            if let Some(applied) = &mut held.applied {
                applied.generation = is_right.then_some(generation);
            }
            if !is_right {
                restored.extend(deviations);
                revoked.extend(table.stray_links(&self.agent, &state.egress));
                self.apply(held, wanted, &revoked).await?;
            }
        }
        self.report(&restored);
        Ok(())
    }

    fn noted_links(&self) -> Result<BTreeSet<String>, NetworkError> {
        let noted = self.forwarding.noted_links();
        noted.map_err(io_failed("read the notes about forwarding"))
    }

    /// Sets the forwarding of the uplinks and of the sandboxes' links. Returns what another program
    /// had switched off.
    fn hold_forwarding(
        &self,
        held: &mut Held,
        uplinks: &BTreeSet<String>,
        occasion: Occasion,
    ) -> Result<Vec<String>, NetworkError> {
        let failed = || io_failed("set the forwarding of an interface");
        let switched_off = self.forwarding.hold(uplinks).map_err(failed())?;
        let mut restored: Vec<String> = switched_off
            .iter()
            .map(|link| format!("forwarding of {link}"))
            .collect();
        if occasion == Occasion::Check {
            for slot in held.forwarding.clone() {
                let was_off = Forwarding::set_link(slot, true).map_err(failed())?;
                if was_off && held.seen.contains(&slot) {
                    restored.push(format!("forwarding of {}", slot.veth()));
                }
                held.seen.insert(slot);
            }
        }
        Ok(restored)
    }

    /// Applies the rules, and revokes the egress of the links in `revoked`.
    async fn apply(
        &self,
        held: &mut Held,
        wanted: rules::HostRules,
        revoked: &BTreeSet<Slot>,
    ) -> Result<(), NetworkError> {
        let revoke = revoked
            .iter()
            .map(|slot| rules::revoke_egress(&self.agent, *slot));
        let text = format!(
            "{}{}{}",
            wanted.chains,
            revoke.collect::<String>(),
            wanted.links
        );
        if let Err(error) = nft::apply(&text).await {
            // A link of another agent, whose data directory is gone, may have had the same name.
            let slots = || held.egress.iter().chain(revoked).copied();
            if !self.remove_foreign_links(slots().collect()).await? {
                return Err(error.into());
            }
            nft::apply(&text).await?;
        }
        let same_chains = held
            .applied
            .take()
            .filter(|applied| applied.rules.chains == wanted.chains);
        let listing = match same_chains {
            Some(applied) => applied.listing,
            None => listing().await?,
        };
        held.applied = Some(Applied {
            rules: wanted,
            listing,
            generation: None,
        });
        Ok(())
    }

    /// Removes links of these slots that lead to the chain of another agent. Returns false if there
    /// are none.
    async fn remove_foreign_links(&self, slots: BTreeSet<Slot>) -> Result<bool, NetworkError> {
        let foreign = listing().await?.foreign_links(&self.agent, &slots);
        for slot in &foreign {
            tracing::warn!(%slot, "removing the link of an agent that is gone");
            nft::apply(&rules::remove_link(*slot)).await?;
        }
        Ok(!foreign.is_empty())
    }

    fn report(&self, restored: &[String]) {
        if restored.is_empty() {
            return;
        }
        self.restored.fetch_add(1, Ordering::Relaxed);
        let what = restored.join(", ");
        tracing::warn!(
            what,
            "host network restored after a change by another program"
        );
    }
}

/// Reads routes and links of the host.
pub(super) async fn read_surroundings() -> Result<Surroundings, NetworkError> {
    let surroundings = open_netlink()?.surroundings().await;
    surroundings.map_err(netlink_failed("read the host's routes"))
}

/// Returns the host's table and its generation, if the packet filter changed since the table was
/// found to be right.
async fn changed_table(held: &Held) -> Result<Option<(u32, Listing)>, NetworkError> {
    // Read before the table: a change in between is then seen by the next check.
    let generation =
        generation::current().map_err(io_failed("read the generation of the packet filter"))?;
    let known = held.applied.as_ref().and_then(|applied| applied.generation);
    if known == Some(generation) {
        return Ok(None);
    }
    Ok(Some((generation, listing().await?)))
}

async fn listing() -> Result<Listing, NetworkError> {
    let table = nft::host_table().await?;
    Ok(table
        .map(|table| Listing::parse(&table))
        .unwrap_or_default())
}
