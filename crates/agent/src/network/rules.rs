//! Packet filters and address translation, by nftables.
//!
//! Two rule sets, each applied as one transaction by one `nft` process:
//! - in every sandbox's namespace, a table made with the namespace and gone with it;
//! - on the host, one table that is the same whatever runs, and a set of the links that may reach the world. Applying
//!   it again repairs it and harms nobody, so several agents need no agreement. It stays when the last sandbox is gone.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt as _, process::Command};
use wrenn_proto::limits::{GATEWAY_IP, GUEST_IP, METADATA_IP, TAP_NAME};

use super::{
    access::{self, Access},
    addresses::{Slot, UPLINK, VETH_PREFIX},
};

/// How long one `nft` process may take; it takes about 10 ms.
const DEADLINE: Duration = Duration::from_secs(15);

/// Why rules were not applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RulesError {
    /// `nft` could not be started or talked to.
    #[error("could not run nft (package nftables)")]
    Run(#[source] io::Error),
    /// `nft` refused.
    #[error("nft refused the rules: {0}")]
    Refused(String),
    /// `nft` hung.
    #[error("nft did not finish within {DEADLINE:?}")]
    Deadline,
}

/// Rules of a sandbox's namespace.
pub(super) fn namespace_rules(slot: Slot, access: &Access) -> String {
    let (host_ip, peer) = (slot.host_ip(), slot.link_peer());
    let rest = access_rules(access);
    format!(
        r#"table ip wrenn {{
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
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {GATEWAY_IP} udp dport 123 accept
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {METADATA_IP} tcp dport 80 accept
    }}
}}
{rest}"#
    )
}

/// What of them says where the guest's packets may go. Applied again it replaces what was, in one transaction; connections
/// that are open stay open. It finds no table, or that of an agent of another version, just as well.
pub(super) fn access_rules(access: &Access) -> String {
    let permitted = access.permitted();
    let elements: Vec<_> = permitted.iter().map(ToString::to_string).collect();
    let fill = match elements.is_empty() {
        true => String::new(),
        false => format!(
            "add element ip wrenn permitted {{ {} }}\n",
            elements.join(", ")
        ),
    };
    let forward = "add rule ip wrenn forward";
    format!(
        r#"add table ip wrenn
add set ip wrenn permitted {{ type ipv4_addr; flags interval; }}
flush set ip wrenn permitted
{fill}add chain ip wrenn forward {{ type filter hook forward priority filter; policy drop; }}
flush chain ip wrenn forward
{forward} ct state established,related accept
{forward} iifname "{UPLINK}" oifname "{TAP_NAME}" ct status dnat accept
{forward} iifname "{TAP_NAME}" oifname "{UPLINK}" ip saddr {GUEST_IP} ip daddr @permitted accept
"#
    )
}

/// What no sandbox may reach, as a set.
fn closed() -> String {
    let blocks = access::CLOSED.map(|block| block.to_string());
    format!("{{ {} }}", blocks.join(", "))
}

/// Rules of the host. `flush` and `add` in one transaction: what was there is replaced, and there is no moment without.
pub(super) fn host_rules() -> String {
    let veth = format!("\"{VETH_PREFIX}*\"");
    let closed = closed();
    format!(
        r#"add table inet wrenn {{ comment "Wrenn sandboxes, rules version 1"; }}
add set inet wrenn egress {{ type ifname . ipv4_addr; }}
add chain inet wrenn input {{ type filter hook input priority -10; policy accept; }}
add chain inet wrenn forward {{ type filter hook forward priority -10; policy accept; }}
add chain inet wrenn postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
flush chain inet wrenn input
flush chain inet wrenn forward
flush chain inet wrenn postrouting
add rule inet wrenn input iifname {veth} ct state established,related accept
add rule inet wrenn input iifname {veth} drop
add rule inet wrenn forward iifname {veth} oifname {veth} drop
add rule inet wrenn forward oifname {veth} ct state established,related accept
add rule inet wrenn forward oifname {veth} drop
add rule inet wrenn forward iifname {veth} ip daddr {closed} drop
add rule inet wrenn forward iifname {veth} ct state established accept
add rule inet wrenn forward iifname . ip saddr @egress accept
add rule inet wrenn forward iifname {veth} drop
add rule inet wrenn postrouting ip saddr 10.12.0.0/16 oifname != "lo" oifname != {veth} masquerade
"#
    )
}

/// Lets a sandbox's link reach the world.
pub(super) fn allow_egress(slot: Slot) -> String {
    let element = egress_element(slot);
    format!("add element inet wrenn egress {{ {element} }}\n")
}

/// Takes that back. Adding first makes it succeed when there is nothing to take back.
pub(super) fn forbid_egress(slot: Slot) -> String {
    let element = egress_element(slot);
    format!(
        "add table inet wrenn\nadd set inet wrenn egress {{ type ifname . ipv4_addr; }}\n\
         add element inet wrenn egress {{ {element} }}\ndelete element inet wrenn egress {{ {element} }}\n"
    )
}

fn egress_element(slot: Slot) -> String {
    format!("\"{}\" . {}", slot.veth(), slot.link_peer())
}

/// Applies rules in the network namespace of the calling thread.
pub(super) async fn apply(rules: &str) -> Result<(), RulesError> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(RulesError::Run)?;
    let mut stdin = child.stdin.take();
    let run = async {
        if let Some(mut stdin) = stdin.take() {
            stdin.write_all(rules.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(DEADLINE, run)
        .await
        .map_err(|_| RulesError::Deadline)?
        .map_err(RulesError::Run)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(RulesError::Refused(text.trim().chars().take(500).collect()))
}
