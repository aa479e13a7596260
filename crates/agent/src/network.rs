//! Sandbox networks: one network namespace per sandbox, with constant addresses inside and unique
//! addresses outside.
//!
//! ```text
//!   host                                  namespace wrenn-ns-<i>            guest
//!   wrenn-v<i> 10.12.0.0+2i/31 ───────── eth0 10.12.0.0+2i+1/31
//!   route 10.11.0.0+i/32 via the peer     DNAT 10.11.0.0+i ─► 169.254.0.21
//!   table `inet wrenn`                    SNAT 169.254.0.21 ─► 10.12.0.0+2i+1
//!                                         tap0 169.254.0.22/30 ─── eth0 169.254.0.21/30
//! ```
//!
//! The addresses outside are examples: the subnets are a setting, and by default two that no route
//! of the host overlaps ([`subnets`]).
//!
//! Owns slots, namespaces, links, routes, forwarding and filter rules. Never keeps the TAP device
//! open; the supervisor does that.
//!
//! The host can reach every guest. A guest can reach the time and metadata services at its own
//! gateway and, if both its access rules and the operator's ceiling ([`ceiling`]) permit, external
//! networks and nameservers ([`nameservers`]). A guest can never reach the host or another sandbox.
//! The rules in the namespace and the rules on the host both enforce this.
//!
//! [`HostNetwork::create`] rolls back its own steps on failure. [`HostNetwork::remove`] is
//! idempotent and may be called at any time for any slot of this agent, because every resource is
//! found by the slot number. Work in namespaces runs on dedicated threads, because `unshare` acts
//! on the calling thread.

pub(crate) mod addresses;
pub(crate) mod ceiling;
mod check;
pub(crate) mod egress;
pub(crate) mod examine;
pub(crate) mod firewall;
mod forwarding;
mod generation;
mod host_network;
mod link;
mod nameservers;
mod namespace;
mod nft;
mod obstacles;
mod ranges;
mod rules;
pub(crate) mod slot;
mod subnets;
mod surroundings;

use std::{fs, future::Future, io, path::Path, time::Duration};

use rtnetlink::LinkUnspec;
use wrenn_proto::{
    guest::{GATEWAY_IP, GATEWAY_MAC, IP as GUEST_IP, MAC as GUEST_MAC, METADATA_IP, TAP_NAME},
    supervise::NetworkSpec,
};

use addresses::{Slot, Subnets, UPLINK};
use egress::Access;
use forwarding::Forwarding;
use link::Netlink;
use nft::RulesError;
use rules::GuestAccess;
use subnets::ChooseError;

pub(crate) use host_network::{HostNetwork, NetworkSettings};
pub(crate) use rules::TrafficLimits;

/// Maximum time to build or remove one network. A typical run takes about 50 ms.
const DEADLINE: Duration = Duration::from_secs(30);

/// Transmit queue length of the TAP device: packets that may wait for a slow guest.
const TX_QUEUE_LENGTH: u32 = 5000;

/// Failure to create, verify or remove a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NetworkError {
    /// A system call failed.
    #[error("failed to {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel rejected a change to a link, an address or a route.
    #[error("failed to {step}")]
    Netlink {
        step: &'static str,
        #[source]
        source: rtnetlink::Error,
    },
    /// The packet filter rules were not applied.
    #[error("failed to apply the packet filter rules")]
    Rules(#[from] RulesError),
    /// The sandboxes have no subnets.
    #[error(transparent)]
    Subnets(#[from] ChooseError),
    /// An expected part of the network does not exist.
    #[error("the sandbox's {0} is gone")]
    Missing(&'static str),
    /// The work exceeded its deadline.
    #[error("timed out after {DEADLINE:?}")]
    Deadline,
}

/// Network of a sandbox that is to be built.
#[derive(Debug, Clone)]
struct Blueprint {
    slot: Slot,
    subnets: Subnets,
    access: GuestAccess,
    /// MTU of the link to the host.
    mtu: u32,
    /// True if the host forwards packets from the link.
    forwards: bool,
}

impl HostNetwork {
    /// Builds the network of a slot.
    ///
    /// On failure, nothing is left behind. If the caller is cancelled, the worker thread still
    /// finishes, and the owner of the slot must call [`remove`](Self::remove).
    pub(crate) async fn create(
        &self,
        slot: Slot,
        access: &Access,
    ) -> Result<NetworkSpec, NetworkError> {
        let blueprint = Blueprint {
            slot,
            subnets: self.subnets(),
            access: self.guest_access(access),
            mtu: self.mtu(),
            forwards: self.reaches_anything(access),
        };
        let (mtu, forwards) = (blueprint.mtu, blueprint.forwards);
        let build = async {
            if forwards {
                self.set_egress(slot, true).await?;
            }
            on_own_thread(move || build(blueprint)).await
        };
        if let Err(error) = build.await {
            if let Err(remove_error) = self.remove(slot).await {
                tracing::warn!(%slot, error = ?remove_error, "failed to remove a partially built network");
            }
            return Err(error);
        }
        let (allow, deny) = access.lists();
        Ok(NetworkSpec {
            slot: slot.number(),
            netns: slot.netns(),
            host_ip: self.subnets().host_ip(slot),
            egress: access.egress,
            allow,
            deny,
            mtu,
        })
    }

    /// Updates the access rules of a slot's sandbox.
    ///
    /// On failure, old and new rules may be mixed. Calling this again, with either the new or the
    /// previous access, sets all of them.
    pub(crate) async fn update(&self, slot: Slot, access: &Access) -> Result<(), NetworkError> {
        self.set_egress(slot, self.reaches_anything(access)).await?;
        let access = self.guest_access(access);
        on_own_thread(move || async move {
            let namespace =
                fs::File::open(slot.netns()).map_err(io_failed("open the network namespace"))?;
            namespace::enter(&namespace).map_err(io_failed("enter the network namespace"))?;
            Ok(nft::apply(&rules::access_rules(&access)).await?)
        })
        .await
    }

    /// Removes the network of a slot, but not the slot itself. Succeeds if the network is missing
    /// or incomplete.
    pub(crate) async fn remove(&self, slot: Slot) -> Result<(), NetworkError> {
        // Every step runs, regardless of the result of the previous one.
        let rules = self.release(slot).await;
        let removed = on_own_thread(move || async move {
            let link = async {
                let host = open_netlink()?;
                let removed = host.remove(&slot.veth()).await;
                removed.map_err(netlink_failed("remove the link to the host"))
            };
            let link = link.await;
            let namespace = namespace::remove(&slot.netns());
            link?;
            namespace.map_err(io_failed("remove the network namespace"))
        });
        let removed = removed.await;
        rules.and(removed)
    }

    /// Checks that the network of a slot exists. Re-applies its access rules and its entries in
    /// tables shared with other sandboxes.
    pub(crate) async fn verify(&self, slot: Slot, access: &Access) -> Result<(), NetworkError> {
        on_own_thread(move || async move {
            if !namespace::exists(&slot.netns()) {
                return Err(NetworkError::Missing("network namespace"));
            }
            let host = open_netlink()?;
            let found = host.index(&slot.veth()).await;
            if found.map_err(netlink_failed("find the link"))?.is_none() {
                return Err(NetworkError::Missing("network link"));
            }
            Ok(())
        })
        .await?;
        self.update(slot, access).await
    }
}

async fn build(blueprint: Blueprint) -> Result<(), NetworkError> {
    let Blueprint {
        slot,
        subnets,
        access,
        ..
    } = &blueprint;
    // Opened before the thread switches namespaces, so both stay in the host's namespace.
    let host = open_netlink()?;
    let host_ns = namespace::current().map_err(io_failed("open the host's network namespace"))?;
    // A plain file with this name may remain from before a reboot of the host.
    if !namespace::exists(&slot.netns()) {
        namespace::remove(&slot.netns()).map_err(io_failed("remove the stale namespace file"))?;
    }
    namespace::enter_new(&slot.netns()).map_err(io_failed("create a network namespace"))?;
    let inside = open_netlink()?;
    // All interfaces of this namespace belong to the sandbox.
    set_sysctl("net/ipv4/ip_forward", "1")?;
    set_sysctl_if_present("net/ipv6/conf/all/disable_ipv6", "1")?;
    set_sysctl_if_present("net/ipv6/conf/default/disable_ipv6", "1")?;
    // The filter is applied before the first link exists.
    nft::apply(&rules::namespace_rules(*slot, *subnets, access)).await?;
    build_guest_side(&inside).await?;
    namespace::enter(&host_ns).map_err(io_failed("return to the host's network namespace"))?;
    build_host_side(&blueprint, &host, &inside).await
}

/// Creates the TAP device: the guest's link, with the constant gateway address at the host's end.
async fn build_guest_side(inside: &Netlink) -> Result<(), NetworkError> {
    let lo = require_index(inside, "lo").await?;
    let failed = netlink_failed("set the loopback link up");
    inside.set_up(lo).await.map_err(failed)?;
    wrenn_sys::tap::open(TAP_NAME)
        .and_then(|tap| wrenn_sys::tap::make_persistent(&tap))
        .map_err(io_failed("create the TAP device"))?;
    let tap = require_index(inside, TAP_NAME).await?;
    let message = LinkUnspec::new_with_index(tap)
        .address(GATEWAY_MAC.to_vec())
        .txqueuelen(TX_QUEUE_LENGTH)
        .up()
        .build();
    let configure = async {
        inside.set(message).await?;
        inside.add_address(tap, GATEWAY_IP, 30).await?;
        inside.add_address(tap, METADATA_IP, 32).await?;
        // The guest's IP and MAC addresses are constant. Resolving them with ARP would only delay
        // the first packet, by up to a second if the guest is not up yet when it is asked.
        inside
            .add_neighbour(tap, GUEST_IP, &parse_mac(GUEST_MAC))
            .await
    };
    configure
        .await
        .map_err(netlink_failed("configure the TAP device"))
}

/// Creates the link between the namespace and the host.
async fn build_host_side(
    blueprint: &Blueprint,
    host: &Netlink,
    inside: &Netlink,
) -> Result<(), NetworkError> {
    let (slot, subnets) = (blueprint.slot, blueprint.subnets);
    let netns = fs::File::open(slot.netns()).map_err(io_failed("open the network namespace"))?;
    let veth = slot.veth();
    let fd = std::os::fd::AsFd::as_fd(&netns);
    host.add_veth(&veth, UPLINK, fd, blueprint.mtu)
        .await
        .map_err(netlink_failed("create the link to the host"))?;
    let peer = require_index(inside, UPLINK).await?;
    let host_end = require_index(host, &veth).await?;
    // The guest has no IPv6, so this link needs none. By default it would take part in the host's
    // IPv6.
    set_sysctl_if_present(&format!("net/ipv6/conf/{veth}/disable_ipv6"), "1")?;
    Forwarding::set_link(slot, blueprint.forwards)
        .map_err(io_failed("set the forwarding of the link"))?;
    let configure = async {
        inside
            .add_address(peer, subnets.link_peer(slot), 31)
            .await?;
        inside.set_up(peer).await?;
        inside
            .add_route(peer, None, subnets.link_host(slot))
            .await?;
        host.add_address(host_end, subnets.link_host(slot), 31)
            .await?;
        host.set_up(host_end).await?;
        host.add_route(
            host_end,
            Some(subnets.host_ip(slot)),
            subnets.link_peer(slot),
        )
        .await
    };
    configure
        .await
        .map_err(netlink_failed("configure the link to the host"))
}

fn open_netlink() -> Result<Netlink, NetworkError> {
    Netlink::open().map_err(io_failed("open a netlink socket"))
}

async fn require_index(netlink: &Netlink, name: &str) -> Result<u32, NetworkError> {
    let found = netlink.index(name).await;
    found
        .map_err(netlink_failed("find a link"))?
        .ok_or(NetworkError::Missing("link"))
}

fn set_sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = Path::new("/proc/sys").join(key);
    fs::write(path, value).map_err(io_failed("write a sysctl"))
}

fn set_sysctl_if_present(key: &str, value: &str) -> Result<(), NetworkError> {
    if Path::new("/proc/sys").join(key).exists() {
        set_sysctl(key, value)?;
    }
    Ok(())
}

fn parse_mac(text: &str) -> Vec<u8> {
    let byte = |part| u8::from_str_radix(part, 16).ok();
    text.split(':').filter_map(byte).collect()
}

/// Runs network work on a dedicated thread with its own runtime. The thread may change its
/// namespace.
async fn on_own_thread<T, F>(work: impl FnOnce() -> F + Send + 'static) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io_failed("start a runtime"))?;
        let bounded = async { tokio::time::timeout(DEADLINE, work()).await };
        runtime
            .block_on(bounded)
            .unwrap_or(Err(NetworkError::Deadline))
    };
    std::thread::Builder::new()
        .name("network".to_owned())
        .spawn(move || {
            // Send fails only if the caller is gone.
            let _ = sender.send(run());
        })
        .map_err(io_failed("start a thread"))?;
    let lost = || NetworkError::Io {
        step: "finish the network thread",
        source: io::ErrorKind::Other.into(),
    };
    receiver.await.unwrap_or_else(|_| Err(lost()))
}

fn io_failed(step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Io { step, source }
}

fn netlink_failed(step: &'static str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { step, source }
}

#[cfg(test)]
mod tests;
