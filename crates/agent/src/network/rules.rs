//! Packet filter and address translation rules, as text for `nft`. Pure functions: the same state
//! always results in the same rules.
//!
//! There are two rule sets:
//! - In every sandbox's namespace: one table, created and removed with the namespace.
//! - On the host: one table for all agents. Its base chains are the same for any set of sandboxes
//!   and agents. Each agent with a sandbox that has egress has a chain of its own with its ceiling,
//!   and the map `links` sends packets from a sandbox's link to the chain of its agent. Applying
//!   the rules again is harmless and repairs them, so several agents need no coordination. The
//!   table stays when the last sandbox is gone.
//!
//! Chains of the host's table, in the order in which a packet from a sandbox passes them:
//!
//! | chain         | hook, priority                                   | drops                         |
//! |---------------|--------------------------------------------------|-------------------------------|
//! | `prerouting`  | prerouting, after connection tracking and before | addresses of the host, wrong  |
//! |               | any address translation                          | source addresses, IPv6        |
//! | `input`       | input                                            | what else reaches the host    |
//! | `forward`     | forward, before other filters                    | other sandboxes, sandboxes    |
//! |               |                                                  | without egress                |
//! | `agent_<id>`  | from `forward`                                   | what the ceiling closes       |
//! | `postrouting` | postrouting                                      | - (masquerades)               |
//!
//! `prerouting` is the reason why a port that Docker or another program publishes on the host is
//! out of reach: their translation of the host's address to that of a container would otherwise
//! turn a packet to the host into a forwarded one, which `input` never sees.
//!
//! Interfaces whose forwarding the agent switched on (`routed`, see [`super::forwarding`]) forward
//! to sandboxes only.

use std::{collections::BTreeSet, net::Ipv4Addr};

use wrenn_proto::{
    guest::{DNS_PORT, GATEWAY_IP, IP as GUEST_IP, METADATA_IP, METADATA_PORT, TAP_NAME},
    ntp::PORT as NTP_PORT,
};

use super::{
    addresses::{Slot, Subnets, UPLINK, VETH_PREFIX},
    ranges::{Range, elements, without},
};

/// Duration of the burst that passes a rate limit, in milliseconds.
const BURST_MS: u64 = 100;

/// Minimum burst, in KiB: several packets of the largest size, which interfaces put together.
const MIN_BURST_KIB: u64 = 512;

/// Chains of the host's table that all agents share.
pub(super) const BASE_CHAINS: [&str; 4] = ["prerouting", "input", "forward", "postrouting"];

/// Destinations of one sandbox: its lists, limited by the ceiling of its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct GuestAccess {
    /// Ranges that the guest may reach.
    pub(super) permitted: Vec<Range>,
    /// Nameservers to which the guest may send DNS requests, even if they are outside `permitted`.
    pub(super) nameservers: Vec<Ipv4Addr>,
    /// True if the guest may use the DNS forwarder at its gateway.
    pub(super) forwarder: bool,
    /// Limits of its traffic.
    pub(super) traffic: TrafficLimits,
}

/// Limits of a sandbox's traffic. 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct TrafficLimits {
    /// Bytes per second in each direction.
    pub(crate) bytes_per_sec: u64,
    /// Connections that the guest has open at the same time.
    pub(crate) connections: u32,
}

/// State of the host that its rules depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HostState<'a> {
    /// Short name of the agent.
    pub(super) agent: &'a str,
    /// Ranges that sandboxes of the agent may reach.
    pub(super) permitted: Vec<Range>,
    /// Nameservers of the host that sandboxes may use directly.
    pub(super) nameservers: Vec<Ipv4Addr>,
    /// Slots of the agent's sandboxes that have egress.
    pub(super) egress: BTreeSet<Slot>,
    /// Interfaces whose forwarding an agent has switched on.
    pub(super) routed: BTreeSet<String>,
}

/// Rules of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct HostRules {
    /// Chains and their rules.
    pub(super) chains: String,
    /// Links with egress.
    pub(super) links: String,
}

/// Returns the rules of a sandbox's namespace.
pub(super) fn namespace_rules(slot: Slot, subnets: Subnets, access: &GuestAccess) -> String {
    let (host_ip, peer) = (subnets.host_ip(slot), subnets.link_peer(slot));
    let rest = access_rules(access);
    format!(
        r#"table ip wrenn {{
    chain gateway {{
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{UPLINK}" ip daddr {host_ip} dnat to {GUEST_IP}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "{UPLINK}" ip saddr {GUEST_IP} snat to {peer}
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {GATEWAY_IP} udp dport {NTP_PORT} accept
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {METADATA_IP} tcp dport {METADATA_PORT} accept
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {GATEWAY_IP} jump gateway
    }}
}}
{rest}"#
    )
}

/// Returns the part of the namespace rules that governs the guest's destinations.
///
/// Applying it replaces the previous rules in one transaction, and open connections stay open. It
/// also works if no table exists, or if the table was made by an agent of another version.
pub(super) fn access_rules(access: &GuestAccess) -> String {
    let fill = match access.permitted.is_empty() {
        true => String::new(),
        false => format!(
            "add element ip wrenn permitted {{ {} }}\n",
            elements(&access.permitted)
        ),
    };
    let dns = format!("meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept");
    let forwarder = match access.forwarder {
        true => format!("add rule ip wrenn gateway {dns}\n"),
        false => String::new(),
    };
    let forward = "add rule ip wrenn forward";
    let limits = traffic_rules(access.traffic);
    let from_guest = format!(r#"iifname "{TAP_NAME}" oifname "{UPLINK}" ip saddr {GUEST_IP}"#);
    let nameservers = match access.nameservers.is_empty() {
        true => String::new(),
        false => format!(
            "{forward} {from_guest} ip daddr {{ {} }} {dns}\n",
            addresses(&access.nameservers)
        ),
    };
    format!(
        r#"add table ip wrenn
add set ip wrenn permitted {{ type ipv4_addr; flags interval; }}
flush set ip wrenn permitted
{fill}add chain ip wrenn gateway
flush chain ip wrenn gateway
{forwarder}add chain ip wrenn forward {{ type filter hook forward priority filter; policy drop; }}
flush chain ip wrenn forward
{limits}{forward} ct state established,related accept
{forward} iifname "{UPLINK}" oifname "{TAP_NAME}" ct status dnat accept
{nameservers}{forward} {from_guest} ip daddr @permitted accept
"#
    )
}

/// Returns the rules that limit a guest's traffic. They come before the rule that accepts packets
/// of open connections.
///
/// Packets above the rate are dropped; TCP then sends more slowly. A burst of [`BURST_MS`] passes, because the host's side of a link delivers data faster than any limit.
fn traffic_rules(traffic: TrafficLimits) -> String {
    let forward = "add rule ip wrenn forward";
    let mut rules = String::new();
    let kib_per_sec = traffic.bytes_per_sec / 1024;
    if kib_per_sec > 0 {
        let burst_kib = (kib_per_sec * BURST_MS / 1000).max(MIN_BURST_KIB);
        for direction in ["iifname", "oifname"] {
            rules += &format!(
                "{forward} {direction} \"{TAP_NAME}\" limit rate over {kib_per_sec} kbytes/second \
                 burst {burst_kib} kbytes drop\n"
            );
        }
    }
    if traffic.connections > 0 {
        let connections = traffic.connections;
        rules += &format!(
            "{forward} iifname \"{TAP_NAME}\" ct state new ct count over {connections} drop\n"
        );
    }
    rules
}

/// Returns the rules of the host. Both parts are applied as one transaction, so previous rules are
/// replaced without a gap, and a sandbox never has egress without the rules that limit it.
pub(super) fn host_rules(state: &HostState<'_>) -> HostRules {
    if state.egress.is_empty() {
        return HostRules {
            chains: base_rules(&state.routed),
            links: String::new(),
        };
    }
    let chain = agent_chain(state.agent);
    let to_chain = |slot: &Slot| format!("\"{}\" : goto {chain}", slot.veth());
    let links: Vec<_> = state.egress.iter().map(to_chain).collect();
    HostRules {
        chains: base_rules(&state.routed) + &agent_rules(state),
        links: format!("add element inet wrenn links {{ {} }}\n", links.join(", ")),
    }
}

/// Returns the part of the host's rules that all agents share.
fn base_rules(routed: &BTreeSet<String>) -> String {
    let veth = format!("\"{VETH_PREFIX}*\"");
    let routed = match routed.is_empty() {
        true => String::new(),
        false => {
            let names: Vec<_> = routed.iter().map(|name| format!("\"{name}\"")).collect();
            format!("add element inet wrenn routed {{ {} }}\n", names.join(", "))
        }
    };
    let chain = |name: &str| format!("add rule inet wrenn {name}");
    let (prerouting, input, forward) = (chain("prerouting"), chain("input"), chain("forward"));
    format!(
        r#"add table inet wrenn {{ comment "Wrenn sandboxes, rules version 2"; }}
add map inet wrenn links {{ type ifname : verdict; }}
add set inet wrenn routed {{ type ifname; }}
add chain inet wrenn prerouting {{ type filter hook prerouting priority -160; policy accept; }}
add chain inet wrenn input {{ type filter hook input priority -10; policy accept; }}
add chain inet wrenn forward {{ type filter hook forward priority -10; policy accept; }}
add chain inet wrenn postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
flush chain inet wrenn prerouting
flush chain inet wrenn input
flush chain inet wrenn forward
flush chain inet wrenn postrouting
add set inet wrenn egress {{ type ifname . ipv4_addr; }}
delete set inet wrenn egress
flush set inet wrenn routed
{routed}{prerouting} iifname != {veth} accept
{prerouting} meta nfproto != ipv4 drop
{prerouting} ct state established,related accept
{prerouting} fib saddr . iif oif missing drop
{prerouting} fib daddr type != unicast drop
{input} iifname {veth} ct state established,related accept
{input} iifname {veth} drop
{forward} iifname {veth} tcp flags syn tcp option maxseg size set rt mtu
{forward} oifname {veth} tcp flags syn tcp option maxseg size set rt mtu
{forward} iifname {veth} oifname {veth} drop
{forward} oifname {veth} ct state established,related accept
{forward} oifname {veth} drop
{forward} iifname @routed drop
{forward} iifname != {veth} accept
{forward} ct state established,related accept
{forward} iifname vmap @links
{forward} drop
add rule inet wrenn postrouting iifname {veth} oifname != "lo" oifname != {veth} masquerade
"#
    )
}

/// Returns the chain of one agent, with its ceiling. An agent without a sandbox that has egress has
/// no chain.
fn agent_rules(state: &HostState<'_>) -> String {
    let chain = agent_chain(state.agent);
    let nameservers = match state.nameservers.is_empty() {
        true => String::new(),
        false => format!(
            "add rule inet wrenn {chain} ip daddr {{ {} }} meta l4proto {{ tcp, udp }} th dport {DNS_PORT} accept\n",
            addresses(&state.nameservers)
        ),
    };
    let closed = without(&[Range::ALL], &state.permitted);
    let closed = match (state.permitted.is_empty(), closed.is_empty()) {
        (true, _) => format!("add rule inet wrenn {chain} drop\n"),
        (false, true) => String::new(),
        (false, false) => format!(
            "add rule inet wrenn {chain} ip daddr {{ {} }} drop\n",
            elements(&closed)
        ),
    };
    format!(
        "add chain inet wrenn {chain}\nflush chain inet wrenn {chain}\n{nameservers}{closed}\
         add rule inet wrenn {chain} accept\n"
    )
}

/// Returns the name of an agent's chain in the host's table.
pub(super) fn agent_chain(agent: &str) -> String {
    format!("agent_{agent}")
}

/// Returns the rules that revoke the egress of a sandbox. The element is added first, so that
/// deleting it succeeds even if it did not exist. Applied after the chains of [`host_rules`], which
/// create the map.
pub(super) fn revoke_egress(agent: &str, slot: Slot) -> String {
    let (veth, chain) = (slot.veth(), agent_chain(agent));
    format!(
        "add chain inet wrenn {chain}\n\
         add element inet wrenn links {{ \"{veth}\" : goto {chain} }}\n\
         delete element inet wrenn links {{ \"{veth}\" }}\n"
    )
}

/// Returns the rules that remove an element of the links, whatever chain it leads to. They fail if
/// there is no such element.
pub(super) fn remove_link(slot: Slot) -> String {
    format!(
        "delete element inet wrenn links {{ \"{}\" }}\n",
        slot.veth()
    )
}

/// Returns the rules that remove an agent's chain. They fail while a link leads to it.
pub(super) fn remove_agent(agent: &str) -> String {
    let chain = agent_chain(agent);
    format!(
        "add chain inet wrenn {chain}\nflush chain inet wrenn {chain}\n\
         delete chain inet wrenn {chain}\n"
    )
}

fn addresses(list: &[Ipv4Addr]) -> String {
    let texts: Vec<_> = list.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn slot(number: u16) -> Slot {
        Slot::new(number).unwrap()
    }

    fn all_but(first: u32, last: u32) -> Vec<Range> {
        without(&[Range::ALL], &[Range { first, last }])
    }

    #[test]
    fn the_same_state_has_the_same_rules_and_no_state_has_no_agent() {
        let idle = HostState {
            agent: "a1",
            ..HostState::default()
        };
        let rules = host_rules(&idle);
        assert_eq!(rules, host_rules(&idle.clone()));
        let HostRules { chains, links } = rules;
        assert!(
            !chains.contains("agent_a1") && !chains.contains("add element"),
            "{chains}"
        );
        assert_eq!(links, "");
    }

    #[test]
    fn what_is_addressed_to_the_host_is_dropped_before_address_translation() {
        let rules = host_rules(&HostState::default()).chains;
        // `dstnat` is -100, connection tracking is -200.
        assert!(rules.contains("hook prerouting priority -160;"), "{rules}");
        let drop = rules
            .find("prerouting fib daddr type != unicast drop")
            .unwrap();
        let replies = rules
            .find("prerouting ct state established,related accept")
            .unwrap();
        assert!(
            replies < drop,
            "replies to the agent are addressed to the host, too"
        );
    }

    #[test]
    fn an_agent_closes_everything_that_its_ceiling_does_not_permit() {
        let ten = u32::from_be_bytes([10, 0, 0, 0]);
        let state = HostState {
            agent: "a1",
            permitted: all_but(ten, ten + 0x00ff_ffff),
            nameservers: vec![[10, 0, 0, 53].into()],
            egress: [slot(2), slot(9)].into(),
            routed: ["eth7".to_owned()].into(),
        };
        let HostRules {
            chains: rules,
            links,
        } = host_rules(&state);
        let dns = rules
            .find("agent_a1 ip daddr { 10.0.0.53 } meta l4proto { tcp, udp } th dport 53 accept");
        let closed = rules.find("agent_a1 ip daddr { 10.0.0.0-10.255.255.255 } drop");
        let rest = rules.find("agent_a1 accept");
        assert!(dns.is_some() && dns < closed && closed < rest, "{rules}");
        assert!(
            links.contains(r#"{ "wrenn-v2" : goto agent_a1, "wrenn-v9" : goto agent_a1 }"#),
            "{links}"
        );
        assert!(rules.contains(r#"routed { "eth7" }"#), "{rules}");
    }

    #[test]
    fn without_a_permitted_range_an_agent_drops_everything_and_with_all_nothing() {
        let mut state = HostState {
            agent: "a1",
            egress: [slot(2)].into(),
            ..HostState::default()
        };
        assert!(agent_rules(&state).contains("agent_a1 drop"));
        state.permitted = vec![Range::ALL];
        assert!(!agent_rules(&state).contains("drop"));
    }

    #[test]
    fn limits_apply_to_packets_of_open_connections_too() {
        let access = GuestAccess {
            traffic: TrafficLimits {
                bytes_per_sec: 10 << 20,
                connections: 7,
            },
            ..GuestAccess::default()
        };
        let rules = access_rules(&access);
        let upload = rules
            .find(r#"iifname "tap0" limit rate over 10240 kbytes/second burst 1024 kbytes drop"#);
        let download = rules.find(r#"oifname "tap0" limit rate over 10240 kbytes/second"#);
        let count = rules.find(r#"iifname "tap0" ct state new ct count over 7 drop"#);
        let open = rules.find("ct state established,related accept");
        for limit in [upload, download, count] {
            assert!(limit.is_some() && limit < open, "{rules}");
        }
        let none = access_rules(&GuestAccess::default());
        assert!(
            !none.contains("limit") && !none.contains("ct count"),
            "{none}"
        );
    }

    #[test]
    fn a_guest_has_the_forwarder_and_nameservers_only_if_it_may() {
        let none = access_rules(&GuestAccess::default());
        assert!(!none.contains("53"), "{none}");
        assert!(!none.contains("add element"), "{none}");
        let access = GuestAccess {
            permitted: vec![Range::ALL],
            nameservers: vec![[192, 168, 1, 1].into()],
            forwarder: true,
            ..GuestAccess::default()
        };
        let rules = access_rules(&access);
        assert!(rules.contains("gateway meta l4proto { tcp, udp } th dport 53 accept"));
        assert!(
            rules.contains("ip daddr { 192.168.1.1 } meta l4proto"),
            "{rules}"
        );
    }
}
