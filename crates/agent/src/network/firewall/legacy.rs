//! Rules of iptables' old implementation, converted to the form of `nft -j`.

use serde_json::{Value, json};

use super::Chain;

/// Family of the chains, so that they are not mistaken for those of nftables.
pub(super) const FAMILY: &str = "iptables-legacy";

/// Reads the output of `iptables-legacy -S`. Options that have no counterpart become a match that
/// nobody understands.
pub(super) fn parse(rules: &str) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    for line in rules.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["-P", name, policy] => chains.push(Chain {
                forwards: *name == "FORWARD",
                policy_drops: *policy == "DROP",
                ..chain(name)
            }),
            ["-N", name] => chains.push(chain(name)),
            ["-A", name, rule @ ..] => {
                if let Some(chain) = chains.iter_mut().find(|chain| chain.name == *name) {
                    chain.rules.push(statements(rule));
                }
            }
            _ => {}
        }
    }
    chains
}

fn chain(name: &str) -> Chain {
    Chain {
        family: FAMILY.to_owned(),
        table: "filter".to_owned(),
        name: name.to_owned(),
        ..Chain::default()
    }
}

fn statements(rule: &[&str]) -> Vec<Value> {
    let mut found = Vec::new();
    let mut words = rule.iter().copied();
    let mut op = "==";
    while let Some(word) = words.next() {
        if word == "!" {
            op = "!=";
            continue;
        }
        let value = match word {
            "-i" | "-o" | "-s" | "-d" | "-j" | "-g" | "-m" => words.next().unwrap_or_default(),
            _ => "",
        };
        let is = |left: Value, right: Value| json!({ "match": { "op": op, "left": left, "right": right } });
        let payload = |field: &str| json!({ "payload": { "protocol": "ip", "field": field } });
        let name = || value.replace('+', "*").into();
        match word {
            "-i" => found.push(is(json!({ "meta": { "key": "iifname" } }), name())),
            "-o" => found.push(is(json!({ "meta": { "key": "oifname" } }), name())),
            "-s" => found.push(is(payload("saddr"), block(value))),
            "-d" => found.push(is(payload("daddr"), block(value))),
            "-j" | "-g" => {
                found.push(target(word, value));
                // What follows are options of the target.
                break;
            }
            // The module of a match; its options follow.
            "-m" => {}
            _ => found.push(json!({ "unknown": word })),
        }
        op = "==";
    }
    found
}

fn block(text: &str) -> Value {
    let (address, length) = text.split_once('/').unwrap_or((text, "32"));
    let length = length.parse::<u8>().unwrap_or(32);
    json!({ "prefix": { "addr": address, "len": length } })
}

fn target(word: &str, name: &str) -> Value {
    match name {
        "ACCEPT" => json!({ "accept": null }),
        "DROP" | "REJECT" => json!({ "drop": null }),
        "RETURN" => json!({ "return": null }),
        "LOG" | "NFLOG" => json!({ "log": null }),
        _ if word == "-g" => json!({ "goto": { "target": name } }),
        _ => json!({ "jump": { "target": name } }),
    }
}
