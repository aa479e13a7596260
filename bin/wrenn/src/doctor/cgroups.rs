//! Detection of usable cgroup controllers and their hierarchy version.

use std::fmt;

/// Controllers that limit a sandbox.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Controllers of a machine, on version 2, version 1, or a mix of both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cgroups {
    /// Controllers of the unified hierarchy.
    pub(crate) v2: Vec<String>,
    /// Controllers with a hierarchy of version 1.
    pub(crate) v1: Vec<String>,
    /// Reasons why mounted hierarchies cannot be used.
    pub(crate) unusable: Vec<String>,
    /// True if the service does not start without all of them.
    pub(crate) required: bool,
}

impl Cgroups {
    /// Parses `/proc/self/mounts`. `controllers` returns the content of `cgroup.controllers` of the
    /// unified hierarchy at a mount point.
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
                .filter(|word| CONTROLLERS.contains(&word.as_str()));
            if kind == "cgroup2" {
                found.v2.extend(wanted);
            } else {
                found.v1.extend(wanted);
            }
        }
        found
    }

    /// Returns the controllers that neither version provides, or all if a hierarchy cannot be used.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        if !self.unusable.is_empty() {
            return CONTROLLERS.to_vec();
        }
        CONTROLLERS
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
