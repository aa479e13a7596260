//! Name servers of this machine, for its sandboxes.
//!
//! The stub of systemd-resolved (127.0.0.53, the default of Ubuntu and Fedora) is replaced by the
//! servers that it uses. Other servers on the loopback address are returned as they are; the agent
//! forwards requests to them.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::config::Settings;

/// Addresses of the stub of systemd-resolved.
const STUBS: [[u8; 4]; 2] = [[127, 0, 0, 53], [127, 0, 0, 54]];

/// Name servers of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nameservers {
    /// Addresses, in order of preference.
    pub(crate) servers: Vec<IpAddr>,
    /// Setting or file that contains the addresses.
    pub(crate) source: String,
}

/// Files with name servers.
#[derive(Debug)]
pub(crate) struct Files {
    /// Name servers of the machine's programs.
    resolv_conf: PathBuf,
    /// Name servers that the stub of systemd-resolved uses.
    stub_upstreams: PathBuf,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            resolv_conf: "/etc/resolv.conf".into(),
            stub_upstreams: "/run/systemd/resolve/resolv.conf".into(),
        }
    }
}

impl Files {
    /// Returns the name servers for sandboxes.
    pub(crate) fn nameservers(&self, settings: &Settings) -> Nameservers {
        if let Some(servers) = &settings.dns {
            return Nameservers {
                servers: servers.clone(),
                source: "WRENN_DNS".to_owned(),
            };
        }
        let of_machine = read(&self.resolv_conf);
        let is_stub = |server: &IpAddr| STUBS.into_iter().any(|stub| *server == IpAddr::from(stub));
        if of_machine.servers.iter().any(is_stub) {
            let upstreams = read(&self.stub_upstreams);
            if !upstreams.servers.is_empty() && !upstreams.servers.iter().any(is_stub) {
                return upstreams;
            }
        }
        of_machine
    }
}

/// Reads a file in the format of resolv.conf(5). Addresses with a zone are left out: they are valid
/// on one link of this machine only.
fn read(path: &Path) -> Nameservers {
    let text = fs::read_to_string(path).unwrap_or_default();
    let servers = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<IpAddr>().ok())
        .filter(|server| !server.is_unspecified())
        .collect();
    Nameservers {
        servers,
        source: path.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Layer, load};

    fn settings(dns: Option<Vec<IpAddr>>) -> Settings {
        let flags = Layer {
            dns,
            ..Layer::default()
        };
        let empty = tempfile::NamedTempFile::new().expect("a file");
        load(flags, Some(empty.path()), |_| None).expect("settings")
    }

    /// Returns the name servers of a machine with these two files; without the second if it is
    /// `None`.
    fn of(resolv_conf: &str, upstreams: Option<&str>) -> (String, String) {
        let dir = tempfile::tempdir().expect("a directory");
        let files = Files {
            resolv_conf: dir.path().join("resolv.conf"),
            stub_upstreams: dir.path().join("upstreams"),
        };
        fs::write(&files.resolv_conf, resolv_conf).expect("written");
        if let Some(text) = upstreams {
            fs::write(&files.stub_upstreams, text).expect("written");
        }
        let found = files.nameservers(&settings(None));
        let servers: Vec<_> = found.servers.iter().map(ToString::to_string).collect();
        let source = Path::new(&found.source).file_name().expect("a file");
        (servers.join(" "), source.to_string_lossy().into_owned())
    }

    fn found(servers: &str, source: &str) -> (String, String) {
        (servers.to_owned(), source.to_owned())
    }

    #[test]
    fn the_servers_behind_the_stub_of_systemd_are_used() {
        let stub = "# c\nnameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n";
        let upstreams = "nameserver 192.168.1.1\nnameserver 2001:db8::1\n";
        assert_eq!(
            of(stub, Some(upstreams)),
            found("192.168.1.1 2001:db8::1", "upstreams")
        );
        // Without the servers behind it, the stub is used through the forwarder.
        assert_eq!(of(stub, None), found("127.0.0.53", "resolv.conf"));
        assert_eq!(of(stub, Some("")), found("127.0.0.53", "resolv.conf"));
        assert_eq!(of(stub, Some(stub)), found("127.0.0.53", "resolv.conf"));
    }

    #[test]
    fn other_servers_are_taken_as_they_are() {
        let text = "nameserver 127.0.0.1\nnameserver 192.0.2.1\nnameserver 0.0.0.0\n nameserver  192.0.2.2 \nnameserver fe80::1%eth0\n";
        assert_eq!(
            of(text, Some("nameserver 9.9.9.9\n")),
            found("127.0.0.1 192.0.2.1 192.0.2.2", "resolv.conf")
        );
        assert_eq!(of("", None), found("", "resolv.conf"));
    }

    #[test]
    fn a_setting_comes_first() {
        let servers = vec![IpAddr::from([192, 0, 2, 1])];
        let found = Files::default().nameservers(&settings(Some(servers.clone())));
        assert_eq!(found.servers, servers);
        assert_eq!(found.source, "WRENN_DNS");
    }
}
