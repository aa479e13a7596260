//! IPv4 forwarding of single interfaces.
//!
//! A packet is forwarded only if forwarding is on for the interface that it arrives on: the link to
//! a sandbox for requests, the uplink for replies. The agent switches on exactly these, never the
//! setting for the whole host (`net.ipv4.ip_forward`).
//!
//! An uplink whose forwarding was off is noted in a file `/run/wrenn/forwarding/<agent>.<link>`
//! before it is switched on. When the last note of an interface is removed, it is switched off
//! again. Notes outlive the agent, like its sandboxes. As long as there is a note, the host's rules
//! forward packets from that interface to sandboxes only, so that the host does not become a router
//! for its neighbours. If somebody switches forwarding on for the whole host, the notes are dropped:
//! forwarding is then not the agent's any more.

use std::{collections::BTreeSet, fs, io, path::Path};

use super::addresses::Slot;

/// Directory of the notes about interfaces whose forwarding was switched on.
const NOTES_DIR: &str = "/run/wrenn/forwarding";

/// Setting of the kernel for the whole host.
const WHOLE_HOST: &str = "/proc/sys/net/ipv4/ip_forward";

/// Forwarding of this host, as one agent sees it.
#[derive(Debug, Clone)]
pub(super) struct Forwarding {
    agent: String,
}

impl Forwarding {
    /// Returns the forwarding of this host for the agent with this short name.
    pub(super) fn of(agent: &str) -> Self {
        let agent = agent.to_owned();
        Self { agent }
    }

    /// Switches forwarding on for the interfaces in `wanted`, and off for those that the agent had
    /// switched on for itself and that are not wanted any more. Returns the interfaces that were
    /// noted before and found switched off, because another program did that.
    pub(super) fn hold(&self, wanted: &BTreeSet<String>) -> io::Result<Vec<String>> {
        if is_on(Path::new(WHOLE_HOST)) == Some(true) {
            self.drop_notes()?;
            return Ok(Vec::new());
        }
        let mut restored = Vec::new();
        for link in wanted.iter().filter(|link| is_plain(link)) {
            let noted = self.note(link).exists();
            if is_on(&setting(link)) != Some(false) {
                // On already, by the operator or by another agent, whose note is shared.
                if !noted && self.noted_links()?.contains(link) {
                    self.write_note(link)?;
                }
                continue;
            }
            self.write_note(link)?;
            switch(link, true)?;
            tracing::info!(link, "IPv4 forwarding switched on");
            if noted {
                restored.push(link.clone());
            }
        }
        self.release_except(wanted)?;
        Ok(restored)
    }

    /// Returns the interfaces of which an agent of this host has a note.
    pub(super) fn noted_links(&self) -> io::Result<BTreeSet<String>> {
        let links = notes()?.into_iter().map(|(_, link)| link);
        Ok(links.filter(|link| is_plain(link)).collect())
    }

    /// Sets the forwarding of a sandbox's link. Returns true if it had another value. Does nothing
    /// if the link does not exist.
    pub(super) fn set_link(slot: Slot, on: bool) -> io::Result<bool> {
        let link = slot.veth();
        match is_on(&setting(&link)) {
            Some(current) if current != on => switch(&link, on).map(|()| true),
            _ => Ok(false),
        }
    }

    /// True if the link of a sandbox exists and forwards.
    pub(super) fn is_link_on(slot: Slot) -> bool {
        is_on(&setting(&slot.veth())) == Some(true)
    }

    fn release_except(&self, wanted: &BTreeSet<String>) -> io::Result<()> {
        for (agent, link) in notes()? {
            if agent != self.agent || wanted.contains(&link) {
                continue;
            }
            remove(&self.note(&link))?;
            if !self.noted_links()?.contains(&link) && is_on(&setting(&link)).is_some() {
                switch(&link, false)?;
                tracing::info!(link, "IPv4 forwarding switched off");
            }
        }
        Ok(())
    }

    fn drop_notes(&self) -> io::Result<()> {
        for (agent, link) in notes()? {
            if agent == self.agent {
                remove(&self.note(&link))?;
            }
        }
        Ok(())
    }

    fn write_note(&self, link: &str) -> io::Result<()> {
        fs::create_dir_all(NOTES_DIR)?;
        fs::write(self.note(link), "")
    }

    fn note(&self, link: &str) -> std::path::PathBuf {
        Path::new(NOTES_DIR).join(format!("{}.{link}", self.agent))
    }
}

/// Returns all notes of the host: agent and interface.
fn notes() -> io::Result<Vec<(String, String)>> {
    let entries = match fs::read_dir(NOTES_DIR) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        // The name of an agent has no dot; the name of an interface may have some.
        if let Some((agent, link)) = name.to_str().and_then(|name| name.split_once('.')) {
            found.push((agent.to_owned(), link.to_owned()));
        }
    }
    Ok(found)
}

/// True if the name of an interface can be part of a path and of a rule.
fn is_plain(link: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.-@:+".contains(c);
    !link.is_empty() && !link.starts_with('.') && link.chars().all(is_plain)
}

fn setting(link: &str) -> std::path::PathBuf {
    Path::new("/proc/sys/net/ipv4/conf")
        .join(link)
        .join("forwarding")
}

/// Returns the value of a setting; `None` if it cannot be read, for example because the interface
/// does not exist.
fn is_on(setting: &Path) -> Option<bool> {
    let text = fs::read_to_string(setting).ok()?;
    Some(text.trim() != "0")
}

fn switch(link: &str, on: bool) -> io::Result<()> {
    fs::write(setting(link), if on { "1" } else { "0" })
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::private_host::{self, ip};

    fn links(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn on(link: &str) -> bool {
        is_on(&setting(link)).unwrap()
    }

    fn enter() {
        private_host::enter();
        for (link, peer) in [("up1", "x1"), ("up2.5", "x2")] {
            ip(&["link", "add", link, "type", "veth", "peer", "name", peer]);
        }
        // A new namespace may inherit the value of the machine.
        fs::write(WHOLE_HOST, "0").unwrap();
    }

    #[test]
    fn exactly_the_wanted_interfaces_forward_and_are_switched_off_again() {
        enter();
        let forwarding = Forwarding::of("a");
        assert!(
            forwarding
                .hold(&links(&["up1", "up2.5"]))
                .unwrap()
                .is_empty()
        );
        assert!(on("up1") && on("up2.5") && !on("x1"));
        assert_eq!(fs::read_to_string(WHOLE_HOST).unwrap().trim(), "0");
        assert_eq!(forwarding.noted_links().unwrap(), links(&["up1", "up2.5"]));
        forwarding.hold(&links(&["up1"])).unwrap();
        assert!(on("up1") && !on("up2.5"));
        // Another agent process of the same directory knows what the first one did.
        Forwarding::of("a").hold(&links(&[])).unwrap();
        assert!(!on("up1"));
        assert!(forwarding.noted_links().unwrap().is_empty());
    }

    #[test]
    fn what_another_program_switches_off_is_restored_and_reported() {
        enter();
        let forwarding = Forwarding::of("a");
        forwarding.hold(&links(&["up1"])).unwrap();
        switch("up1", false).unwrap();
        assert_eq!(forwarding.hold(&links(&["up1"])).unwrap(), ["up1"]);
        assert!(on("up1"));
    }

    #[test]
    fn what_the_operator_or_another_agent_uses_stays_on() {
        enter();
        switch("up1", true).unwrap();
        let (a, b) = (Forwarding::of("a"), Forwarding::of("b"));
        for agent in [&a, &b] {
            agent.hold(&links(&["up1", "up2.5"])).unwrap();
        }
        assert_eq!(a.noted_links().unwrap(), links(&["up2.5"]));
        a.hold(&links(&[])).unwrap();
        assert!(on("up1") && on("up2.5"));
        b.hold(&links(&[])).unwrap();
        assert!(on("up1") && !on("up2.5"));
    }

    #[test]
    fn forwarding_for_the_whole_host_is_not_touched() {
        enter();
        let forwarding = Forwarding::of("a");
        forwarding.hold(&links(&["up1"])).unwrap();
        fs::write(WHOLE_HOST, "1").unwrap();
        forwarding.hold(&links(&["up1"])).unwrap();
        assert!(forwarding.noted_links().unwrap().is_empty());
        forwarding.hold(&links(&[])).unwrap();
        assert!(on("up1") && on("up2.5"));
    }

    #[test]
    fn an_interface_that_is_gone_or_has_a_strange_name_is_skipped() {
        enter();
        let forwarding = Forwarding::of("a");
        forwarding.hold(&links(&["up1"])).unwrap();
        ip(&["link", "del", "up1"]);
        forwarding.hold(&links(&["up1", "../all", "x\"y"])).unwrap();
        forwarding.hold(&links(&[])).unwrap();
        assert_eq!(fs::read_to_string(WHOLE_HOST).unwrap().trim(), "0");
    }

    #[test]
    fn a_link_to_a_sandbox_forwards_only_if_it_has_egress() {
        enter();
        let slot = Slot::new(7).unwrap();
        assert!(!Forwarding::set_link(slot, true).unwrap(), "no such link");
        ip(&[
            "link", "add", "wrenn-v7", "type", "veth", "peer", "name", "x7",
        ]);
        assert!(Forwarding::set_link(slot, true).unwrap() && on("wrenn-v7"));
        assert!(!Forwarding::set_link(slot, true).unwrap());
        assert!(Forwarding::set_link(slot, false).unwrap() && !on("wrenn-v7"));
    }
}
