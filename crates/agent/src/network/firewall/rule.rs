//! Evaluation of one rule, in the form of `nft -j`, for one packet.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::Value;

/// Forwarded packet.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    /// Interface that the packet arrived on.
    pub(super) iif: String,
    /// Interface that the packet leaves through.
    pub(super) oif: String,
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    /// True if the packet belongs to a connection that is open.
    pub(super) is_reply: bool,
}

/// Result of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The rule does not match, or does not decide.
    None,
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

/// Evaluates a rule.
pub(super) fn verdict(statements: &[Value], packet: &Packet) -> Verdict {
    let mut is_known = true;
    for statement in statements {
        let Some((kind, body)) = statement
            .as_object()
            .and_then(|fields| fields.iter().next())
        else {
            return Verdict::None;
        };
        match kind.as_str() {
            "match" => match matches(body, packet) {
                Some(true) => {}
                Some(false) => return Verdict::None,
                None => is_known = false,
            },
            // Statements without influence on the path of the packet.
            "counter" | "log" | "comment" | "mangle" | "notrack" | "meter" => {}
            "vmap" => match of_map(body, packet) {
                Verdict::None => {}
                found => return if_known(is_known, packet, found),
            },
            _ => match decision(statement) {
                Verdict::None => is_known = false,
                found => return if_known(is_known, packet, found),
            },
        }
    }
    Verdict::None
}

/// Returns the verdict of a rule of which some matches may not be known.
fn if_known(is_known: bool, packet: &Packet, found: Verdict) -> Verdict {
    match found {
        _ if is_known => found,
        Verdict::Accept if packet.is_reply => found,
        _ => Verdict::None,
    }
}

/// Reads a verdict.
fn decision(statement: &Value) -> Verdict {
    let Some((kind, body)) = statement
        .as_object()
        .and_then(|fields| fields.iter().next())
    else {
        return Verdict::None;
    };
    let target = || body["target"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "accept" => Verdict::Accept,
        "drop" | "reject" => Verdict::Drop,
        "return" => Verdict::Return,
        "jump" => Verdict::Jump(target()),
        "goto" => Verdict::Goto(target()),
        _ => Verdict::None,
    }
}

/// Returns the verdict of a map in a rule. A named map is not known.
fn of_map(map: &Value, packet: &Packet) -> Verdict {
    let elements = map["data"]["set"].as_array().into_iter().flatten();
    for element in elements {
        if is_equal(&map["key"], &element[0], packet) == Some(true) {
            return decision(&element[1]);
        }
    }
    Verdict::None
}

/// Evaluates a match; `None` if this module does not understand it.
fn matches(body: &Value, packet: &Packet) -> Option<bool> {
    let equal = is_equal(&body["left"], &body["right"], packet)?;
    match body["op"].as_str()? {
        "==" | "in" => Some(equal),
        "!=" => Some(!equal),
        _ => None,
    }
}

fn is_equal(left: &Value, right: &Value, packet: &Packet) -> Option<bool> {
    if let Some(key) = left["meta"]["key"].as_str() {
        let name = match key {
            "iifname" | "iif" => &packet.iif,
            "oifname" | "oif" => &packet.oif,
            _ => return None,
        };
        return any(right, |wanted| Some(is_name(wanted.as_str()?, name)));
    }
    if left["ct"]["key"] == "state" {
        let state = if packet.is_reply {
            "established"
        } else {
            "new"
        };
        return any(right, |wanted| Some(wanted.as_str()? == state));
    }
    if left["payload"]["protocol"] != "ip" {
        return None;
    }
    let address = match left["payload"]["field"].as_str()? {
        "saddr" => packet.source,
        "daddr" => packet.destination,
        _ => return None,
    };
    any(right, |wanted| is_in(wanted, address))
}

/// True if one of the values on the right side of a match is fulfilled.
fn any(right: &Value, is_it: impl Fn(&Value) -> Option<bool>) -> Option<bool> {
    if right.as_str().is_some_and(|text| text.starts_with('@')) {
        return None;
    }
    let list = right.as_array().or_else(|| right["set"].as_array());
    let Some(list) = list else {
        return is_it(right);
    };
    let results: Vec<_> = list.iter().map(is_it).collect();
    if results.contains(&Some(true)) {
        return Some(true);
    }
    results
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .map(|_| false)
}

/// True if an interface has a name. `*` at the end stands for any characters.
fn is_name(wanted: &str, name: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == wanted,
    }
}

/// True if a block or a range of addresses contains an address.
fn is_in(wanted: &Value, address: Ipv4Addr) -> Option<bool> {
    if let Some(prefix) = wanted.get("prefix") {
        let base = prefix["addr"].as_str()?.parse().ok()?;
        let length = u8::try_from(prefix["len"].as_u64()?).ok()?;
        return Some(Ipv4Net::new(base, length).ok()?.contains(&address));
    }
    if let Some(range) = wanted.get("range") {
        let edge = |index: usize| range[index].as_str()?.parse::<Ipv4Addr>().ok();
        return Some((edge(0)?..=edge(1)?).contains(&address));
    }
    Some(wanted.as_str()?.parse::<Ipv4Addr>().ok()? == address)
}
