//! The network of a sandbox: a namespace with a constant inside and a unique outside.
//!
//! ```text
//!   host                                  namespace wrenn-ns-<i>                      guest
//!   wrenn-v<i> 10.12.0.0+2i/31 ───────── eth0 10.12.0.0+2i+1/31
//!   route 10.11.0.0+i/32 via the peer     DNAT 10.11.0.0+i ─► 169.254.0.21
//!   table `inet wrenn`                    SNAT 169.254.0.21 ─► 10.12.0.0+2i+1
//!                                         tap0 169.254.0.22/30 ─────────────────────── eth0 169.254.0.21/30
//! ```
//!
//! Owns: slots, namespaces, links, routes, filter rules. Never keeps the TAP device open: the supervisor does.
//! The host reaches every guest; a guest reaches the time and metadata services of its own gateway, and the world
//! if it may; never the host, never another sandbox. Both the namespace's rules and the host's see to that.
//!
//! [`create`] undoes what it did when it fails. [`remove`] may be called for any slot of ours at any time, and again:
//! everything is found by the slot's number. Work runs on threads of its own, since `unshare` acts on a thread.

pub(crate) mod access;
pub(crate) mod addresses;
mod link;
mod namespace;
pub(crate) mod rules;
pub(crate) mod slot;

use std::{fs, future::Future, io, path::Path, time::Duration};

use rtnetlink::LinkUnspec;
use wrenn_proto::{
    limits::{GATEWAY_IP, GATEWAY_MAC, GUEST_IP, GUEST_MAC, METADATA_IP, TAP_NAME},
    supervise::NetworkSpec,
};

use access::Access;
use addresses::{Slot, UPLINK};
use link::Netlink;
use rules::RulesError;

/// How long building or removing one network may take; it takes some 50 ms.
const DEADLINE: Duration = Duration::from_secs(30);

/// Packets that may wait for a slow guest.
const TX_QUEUE_LENGTH: u32 = 5000;

/// Why a network could not be made, checked or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum NetworkError {
    /// A system call failed.
    #[error("could not {step}")]
    Io {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel refused a change of a link, an address or a route.
    #[error("could not {step}")]
    Netlink {
        step: &'static str,
        #[source]
        source: rtnetlink::Error,
    },
    /// The packet filter was not set.
    #[error("could not set the packet filter")]
    Rules(#[from] RulesError),
    /// Something that should be there is not.
    #[error("its {0} is gone")]
    Missing(&'static str),
    /// It took too long.
    #[error("the network was not ready within {DEADLINE:?}")]
    Deadline,
}

/// Sets the host's own rules; called once when the agent starts.
pub(crate) async fn prepare_host() -> Result<(), NetworkError> {
    Ok(rules::apply(&rules::host_rules()).await?)
}

/// Builds the network of a slot. Nothing is left of it when this fails, nor when the caller goes away: the thread that does
/// it then finishes, and whoever has the slot removes it.
pub(crate) async fn create(slot: Slot, access: &Access) -> Result<NetworkSpec, NetworkError> {
    let wanted = access.clone();
    let built = on_own_thread(move || build(slot, wanted)).await;
    if let Err(error) = built {
        if let Err(remove_error) = remove(slot).await {
            tracing::warn!(%slot, error = ?remove_error, "a half-made network could not be removed");
        }
        return Err(error);
    }
    let (allow, deny) = access.lists();
    Ok(NetworkSpec {
        slot: slot.number(),
        netns: slot.netns(),
        host_ip: slot.host_ip(),
        egress: access.egress,
        allow,
        deny,
    })
}

/// Changes what the sandbox of a slot may reach. If this fails, some of its rules may be the old and some the new ones; doing it
/// again, or going back, sets all of them.
pub(crate) async fn update(slot: Slot, access: &Access) -> Result<(), NetworkError> {
    let access = access.clone();
    on_own_thread(move || set_access(slot, access)).await
}

/// Removes all of a slot's network but the slot itself. Fine if there is nothing, or only a part.
pub(crate) async fn remove(slot: Slot) -> Result<(), NetworkError> {
    on_own_thread(move || async move {
        // Each step is tried whatever became of the one before.
        let rules = rules::apply(&rules::forbid_egress(slot)).await;
        let link = async {
            let host = open_netlink()?;
            let removed = host.remove(&slot.veth()).await;
            removed.map_err(netlink_failed("remove the link to the host"))
        };
        let link = link.await;
        let namespace = namespace::remove(&slot.netns());
        rules?;
        link?;
        namespace.map_err(io_failed("remove the network namespace"))
    })
    .await
}

/// Checks that a slot's network is there, and renews what of it lives in tables shared with others, and what it may reach.
pub(crate) async fn verify(slot: Slot, access: &Access) -> Result<(), NetworkError> {
    let access = access.clone();
    on_own_thread(move || async move {
        if !namespace::exists(&slot.netns()) {
            return Err(NetworkError::Missing("network namespace"));
        }
        let host = open_netlink()?;
        let found = host.index(&slot.veth()).await;
        if found.map_err(netlink_failed("find the link"))?.is_none() {
            return Err(NetworkError::Missing("network link"));
        }
        set_access(slot, access).await
    })
    .await
}

/// On a thread of its own, which stays in the sandbox's namespace.
async fn set_access(slot: Slot, access: Access) -> Result<(), NetworkError> {
    if access.reaches_anything() {
        allow_egress(slot).await?;
    } else {
        rules::apply(&rules::forbid_egress(slot)).await?;
    }
    let namespace =
        fs::File::open(slot.netns()).map_err(io_failed("open the network namespace"))?;
    namespace::enter(&namespace).map_err(io_failed("enter the network namespace"))?;
    Ok(rules::apply(&rules::access_rules(&access)).await?)
}

async fn build(slot: Slot, access: Access) -> Result<(), NetworkError> {
    // Opened before the thread changes its namespace: they stay the host's.
    let host = open_netlink()?;
    let host_ns = namespace::current().map_err(io_failed("open the host's network namespace"))?;
    if access.reaches_anything() {
        allow_egress(slot).await?;
    }
    // A plain file of this name may be left from before a restart of the machine.
    if !namespace::exists(&slot.netns()) {
        namespace::remove(&slot.netns()).map_err(io_failed("clear the namespace's name"))?;
    }
    namespace::enter_new(&slot.netns()).map_err(io_failed("make a network namespace"))?;
    let inside = open_netlink()?;
    set_sysctl("net/ipv4/ip_forward", "1")?;
    set_sysctl_if_present("net/ipv6/conf/all/disable_ipv6", "1")?;
    set_sysctl_if_present("net/ipv6/conf/default/disable_ipv6", "1")?;
    // The filter stands before the first link does.
    rules::apply(&rules::namespace_rules(slot, &access)).await?;
    build_guest_side(&inside).await?;
    namespace::enter(&host_ns).map_err(io_failed("return to the host's network namespace"))?;
    build_host_side(slot, &host, &inside).await
}

/// The TAP device: the guest's link, with the constant gateway at its other end.
async fn build_guest_side(inside: &Netlink) -> Result<(), NetworkError> {
    let lo = require_index(inside, "lo").await?;
    let failed = netlink_failed("set the loopback link up");
    inside.set_up(lo).await.map_err(failed)?;
    wrenn_sys::tap::open(TAP_NAME)
        .and_then(|tap| wrenn_sys::tap::make_persistent(&tap))
        .map_err(io_failed("make the TAP device"))?;
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
        // The guest's address and hardware address are constant: asking for them would only delay the first packet,
        // by up to a second if the guest is not up when it is asked.
        inside
            .add_neighbour(tap, GUEST_IP, &parse_mac(GUEST_MAC))
            .await
    };
    configure
        .await
        .map_err(netlink_failed("configure the TAP device"))
}

/// The link between the namespace and the host.
async fn build_host_side(slot: Slot, host: &Netlink, inside: &Netlink) -> Result<(), NetworkError> {
    let netns = fs::File::open(slot.netns()).map_err(io_failed("open the network namespace"))?;
    let veth = slot.veth();
    let fd = std::os::fd::AsFd::as_fd(&netns);
    host.add_veth(&veth, UPLINK, fd)
        .await
        .map_err(netlink_failed("make the link to the host"))?;
    let peer = require_index(inside, UPLINK).await?;
    let host_end = require_index(host, &veth).await?;
    // The guest has no IPv6, so the link to it needs none; by itself it would take part in the host's.
    set_sysctl_if_present(&format!("net/ipv6/conf/{veth}/disable_ipv6"), "1")?;
    let configure = async {
        inside.add_address(peer, slot.link_peer(), 31).await?;
        inside.set_up(peer).await?;
        inside.add_route(peer, None, slot.link_host()).await?;
        host.add_address(host_end, slot.link_host(), 31).await?;
        host.set_up(host_end).await?;
        host.add_route(host_end, Some(slot.host_ip()), slot.link_peer())
            .await
    };
    configure
        .await
        .map_err(netlink_failed("configure the link to the host"))
}

/// Host rules and the sandbox's place in them, in one transaction, so that it cannot be let out without the rules.
async fn allow_egress(slot: Slot) -> Result<(), NetworkError> {
    let rules = rules::host_rules() + &rules::allow_egress(slot);
    rules::apply(&rules).await?;
    // Only who lets a sandbox out makes the host forward, and a host that does already is left as it is.
    let path = "/proc/sys/net/ipv4/ip_forward";
    let current = fs::read_to_string(path).map_err(io_failed("read ip_forward"))?;
    if current.trim() == "0" {
        tracing::info!("a sandbox may reach the world: setting net.ipv4.ip_forward=1");
        set_sysctl("net/ipv4/ip_forward", "1")?;
    }
    Ok(())
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
    fs::write(path, value).map_err(io_failed("set a kernel setting"))
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

/// Runs network work on a thread of its own, which may change its namespace, with a runtime of its own.
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
            // Nobody waits when the caller is gone.
            let _ = sender.send(run());
        })
        .map_err(io_failed("start a thread"))?;
    let lost = || NetworkError::Io {
        step: "finish the network's thread",
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
