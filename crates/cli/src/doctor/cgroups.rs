//! Which cgroup controllers can be used, on which version of the hierarchy.

use std::fmt;

/// The controllers that limit a sandbox.
const WANTED: [&str; 3] = ["cpu", "memory", "pids"];

/// Controllers of a machine: on version 2, on version 1, both kinds on some machines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cgroups {
    /// Controllers of the unified hierarchy.
    pub(crate) v2: Vec<String>,
    /// Controllers that have a hierarchy of version 1.
    pub(crate) v1: Vec<String>,
}

impl Cgroups {
    /// Reads `/proc/self/mounts`; `controllers` reads the file of that name in a mounted unified hierarchy.
    pub(crate) fn read(mounts: &str, controllers: impl Fn(&str) -> Option<String>) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let words: Vec<String> = match kind {
                "cgroup2" => controllers(at)
                    .unwrap_or_default()
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect(),
                "cgroup" => options.split(',').map(str::to_owned).collect(),
                _ => continue,
            };
            let wanted = words
                .into_iter()
                .filter(|word| WANTED.contains(&word.as_str()));
            if kind == "cgroup2" {
                found.v2.extend(wanted);
            } else {
                found.v1.extend(wanted);
            }
        }
        found
    }

    /// Controllers that nothing offers.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        WANTED
            .into_iter()
            .filter(|word| !self.v1.iter().chain(&self.v2).any(|have| have == word))
            .collect()
    }
}

impl fmt::Display for Cgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        for (version, words) in [("v2", &self.v2), ("v1", &self.v1)] {
            if !words.is_empty() {
                parts.push(format!("{version}: {}", words.join(" ")));
            }
        }
        f.write_str(&parts.join(", "))
    }
}
