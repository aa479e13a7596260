//! Settings, and where each comes from: flag, then environment, then one TOML file, then the default.
//!
//! Owns the names of all settings. Every source is read into the same [`Layer`] of optional values, and [`Settings`] is
//! the first value found of each. Never writes anything. A wrong value is an error that names where it stands.

mod load;
#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use wrenn_proto::{rest::Egress, supervise::Accel};

pub(crate) use load::{address, load};

/// Where data lives unless a setting says otherwise.
pub(crate) const DEFAULT_DIR: &str = "/var/lib/wrenn";

/// The machine-wide settings file.
pub(crate) const SYSTEM_FILE: &str = "/etc/wrenn.toml";

/// How guest code shall run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AccelChoice {
    /// Hardware virtualization where it works, software elsewhere.
    #[default]
    Auto,
    /// Hardware virtualization.
    Kvm,
    /// Software emulation by QEMU: works everywhere.
    Tcg,
}

impl AccelChoice {
    /// The accelerator that was asked for; `None` if the machine decides.
    pub(crate) fn forced(self) -> Option<Accel> {
        match self {
            Self::Auto => None,
            Self::Kvm => Some(Accel::Kvm),
            Self::Tcg => Some(Accel::Tcg),
        }
    }
}

/// What one source says. Its fields are the keys of the TOML file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layer {
    /// Data directory.
    pub(crate) dir: Option<PathBuf>,
    /// Where the REST API listens.
    pub(crate) listen: Option<SocketAddr>,
    /// Where requests to ports of sandboxes are taken.
    pub(crate) traffic_listen: Option<SocketAddr>,
    /// Where the host agent listens.
    pub(crate) agent_listen: Option<SocketAddr>,
    /// Where a control plane that runs alone finds its agent.
    pub(crate) agent_url: Option<String>,
    /// Kernels, root file systems and templates.
    pub(crate) images_dir: Option<PathBuf>,
    /// Where client verbs find the REST API.
    pub(crate) api_url: Option<String>,
    /// Key of client verbs.
    pub(crate) api_key: Option<String>,
    /// Database of the control plane.
    pub(crate) database_url: Option<String>,
    /// How guest code runs.
    pub(crate) accel: Option<AccelChoice>,
    /// Whether sandboxes that do not say may reach the world.
    pub(crate) egress: Option<Egress>,
    /// Name servers given to guests that may reach the world.
    pub(crate) dns: Option<Vec<Ipv4Addr>>,
    /// Filter of the log, as `tracing` reads it.
    pub(crate) log: Option<String>,
    /// The guest agent's binary, for image builds.
    pub(crate) envd: Option<PathBuf>,
}

impl Layer {
    /// This layer, with what it leaves open taken from `lower`.
    fn or(self, lower: Self) -> Self {
        Self {
            dir: self.dir.or(lower.dir),
            listen: self.listen.or(lower.listen),
            traffic_listen: self.traffic_listen.or(lower.traffic_listen),
            agent_listen: self.agent_listen.or(lower.agent_listen),
            agent_url: self.agent_url.or(lower.agent_url),
            images_dir: self.images_dir.or(lower.images_dir),
            api_url: self.api_url.or(lower.api_url),
            api_key: self.api_key.or(lower.api_key),
            database_url: self.database_url.or(lower.database_url),
            accel: self.accel.or(lower.accel),
            egress: self.egress.or(lower.egress),
            dns: self.dns.or(lower.dns),
            log: self.log.or(lower.log),
            envd: self.envd.or(lower.envd),
        }
    }
}

/// The settings of this run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Data directory.
    pub(crate) dir: PathBuf,
    /// Where the REST API listens.
    pub(crate) listen: SocketAddr,
    /// Where requests to ports of sandboxes are taken.
    pub(crate) traffic_listen: SocketAddr,
    /// Where the host agent listens.
    pub(crate) agent_listen: SocketAddr,
    /// Where a control plane that runs alone finds its agent.
    pub(crate) agent_url: String,
    /// Kernels, root file systems and templates.
    pub(crate) images_dir: PathBuf,
    /// Where client verbs find the REST API.
    pub(crate) api_url: String,
    /// Key of client verbs; without one they look into [`Settings::key_file`].
    pub(crate) api_key: Option<String>,
    /// Database of the control plane.
    pub(crate) database_url: String,
    /// How guest code runs.
    pub(crate) accel: AccelChoice,
    /// Whether sandboxes that do not say may reach the world.
    pub(crate) egress: Egress,
    /// Name servers for guests; `None`: the host's own.
    pub(crate) dns: Option<Vec<Ipv4Addr>>,
    /// Filter of the log.
    pub(crate) log: String,
    /// The guest agent's binary; `None`: `envd` beside this program.
    pub(crate) envd: Option<PathBuf>,
}

impl Settings {
    /// Fills in the defaults.
    fn from_layer(layer: Layer) -> Self {
        let dir = layer.dir.map_or_else(|| DEFAULT_DIR.into(), whole);
        let listen = layer
            .listen
            .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 8000).into());
        let agent_listen = layer
            .agent_listen
            .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 50051).into());
        Self {
            listen,
            traffic_listen: layer
                .traffic_listen
                .unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 8001).into()),
            agent_listen,
            agent_url: layer.agent_url.unwrap_or_else(|| url_of(agent_listen)),
            images_dir: layer.images_dir.map_or_else(|| dir.join("images"), whole),
            api_url: layer.api_url.unwrap_or_else(|| url_of(listen)),
            api_key: layer.api_key,
            database_url: layer
                .database_url
                .unwrap_or_else(|| sqlite_url(&dir.join("wrenn.db"))),
            accel: layer.accel.unwrap_or_default(),
            egress: layer.egress.unwrap_or(Egress::Deny),
            dns: layer.dns,
            log: layer.log.unwrap_or_else(|| "info".to_owned()),
            envd: layer.envd.map(whole),
            dir,
        }
    }

    /// File that holds the first API key, mode 0600.
    pub(crate) fn key_file(&self) -> PathBuf {
        self.dir.join("api-key")
    }

    /// File that holds the first API key in the form that clients of the E2B API expect, mode 0600.
    pub(crate) fn e2b_key_file(&self) -> PathBuf {
        self.dir.join("e2b-api-key")
    }

    /// File that holds the token between control plane and agent, mode 0600.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.dir.join("agent-token")
    }
}

/// A path that means the same in every process, whatever its working directory.
fn whole(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// The URL of a listener on this machine. An address that means "all" is reached by loopback.
fn url_of(listen: SocketAddr) -> String {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, listen.port()))
}

/// The URL of a SQLite database that is made when it is not there.
fn sqlite_url(path: &Path) -> String {
    // What would end the path in a URL.
    let path = path
        .display()
        .to_string()
        .replace('%', "%25")
        .replace('?', "%3F")
        .replace('#', "%23");
    format!("sqlite://{path}?mode=rwc")
}

/// Name servers of `resolv.conf` that a guest can use too: IPv4, and not on the host's loopback.
pub(crate) fn nameservers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<Ipv4Addr>().ok())
        .filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
        .collect()
}

/// The name servers to give to guests.
pub(crate) fn guest_dns(settings: &Settings, resolv_conf: &Path) -> Vec<Ipv4Addr> {
    settings
        .dns
        .clone()
        .unwrap_or_else(|| nameservers(&std::fs::read_to_string(resolv_conf).unwrap_or_default()))
}
