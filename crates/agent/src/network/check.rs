//! Comparison of the rules that the kernel has with those that the agent applied. Pure functions.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{
    addresses::Slot,
    rules::{BASE_CHAINS, agent_chain},
};

/// The host's table, as far as the agent is responsible for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listing {
    /// Properties and rules of each chain, without the kernel's numbers for them.
    chains: BTreeMap<String, Vec<Value>>,
    /// Interfaces that forward to sandboxes only.
    routed: BTreeSet<String>,
    /// Chain to which the packets of a link go.
    links: BTreeMap<String, String>,
}

impl Listing {
    /// Reads the output of `nft -j list table`. Unknown objects are ignored.
    pub(super) fn parse(table: &Value) -> Self {
        let mut listing = Self::default();
        for object in table["nftables"].as_array().into_iter().flatten() {
            if let Some(chain) = object.get("chain") {
                let name = text(&chain["name"]);
                let properties = without_number(chain.clone());
                listing
                    .chains
                    .entry(name)
                    .or_default()
                    .insert(0, properties);
            } else if let Some(rule) = object.get("rule") {
                let chain = listing.chains.entry(text(&rule["chain"])).or_default();
                chain.push(rule["expr"].clone());
            } else if let Some(set) = object.get("set").filter(|set| set["name"] == "routed") {
                let names = set["elem"].as_array().into_iter().flatten();
                listing.routed = names.map(text).collect();
            } else if let Some(map) = object.get("map").filter(|map| map["name"] == "links") {
                let elements = map["elem"].as_array().into_iter().flatten();
                let pair = |e: &Value| (text(&e[0]), text(&e[1]["goto"]["target"]));
                listing.links = elements.map(pair).collect();
            }
        }
        listing
    }

    /// Returns what differs from `applied`, the listing after the agent applied its rules, for a log
    /// message. Chains and links of other agents do not count.
    pub(super) fn deviations(
        &self,
        applied: &Self,
        agent: &str,
        egress: &BTreeSet<Slot>,
        routed: &BTreeSet<String>,
    ) -> Vec<String> {
        let own = agent_chain(agent);
        let own_chain = (!egress.is_empty()).then_some(own.as_str());
        let mut found: Vec<String> = BASE_CHAINS
            .into_iter()
            .chain(own_chain)
            .filter(|name| self.chains.get(*name) != applied.chains.get(*name))
            .map(|name| format!("chain {name}"))
            .collect();
        if self.routed != *routed {
            found.push("set routed".to_owned());
        }
        let present: BTreeSet<Slot> = self.own_links(agent).collect();
        let differing = egress.symmetric_difference(&present);
        found.extend(differing.map(|slot| format!("egress of {}", slot.veth())));
        found
    }

    /// Returns the slots whose links lead to the agent's chain although they have no egress.
    pub(super) fn stray_links(&self, agent: &str, egress: &BTreeSet<Slot>) -> Vec<Slot> {
        let is_stray = |slot: &Slot| !egress.contains(slot);
        self.own_links(agent).filter(is_stray).collect()
    }

    /// Returns those of `slots` whose links lead to the chain of another agent.
    pub(super) fn foreign_links(&self, agent: &str, slots: &BTreeSet<Slot>) -> Vec<Slot> {
        let own = agent_chain(agent);
        let is_foreign = |slot: &&Slot| {
            let chain = self.links.get(&slot.veth());
            chain.is_some_and(|chain| *chain != own)
        };
        slots.iter().filter(is_foreign).copied().collect()
    }

    fn own_links(&self, agent: &str) -> impl Iterator<Item = Slot> {
        let own = agent_chain(agent);
        let links = self.links.iter();
        let own_links = links.filter(move |(_, chain)| **chain == own);
        own_links.filter_map(|(link, _)| Slot::of_veth(link))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Removes the number that the kernel gave to a chain. It changes when the chain is created again.
fn without_number(mut object: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("handle");
    }
    object
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use serde_json::json;

    fn table() -> Value {
        let chain = |name: &str, handle: u32| json!({ "chain": { "family": "inet", "table": "wrenn", "name": name, "handle": handle } });
        let rule = |chain: &str, handle: u32, verdict: &str| json!({ "rule": { "chain": chain, "handle": handle, "expr": [{ verdict: null }] } });
        json!({ "nftables": [
            { "metainfo": { "version": "1.0.6" } },
            { "table": { "family": "inet", "name": "wrenn", "handle": 1 } },
            { "map": { "name": "links", "elem": [
                ["wrenn-v1", { "goto": { "target": "agent_a" } }],
                ["wrenn-v2", { "goto": { "target": "agent_b" } }],
            ] } },
            { "set": { "name": "routed", "elem": ["eth0"] } },
            chain("prerouting", 1), chain("input", 2), chain("forward", 3),
            chain("postrouting", 4), chain("agent_a", 5), chain("agent_b", 6),
            rule("forward", 7, "drop"), rule("agent_a", 8, "accept"), rule("agent_b", 9, "accept"),
        ] })
    }

    fn deviations(change: impl FnOnce(&mut Vec<Value>)) -> Vec<String> {
        let mut changed = table();
        change(changed["nftables"].as_array_mut().unwrap());
        let (egress, routed) = ([Slot::new(1).unwrap()].into(), ["eth0".to_owned()].into());
        Listing::parse(&changed).deviations(&Listing::parse(&table()), "a", &egress, &routed)
    }

    #[test]
    fn rules_that_were_applied_again_are_the_same() {
        let renumber = |objects: &mut Vec<Value>| {
            for object in objects {
                for field in object.as_object_mut().unwrap().values_mut() {
                    if field.get("handle").is_some() {
                        field["handle"] = 99.into();
                    }
                }
            }
        };
        assert_eq!(deviations(renumber), [""; 0]);
    }

    #[test]
    fn each_change_is_found_and_those_of_other_agents_are_not() {
        assert_eq!(
            deviations(|objects| drop(objects.remove(10))),
            ["chain forward"]
        );
        assert_eq!(
            deviations(|objects| drop(objects.remove(3))),
            ["set routed"]
        );
        assert_eq!(
            deviations(|objects| drop(objects.remove(2))),
            ["egress of wrenn-v1"]
        );
        let flush_own = |objects: &mut Vec<Value>| drop(objects.remove(11));
        assert_eq!(deviations(flush_own), ["chain agent_a"]);
        let flush_other = |objects: &mut Vec<Value>| drop(objects.remove(12));
        assert_eq!(deviations(flush_other), [""; 0]);
        let add = |objects: &mut Vec<Value>| {
            objects[2]["map"]["elem"][1][1]["goto"]["target"] = "agent_a".into();
        };
        assert_eq!(deviations(add), ["egress of wrenn-v2"]);
        let (listing, slot) = (Listing::parse(&table()), |number| {
            Slot::new(number).unwrap()
        });
        assert_eq!(listing.stray_links("a", &BTreeSet::new()), [slot(1)]);
        assert_eq!(
            listing.foreign_links("a", &[slot(1), slot(2)].into()),
            [slot(2)]
        );
        assert_eq!(deviations(Vec::clear).len(), 7);
    }
}
