//! Packet filter and address translation rules, applied with nftables.
//!
//! There are two rule sets. Each is applied as one transaction by one `nft` process:
//! - In every sandbox's namespace: one table, created and removed with the namespace.
//! - On the host: one table, the same for any set of sandboxes, and a set of the links with egress.
//!   Applying it again is harmless and repairs it, so several agents need no coordination. It stays
//!   when the last sandbox is gone.

use std::{io, process::Stdio, time::Duration};

use tokio::{io::AsyncWriteExt as _, process::Command};
use wrenn_proto::{
    guest::{GATEWAY_IP, IP as GUEST_IP, METADATA_IP, METADATA_PORT, TAP_NAME},
    ntp::PORT as NTP_PORT,
};

use super::{
    addresses::{Slot, UPLINK, VETH_PREFIX},
    egress::{self, Access},
};

/// Maximum run time of one `nft` process. A typical run takes about 10 ms.
const DEADLINE: Duration = Duration::from_secs(15);

/// Failure to apply rules.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RulesError {
    /// `nft` could not be started, or writing to it failed.
    #[error("failed to run `nft` (package nftables)")]
    Run(#[source] io::Error),
    /// `nft` rejected the rules.
    #[error("`nft` rejected the rules: {0}")]
    Refused(String),
    /// `nft` did not finish in time.
    #[error("`nft` timed out after {DEADLINE:?}")]
    Deadline,
}

/// Returns the rules of a sandbox's namespace.
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
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {GATEWAY_IP} udp dport {NTP_PORT} accept
        iifname "{TAP_NAME}" ip saddr {GUEST_IP} ip daddr {METADATA_IP} tcp dport {METADATA_PORT} accept
    }}
}}
{rest}"#
    )
}

/// Returns the part of the namespace rules that governs the guest's destinations.
///
/// Applying it replaces the previous rules in one transaction, and open connections stay open. It
/// also works if no table exists, or if the table was made by an agent of another version.
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

/// Returns the addresses that no sandbox may reach, as an nftables set.
fn closed() -> String {
    let blocks = egress::CLOSED.map(|block| block.to_string());
    format!("{{ {} }}", blocks.join(", "))
}

/// Returns the host-wide rules. `flush` and `add` are one transaction, so the previous rules are
/// replaced without a gap.
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

/// Returns the rules that give a sandbox's link egress.
pub(super) fn allow_egress(slot: Slot) -> String {
    let element = egress_element(slot);
    format!("add element inet wrenn egress {{ {element} }}\n")
}

/// Returns the rules that revoke egress. The element is added first, so that deleting it succeeds
/// even if it did not exist.
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
