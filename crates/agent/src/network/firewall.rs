//! Other firewalls of the host that block forwarded packets.
//!
//! A packet is forwarded only if every filter of the host accepts it. Docker sets the policy of
//! iptables' chain FORWARD to DROP, and ufw and firewalld reject what no rule of theirs permits. The
//! agent never changes rules of others: it reports what blocks its sandboxes, and the command with
//! which the operator permits them.
//!
//! The rules are evaluated for two packets: the first packet of a connection that a sandbox opens,
//! and a reply. Matches that this module does not understand count as not fulfilled for the first
//! packet. For the reply, they count as fulfilled if the rule accepts, because firewalls recognize
//! replies in many ways.

mod legacy;
mod rule;

use std::{io, net::Ipv4Addr, process::Command};

use ipnet::Ipv4Net;
use serde_json::Value;

use super::addresses::VETH_PREFIX;
use rule::{Packet, Verdict, verdict};

/// Number of chains that a packet may enter one from another.
const MAX_DEPTH: u32 = 16;

/// File that names the tables of iptables' old implementation, which `nft` does not list.
const LEGACY_TABLES: &str = "/proc/net/ip_tables_names";

/// Firewall that blocks the traffic of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Chain that drops the packets, and the program that it belongs to.
    pub what: String,
    /// Command that permits the packets.
    pub fix: String,
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} blocks the sandboxes' traffic; to permit it: {}",
            self.what, self.fix
        )
    }
}

/// Traffic of sandboxes.
#[derive(Debug, Clone)]
pub(super) struct Traffic {
    /// Subnet of the sandboxes' links, from which packets come.
    pub(super) links: Ipv4Net,
    /// Link with the default route.
    pub(super) uplink: String,
}

/// Chain of a packet filter.
#[derive(Debug, Clone, Default)]
struct Chain {
    family: String,
    table: String,
    name: String,
    /// True for a base chain that sees forwarded packets.
    forwards: bool,
    policy_drops: bool,
    /// Statements of each rule, as `nft -j` prints them.
    rules: Vec<Vec<Value>>,
}

/// Returns the first firewall of this host that blocks `traffic`. Runs programs, and blocks.
pub(super) fn find(traffic: &Traffic) -> io::Result<Option<Obstacle>> {
    let listed = output("nft", &["-j", "list", "ruleset"])?;
    let mut chains = parse(&serde_json::from_slice(&listed).map_err(io::Error::other)?);
    if has_legacy_rules() {
        let listed = output("iptables-legacy", &["-S"])?;
        chains.extend(legacy::parse(&String::from_utf8_lossy(&listed)));
    }
    Ok(obstacle(&chains, traffic))
}

/// True if the host has a filter of iptables' old implementation.
pub(super) fn has_legacy_rules() -> bool {
    let tables = std::fs::read_to_string(LEGACY_TABLES).unwrap_or_default();
    tables.lines().any(|table| table == "filter")
}

fn output(program: &str, args: &[&str]) -> io::Result<Vec<u8>> {
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "`{program}` failed: {}",
        text.trim()
    )))
}

/// Reads the output of `nft -j list ruleset`, without the agents' own table.
fn parse(ruleset: &Value) -> Vec<Chain> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut chains: Vec<Chain> = Vec::new();
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = object.get("chain") {
            chains.push(Chain {
                family: text(&chain["family"]),
                table: text(&chain["table"]),
                name: text(&chain["name"]),
                forwards: chain["hook"] == "forward" && chain["type"] == "filter",
                policy_drops: chain["policy"] == "drop",
                rules: Vec::new(),
            });
        } else if let Some(rule) = object.get("rule") {
            let is_it = |chain: &&mut Chain| {
                rule["family"] == *chain.family
                    && rule["table"] == *chain.table
                    && rule["chain"] == *chain.name
            };
            if let Some(chain) = chains.iter_mut().find(is_it) {
                let statements = rule["expr"].as_array().cloned();
                chain.rules.push(statements.unwrap_or_default());
            }
        }
    }
    let is_own = |chain: &Chain| chain.family == "inet" && chain.table == "wrenn";
    chains.retain(|chain| ["ip", "inet"].contains(&&*chain.family) && !is_own(chain));
    chains
}

/// Returns the first of the chains that drops a packet of `traffic`.
fn obstacle(chains: &[Chain], traffic: &Traffic) -> Option<Obstacle> {
    let sandbox = Ipv4Addr::from_bits(traffic.links.network().to_bits() + 3);
    // An address of a public nameserver. Nothing is sent to it.
    let outside = Ipv4Addr::new(1, 1, 1, 1);
    let request = Packet {
        iif: format!("{VETH_PREFIX}1"),
        oif: traffic.uplink.clone(),
        source: sandbox,
        destination: outside,
        is_reply: false,
    };
    let reply = Packet {
        iif: request.oif.clone(),
        oif: request.iif.clone(),
        source: outside,
        destination: sandbox,
        is_reply: true,
    };
    let base = chains.iter().filter(|chain| chain.forwards);
    let mut base = base.filter(|chain| {
        [&request, &reply]
            .into_iter()
            .any(|packet| drops(chains, chain, packet))
    });
    base.next().map(|chain| describe(chains, chain, traffic))
}

/// True if a base chain drops a packet.
fn drops(chains: &[Chain], base: &Chain, packet: &Packet) -> bool {
    match pass(chains, base, packet, MAX_DEPTH) {
        Some(accepted) => !accepted,
        None => base.policy_drops,
    }
}

/// Returns whether a chain accepts a packet; `None` if the packet returns from the chain.
fn pass(chains: &[Chain], chain: &Chain, packet: &Packet, depth: u32) -> Option<bool> {
    for statements in &chain.rules {
        let (target, returns) = match verdict(statements, packet) {
            Verdict::None => continue,
            Verdict::Accept => return Some(true),
            Verdict::Drop => return Some(false),
            Verdict::Return => return None,
            Verdict::Jump(target) => (target, true),
            Verdict::Goto(target) => (target, false),
        };
        let same_table = |other: &&Chain| {
            (&other.family, &other.table, &other.name) == (&chain.family, &chain.table, &target)
        };
        let found = chains.iter().find(same_table).filter(|_| depth > 0);
        let passed = found.and_then(|target| pass(chains, target, packet, depth - 1));
        if passed.is_some() || !returns {
            return passed;
        }
    }
    None
}

/// Names the program that a chain belongs to, and its command that permits the traffic.
fn describe(chains: &[Chain], chain: &Chain, traffic: &Traffic) -> Obstacle {
    let Chain {
        family,
        table,
        name,
        ..
    } = chain;
    let beside = |prefix: &str| {
        let is_it = |other: &Chain| {
            (&other.family, &other.table) == (family, table) && other.name.starts_with(prefix)
        };
        chains.iter().any(is_it)
    };
    let links = traffic.links;
    let accept = |tool: &str, chain: &str| {
        format!(
            "{tool} -I {chain} -i {VETH_PREFIX}+ -j ACCEPT && {tool} -I {chain} -o {VETH_PREFIX}+ -j ACCEPT"
        )
    };
    let is_legacy = family == legacy::FAMILY;
    let tool = if is_legacy {
        "iptables-legacy"
    } else {
        "iptables"
    };
    let (program, fix) = if beside("ufw-") {
        let fix = format!("ufw route allow from {links}");
        ("ufw", fix)
    } else if beside("DOCKER-USER") {
        ("Docker", accept(tool, "DOCKER-USER"))
    } else if table == "firewalld" {
        let fix = format!(
            "firewall-cmd --permanent --zone=trusted --add-source={links} && firewall-cmd --reload"
        );
        ("firewalld", fix)
    } else if name == "FORWARD" && table == "filter" {
        (tool, accept(tool, "FORWARD"))
    } else {
        let insert = |link: &str| {
            format!("nft insert rule {family} {table} {name} {link} '\"{VETH_PREFIX}*\"' accept")
        };
        (
            "nftables",
            format!("{} && {}", insert("iifname"), insert("oifname")),
        )
    };
    Obstacle {
        what: format!("{program} (chain {name} of table {table})"),
        fix,
    }
}

#[cfg(test)]
mod tests;
