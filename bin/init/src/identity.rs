//! Identity of the guest at boot, in `/run/wrenn/etc`. Files in `/etc` are links to these files.
//!
//! The values apply until the guest is restored from a snapshot. The guest agent then writes new
//! ones.

use std::{fs, io};

use wrenn_proto::guest::HOSTNAME as GUEST_HOSTNAME;

const DIR: &str = "/run/wrenn/etc";

/// Parameter of the kernel command line that lists nameservers, separated by commas.
const NAMESERVERS: &str = "wrenn.dns=";

/// Writes hostname, hosts, machine-id and resolv.conf.
pub(crate) fn write() -> io::Result<()> {
    fs::create_dir_all(DIR)?;
    rustix::system::sethostname(GUEST_HOSTNAME.as_bytes())?;
    let put = |name: &str, content: &str| fs::write(format!("{DIR}/{name}"), content);
    put("hostname", &format!("{GUEST_HOSTNAME}\n"))?;
    put(
        "hosts",
        &format!("127.0.0.1 localhost {GUEST_HOSTNAME}\n::1 localhost ip6-localhost\n"),
    )?;
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    put("machine-id", &machine_id(&uuid))?;
    let words = fs::read_to_string("/proc/cmdline")?;
    put("resolv.conf", &nameservers(&words))
}

/// Converts a UUID of the kernel to a machine id, which is the UUID's digits without dashes
/// (machine-id(5)).
fn machine_id(uuid: &str) -> String {
    uuid.replace('-', "")
}

fn nameservers(cmdline: &str) -> String {
    let list = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix(NAMESERVERS));
    let servers = list
        .unwrap_or_default()
        .split(',')
        .filter(|server| !server.is_empty());
    servers
        .map(|server| format!("nameserver {server}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_id_is_a_uuid_without_dashes() {
        assert_eq!(
            machine_id("9b0e5aeb-7558-4929-9af2-5b3d9211a6df\n"),
            "9b0e5aeb755849299af25b3d9211a6df\n"
        );
    }

    #[test]
    fn nameservers_come_from_the_command_line() {
        assert_eq!(
            nameservers("quiet wrenn.dns=10.0.0.1,10.0.0.2 panic=-1\n"),
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\n"
        );
        assert_eq!(nameservers("quiet"), "");
        assert_eq!(nameservers("wrenn.dns="), "");
    }
}
