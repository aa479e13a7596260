//! Rules of the usual firewalls, in the kernel of a private host where `nft` can write them.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::private_host::{self, run};

fn traffic() -> Traffic {
    Traffic {
        links: "10.12.0.0/16".parse().unwrap(),
        uplink: "eth0".to_owned(),
    }
}

fn nft(rules: &str) {
    std::fs::write("/run/rules", rules).unwrap();
    run("nft", &["-f", "/run/rules"]);
}

/// Creates a base chain with this hook, priority and policy, without rules.
fn base_chain(family: &str, table: &str, name: &str, hook: &str) {
    nft(&format!(
        "add table {family} {table}\nadd chain {family} {table} {name} {{ type filter hook {hook} }}"
    ));
}

fn found() -> Option<Obstacle> {
    find(&traffic()).unwrap()
}

/// Rules of Docker's daemon, as it writes them with iptables-nft.
const DOCKER: &str = r#"
    table ip filter {
        chain DOCKER-USER {
            counter return
        }
        chain DOCKER {
        }
        chain FORWARD {
            type filter hook forward priority filter; policy drop;
            counter jump DOCKER-USER
            oifname "docker0" ct state related,established counter accept
            oifname "docker0" counter jump DOCKER
            iifname "docker0" oifname != "docker0" counter accept
            iifname "docker0" oifname "docker0" counter accept
        }
    }
"#;

#[test]
fn without_another_firewall_nothing_is_found() {
    private_host::enter();
    assert_eq!(found(), None);
    base_chain(
        "inet",
        "filter",
        "forward",
        "forward priority filter; policy accept;",
    );
    base_chain(
        "inet",
        "filter",
        "input",
        "input priority filter; policy drop;",
    );
    assert_eq!(found(), None);
}

#[test]
fn docker_is_named_and_its_own_chain_for_users_permits_the_traffic() {
    private_host::enter();
    nft(DOCKER);
    let obstacle = found().unwrap();
    assert_eq!(obstacle.what, "Docker (chain FORWARD of table filter)");
    assert_eq!(
        obstacle.fix,
        "iptables -I DOCKER-USER -i wrenn-v+ -j ACCEPT && iptables -I DOCKER-USER -o wrenn-v+ -j ACCEPT"
    );
    // What the command does. Half of it is not sufficient.
    nft(r#"insert rule ip filter DOCKER-USER iifname "wrenn-v*" counter accept"#);
    assert!(found().is_some());
    nft(r#"insert rule ip filter DOCKER-USER oifname "wrenn-v*" counter accept"#);
    assert_eq!(found(), None);
}

#[test]
fn ufw_is_named_and_a_route_rule_permits_the_traffic() {
    private_host::enter();
    nft(r#"
        table ip filter {
            chain ufw-user-forward {
            }
            chain ufw-before-forward {
                ct state related,established counter accept
                icmp type echo-request counter accept
                counter jump ufw-user-forward
            }
            chain FORWARD {
                type filter hook forward priority filter; policy drop;
                counter jump ufw-before-forward
            }
        }
    "#);
    let obstacle = found().unwrap();
    assert!(obstacle.what.starts_with("ufw ("), "{obstacle}");
    assert_eq!(obstacle.fix, "ufw route allow from 10.12.0.0/16");
    nft("add rule ip filter ufw-user-forward ip saddr 10.12.0.0/16 counter accept");
    assert_eq!(found(), None);
}

#[test]
fn firewalld_is_named_and_a_trusted_source_permits_the_traffic() {
    private_host::enter();
    nft(r#"
        table inet firewalld {
            chain filter_FWD_public {
                reject with icmpx type admin-prohibited
            }
            chain filter_FWD_trusted {
                accept
            }
            chain filter_FORWARD_POLICIES {
                iifname vmap { "docker0" : goto filter_FWD_trusted, "eth0" : goto filter_FWD_public }
                goto filter_FWD_public
            }
            chain filter_FORWARD {
                type filter hook forward priority filter + 10; policy accept;
                ct state { established, related } accept
                ct state invalid drop
                iifname "lo" accept
                jump filter_FORWARD_POLICIES
                reject with icmpx type admin-prohibited
            }
        }
    "#);
    let obstacle = found().unwrap();
    assert!(obstacle.what.starts_with("firewalld ("), "{obstacle}");
    assert!(
        obstacle.fix.contains("--add-source=10.12.0.0/16"),
        "{obstacle}"
    );
    nft(
        "insert rule inet firewalld filter_FORWARD_POLICIES ip saddr 10.12.0.0/16 goto filter_FWD_trusted",
    );
    assert_eq!(found(), None);
}

#[test]
fn any_other_chain_is_named_with_a_rule_of_its_own() {
    private_host::enter();
    base_chain("inet", "site", "relay", "forward priority 5; policy drop;");
    let obstacle = found().unwrap();
    assert_eq!(obstacle.what, "nftables (chain relay of table site)");
    for command in obstacle.fix.split(" && ") {
        run("sh", &["-c", command]);
    }
    assert_eq!(found(), None);
    base_chain(
        "ip",
        "filter",
        "FORWARD",
        "forward priority filter; policy drop;",
    );
    assert_eq!(
        found().unwrap().what,
        "iptables (chain FORWARD of table filter)"
    );
}

#[test]
fn the_agents_own_rules_are_no_obstacle() {
    private_host::enter();
    base_chain(
        "inet",
        "wrenn",
        "forward",
        "forward priority -10; policy drop;",
    );
    assert_eq!(found(), None);
}

#[test]
fn the_old_implementation_of_iptables_is_read_too() {
    let rules = |user: &str| {
        format!(
            "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N DOCKER-USER\n\
             -A FORWARD -j DOCKER-USER\n\
             -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
             -A FORWARD -i docker0 ! -o docker0 -j ACCEPT\n{user}-A DOCKER-USER -j RETURN\n"
        )
    };
    let found = |user: &str| obstacle(&legacy::parse(&rules(user)), &traffic());
    let docker = found("").unwrap();
    assert_eq!(docker.what, "Docker (chain FORWARD of table filter)");
    assert!(
        docker.fix.starts_with("iptables-legacy -I DOCKER-USER"),
        "{docker}"
    );
    let both = "-A DOCKER-USER -i wrenn-v+ -j ACCEPT\n-A DOCKER-USER -o wrenn-v+ -j ACCEPT\n";
    assert_eq!(found(both), None);
    let by_address = "-A DOCKER-USER -s 10.12.0.0/16 -j ACCEPT\n\
                      -A DOCKER-USER -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
    assert_eq!(found(by_address), None);
    assert!(found("-A DOCKER-USER ! -i docker0 -j DROP\n").is_some());
}

#[test]
fn chains_that_lead_to_each_other_end_the_search() {
    let rules = "-P FORWARD DROP\n-N A\n-N B\n-A FORWARD -j A\n-A A -j B\n-A B -j A\n";
    assert!(obstacle(&legacy::parse(rules), &traffic()).is_some());
}
