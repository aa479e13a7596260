//! The host's side of the sandboxes' networks: the operator's ceiling, other programs' rules, name
//! servers, MTU, subnets and forwarding. Real packets.

use std::{fs, net::TcpListener, path::Path};

use connectrpc::ErrorCode;
use nix::sys::socket::{getsockopt, sockopt::TcpMaxSeg};
use wrenn_agent::{AgentConfig, EgressCeiling, Subnets};
use wrenn_model::EgressLimit;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, deadlines, on_private_host, until},
    private_host::{self, Footprint, ip, run},
    world::{
        PUBLIC, answer, echo_udp, echoes, inside, is_out_of_reach, make_container, make_internet,
        make_world, nft, receives, serve_tcp,
    },
};

fn ceiling(limit: EgressLimit, open: &[&str]) -> EgressCeiling {
    EgressCeiling {
        limit,
        open: open
            .iter()
            .map(|text| text.parse().expect("a range"))
            .collect(),
        closed: Vec::new(),
    }
}

/// Starts an agent with a ceiling.
async fn start(data_dir: &Path, egress_ceiling: EgressCeiling) -> TestAgent {
    let config = AgentConfig {
        egress_ceiling,
        ..agent::config(data_dir)
    };
    TestAgent::start_with(config, deadlines()).await
}

async fn create(agent: &TestAgent, id: &str) -> pb::SandboxInfo {
    let request = pb::CreateSandboxRequest {
        egress: pb::Egress::EGRESS_ALLOW.into(),
        ..agent::request(id)
    };
    agent.create_with(request).await.expect("made")
}

/// Checks that a guest cannot reach any of the addresses, all at the same time.
async fn reaches_none(agent: &TestAgent, id: &str, addresses: &[&str]) {
    let checks = addresses
        .iter()
        .map(|address| is_out_of_reach(agent, id, address));
    futures::future::join_all(checks).await;
}

async fn reaches(agent: &TestAgent, id: &str, address: &str) {
    let heard = receives(agent, id, address).await;
    assert!(heard.is_some(), "{id} does not reach {address}");
}

/// Value of an interface's forwarding setting.
fn forwards(link: &str) -> bool {
    let path = format!("/proc/sys/net/ipv4/conf/{link}/forwarding");
    fs::read_to_string(path).expect("a setting").trim() == "1"
}

fn set_forwarding(link: &str, on: bool) {
    let path = format!("/proc/sys/net/ipv4/conf/{link}/forwarding");
    fs::write(path, if on { "1" } else { "0" }).expect("set");
}

fn forward_whole_host(on: bool) {
    set_forwarding("all", on);
}

async fn restored(agent: &TestAgent) -> u64 {
    let host = agent.client.get_host(pb::GetHostRequest::default()).await;
    host.expect("a host").into_owned().network_restored
}

#[test]
fn a_guest_reaches_the_internet_but_nothing_beside_the_host() {
    on_private_host(async || {
        make_internet();
        make_container();
        forward_whole_host(true);
        answer(TcpListener::bind("0.0.0.0:8000").expect("bound"));
        // A network with public addresses that the host is a part of.
        ip(&[
            "-n",
            "world",
            "addr",
            "add",
            "203.0.114.2/24",
            "dev",
            "eth0",
        ]);
        ip(&["addr", "add", "203.0.114.1/24", "dev", "to-world"]);
        // The port that the container publishes is reachable from outside.
        let knock = || std::net::TcpStream::connect("10.99.0.1:8080").is_ok();
        assert!(inside("/run/netns/world", knock));

        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        create(&agent, "sb-1").await;
        reaches(&agent, "sb-1", &format!("{PUBLIC}:7777")).await;
        let closed = [
            "10.99.0.1:8000",
            "10.99.0.1:8080",
            "203.0.114.1:8000",
            "203.0.114.1:8080",
            "172.17.0.1:8000",
            "172.17.0.2:80",
            "10.99.0.2:7777",
            "203.0.114.2:7777",
            "100.100.100.200:7777",
            "168.63.129.16:7777",
            "100.64.7.7:7777",
        ];
        reaches_none(&agent, "sb-1", &closed).await;
        agent.stop().await;

        // The operator opens a range; the host stays closed, also by way of a published port.
        let agent = start(data.path(), ceiling(EgressLimit::Public, &["10.99.0.0/24"])).await;
        reaches(&agent, "sb-1", "10.99.0.2:7777").await;
        reaches_none(
            &agent,
            "sb-1",
            &["10.99.0.1:8000", "10.99.0.1:8080", "172.17.0.2:80"],
        )
        .await;
        agent.stop().await;
        let agent = start(data.path(), ceiling(EgressLimit::Any, &[])).await;
        for open in ["172.17.0.2:80", "100.64.7.7:7777", "203.0.114.2:7777"] {
            reaches(&agent, "sb-1", open).await;
        }
        let host = [
            "10.99.0.1:8000",
            "10.99.0.1:8080",
            "172.17.0.1:8000",
            "203.0.114.1:8080",
        ];
        reaches_none(&agent, "sb-1", &host).await;
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn a_request_cannot_exceed_the_operators_ceiling() {
    on_private_host(async || {
        make_internet();
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        create(&agent, "sb-old").await;
        let public = format!("{PUBLIC}:7777");
        reaches(&agent, "sb-old", &public).await;
        let listed = |entry: &str| pb::NetworkPolicy {
            allow: vec![entry.to_owned()],
            ..Default::default()
        };
        let refused = async |agent: &TestAgent, egress: pb::Egress, network: pb::NetworkPolicy| {
            let create = pb::CreateSandboxRequest {
                egress: egress.into(),
                network: network.clone().into(),
                ..agent::request("sb-new")
            };
            let created = agent
                .create_with(create)
                .await
                .expect_err("above the ceiling");
            let update = pb::UpdateNetworkRequest {
                id: "sb-old".to_owned(),
                egress: egress.into(),
                network: network.into(),
                ..Default::default()
            };
            let updated = agent.client.update_network(update).await;
            let updated = updated.expect_err("above the ceiling");
            for error in [&created, &updated] {
                assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
                assert!(
                    error.to_string().contains("operator of this host"),
                    "{error}"
                );
            }
            created.to_string()
        };
        let deny = pb::Egress::EGRESS_DENY;
        let error = refused(&agent, deny, listed("10.99.0.2")).await;
        assert!(
            error.contains("`10.99.0.2/32`") && error.contains("WRENN_EGRESS_OPEN"),
            "{error}"
        );
        agent.stop().await;

        // The ceiling is lowered: a sandbox that exists keeps running, below it.
        let agent = start(data.path(), ceiling(EgressLimit::Never, &[])).await;
        is_out_of_reach(&agent, "sb-old", &public).await;
        let error = refused(&agent, pb::Egress::EGRESS_ALLOW, listed("10.99.0.2")).await;
        assert!(error.contains("`egress`"), "{error}");
        agent.create("sb-new").await.expect("asks for nothing");
        agent.destroy("sb-new").await.expect("destroyed");
        agent.stop().await;

        // And raised again.
        let agent = start(
            data.path(),
            ceiling(EgressLimit::Never, &["93.184.216.0/24"]),
        )
        .await;
        reaches(&agent, "sb-old", &public).await;
        agent.destroy("sb-old").await.expect("destroyed");
        agent.stop().await;

        let config = AgentConfig {
            default_egress: true,
            egress_ceiling: ceiling(EgressLimit::Never, &[]),
            ..agent::config(data.path())
        };
        let refusal = TestAgent::refusal_of(config).await;
        assert!(refusal.contains("WRENN_EGRESS_LIMIT"), "{refusal}");
    });
}

#[test]
fn a_firewall_that_blocks_is_named_in_the_sandboxs_warning() {
    on_private_host(async || {
        make_internet();
        nft("add table ip filter");
        nft("add chain ip filter DOCKER-USER");
        nft(
            "add chain ip filter FORWARD { type filter hook forward priority filter; policy drop; }",
        );
        nft("add rule ip filter FORWARD jump DOCKER-USER");
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        let public = format!("{PUBLIC}:7777");
        let made = create(&agent, "sb-1").await;
        assert!(
            made.warning.contains("Docker (chain FORWARD"),
            "{}",
            made.warning
        );
        assert!(
            made.warning.contains("iptables -I DOCKER-USER"),
            "{}",
            made.warning
        );
        is_out_of_reach(&agent, "sb-1", &public).await;
        let closed = agent.create("sb-2").await.expect("made");
        assert_eq!(closed.warning, "", "without egress, nothing is blocked");

        // What the command in the warning does.
        nft(r#"insert rule ip filter DOCKER-USER iifname "wrenn-v*" accept"#);
        nft(r#"insert rule ip filter DOCKER-USER oifname "wrenn-v*" accept"#);
        reaches(&agent, "sb-1", &public).await;
        assert_eq!(create(&agent, "sb-3").await.warning, "");
        for id in ["sb-1", "sb-2", "sb-3"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn a_nameserver_on_the_lan_is_used_directly_and_only_for_names() {
    on_private_host(async || {
        make_internet();
        echo_udp("/run/netns/world", "0.0.0.0:53");
        serve_tcp("/run/netns/world", "0.0.0.0:53");
        let data = tempfile::tempdir().expect("a directory");
        let config = AgentConfig {
            egress_ceiling: EgressCeiling::default(),
            dns: vec![[10, 99, 0, 2].into()],
            ..agent::config(data.path())
        };
        let agent = TestAgent::start_with(config, deadlines()).await;
        create(&agent, "sb-open").await;
        agent.create("sb-closed").await.expect("made");
        assert_eq!(
            agent.spec("sb-open").dns,
            [std::net::Ipv4Addr::new(10, 99, 0, 2)]
        );
        assert!(agent.spec("sb-open").dns_upstreams.is_empty());
        assert!(agent.spec("sb-closed").dns.is_empty());
        assert!(echoes(&agent, "sb-open", "10.99.0.2:53").await);
        reaches(&agent, "sb-open", "10.99.0.2:53").await;
        reaches_none(&agent, "sb-open", &["10.99.0.2:7777", "10.99.0.3:53"]).await;
        assert!(!echoes(&agent, "sb-closed", "10.99.0.2:53").await);
        for id in ["sb-open", "sb-closed"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn a_nameserver_on_loopback_is_used_through_the_gateway() {
    on_private_host(async || {
        make_internet();
        let data = tempfile::tempdir().expect("a directory");
        let config = AgentConfig {
            dns: vec![[127, 0, 0, 53].into()],
            ..agent::config(data.path())
        };
        let agent = TestAgent::start_with(config, deadlines()).await;
        create(&agent, "sb-open").await;
        agent.create("sb-closed").await.expect("made");
        let spec = agent.spec("sb-open");
        assert_eq!(spec.dns, [wrenn_proto::guest::GATEWAY_IP]);
        assert_eq!(
            spec.dns_upstreams,
            [std::net::IpAddr::from([127, 0, 0, 53])]
        );
        assert!(agent.spec("sb-closed").dns_upstreams.is_empty());
        // In place of the supervisor's forwarder.
        for slot in [1, 2] {
            let netns = format!("/run/netns/wrenn-ns-{slot}");
            echo_udp(&netns, "169.254.0.22:53");
            serve_tcp(&netns, "169.254.0.22:53");
        }
        assert!(echoes(&agent, "sb-open", "169.254.0.22:53").await);
        reaches(&agent, "sb-open", "169.254.0.22:53").await;
        assert!(!echoes(&agent, "sb-closed", "169.254.0.22:53").await);
        is_out_of_reach(&agent, "sb-closed", "169.254.0.22:53").await;
        let update = pb::UpdateNetworkRequest {
            id: "sb-open".to_owned(),
            egress: pb::Egress::EGRESS_DENY.into(),
            ..Default::default()
        };
        agent.client.update_network(update).await.expect("changed");
        assert!(!echoes(&agent, "sb-open", "169.254.0.22:53").await);
        for id in ["sb-open", "sb-closed"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn packets_fit_through_a_narrow_uplink() {
    on_private_host(async || {
        make_internet();
        // The other end does not know of the smaller packets, and nobody tells it.
        ip(&["link", "set", "to-world", "mtu", "1400"]);
        let listener = inside("/run/netns/world", || {
            TcpListener::bind("0.0.0.0:7779").expect("bound")
        });
        std::thread::spawn(move || {
            for mut connection in listener.incoming().flatten() {
                let size = getsockopt(&connection, TcpMaxSeg).expect("a size");
                let _ = std::io::Write::write_all(&mut connection, format!("{size}\n").as_bytes());
            }
        });
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        create(&agent, "sb-1").await;
        assert_eq!(agent.spec("sb-1").network.mtu, 1400);
        for netns in [
            &["-o", "link", "show", "wrenn-v1"][..],
            &["-n", "wrenn-ns-1", "link", "show", "eth0"],
        ] {
            assert!(ip(netns).contains("mtu 1400"), "{}", ip(netns));
        }
        // The guest here uses packets of 1500 bytes, like one of an older release.
        let heard = receives(&agent, "sb-1", &format!("{PUBLIC}:7779")).await;
        let size: u32 = heard.expect("reached").trim().parse().expect("a number");
        assert!((1300..=1360).contains(&size), "{size}");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn subnets_avoid_the_hosts_routes_and_running_sandboxes_keep_theirs() {
    on_private_host(async || {
        make_internet();
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        let before = Footprint::now();
        assert_eq!(create(&agent, "sb-1").await.host_ip, "10.11.0.1");
        agent.stop().await;

        // The host joins a network with these addresses.
        ip(&["route", "add", "10.11.128.0/24", "via", "10.99.0.2"]);
        let public = format!("{PUBLIC}:7777");
        let agent = start(data.path(), EgressCeiling::default()).await;
        let kept = agent
            .wait_for("sb-1", pb::SandboxState::SANDBOX_STATE_RUNNING)
            .await;
        assert_eq!(kept.host_ip, "10.11.0.1");
        assert_eq!(create(&agent, "sb-2").await.host_ip, "10.213.0.2");
        for id in ["sb-1", "sb-2"] {
            reaches(&agent, id, &public).await;
            let done = agent.sh(id, "echo here").await.expect("run");
            assert_eq!(done.stdout, b"here\n");
        }
        reaches_none(&agent, "sb-1", &["10.213.0.2:49983", "10.214.0.5:49983"]).await;
        reaches_none(&agent, "sb-2", &["10.11.0.1:49983", "10.12.0.3:49983"]).await;
        agent.stop().await;

        let with = |guests: &str| AgentConfig {
            subnets: Some(
                Subnets::new(
                    guests.parse().expect("a range"),
                    "10.44.0.0/16".parse().expect("a range"),
                )
                .expect("subnets"),
            ),
            ..agent::config(data.path())
        };
        let refusal = TestAgent::refusal_of(with("10.11.0.0/16")).await;
        assert!(
            refusal.contains("route 10.11.128.0/24 (to-world)"),
            "{refusal}"
        );
        assert!(refusal.contains("WRENN_SUBNETS"), "{refusal}");
        let agent = TestAgent::start_with(with("10.43.0.0/16"), deadlines()).await;
        assert_eq!(create(&agent, "sb-3").await.host_ip, "10.43.0.3");
        for id in ["sb-1", "sb-2", "sb-3"] {
            agent.destroy(id).await.expect("destroyed");
        }
        ip(&["route", "del", "10.11.128.0/24"]);
        assert_eq!(Footprint::now(), before);
        agent.stop().await;
    });
}

#[test]
fn what_another_program_changes_is_restored_and_counted() {
    on_private_host(async || {
        make_internet();
        forward_whole_host(false);
        answer(TcpListener::bind("0.0.0.0:8000").expect("bound"));
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        create(&agent, "sb-1").await;
        agent.create("sb-2").await.expect("made");
        let public = format!("{PUBLIC}:7777");
        reaches(&agent, "sb-1", &public).await;
        let table = || run("nft", &["list", "table", "inet", "wrenn"]);
        let right = table();
        assert_eq!(restored(&agent).await, 0);

        // Changes of other programs' rules are none of the agent's business.
        nft("add table ip other");
        nft("delete table ip other");
        let changes: [&dyn Fn(); 8] = [
            &|| nft("flush ruleset"),
            &|| nft("flush chain inet wrenn prerouting"),
            &|| nft("insert rule inet wrenn forward accept"),
            &|| nft("flush map inet wrenn links"),
            &|| nft("flush chain inet wrenn postrouting"),
            &|| set_forwarding("to-world", false),
            &|| set_forwarding("wrenn-v1", false),
            &|| {
                let rule = run("nft", &["-a", "list", "chain", "inet", "wrenn", "input"]);
                let handle = rule.rsplit_once("# handle ").expect("a rule").1;
                let handle = handle.split_whitespace().next().expect("a number");
                nft(&format!("delete rule inet wrenn input handle {handle}"));
            },
        ];
        for (number, change) in (1..).zip(changes) {
            change();
            until(&format!("restoration {number}"), async || {
                (restored(&agent).await == number).then_some(())
            })
            .await;
            assert_eq!(table(), right, "{number}");
            assert!(forwards("to-world") && forwards("wrenn-v1"), "{number}");
        }
        reaches(&agent, "sb-1", &public).await;
        reaches_none(&agent, "sb-1", &["10.99.0.1:8000", "10.11.0.2:49983"]).await;
        is_out_of_reach(&agent, "sb-2", &public).await;

        // A link that another program gives egress loses it again.
        let links = run("nft", &["list", "map", "inet", "wrenn", "links"]);
        let chain = links
            .split("goto ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let chain = chain.expect("a chain");
        nft(&format!(
            r#"add element inet wrenn links {{ "wrenn-v2" : goto {chain} }}"#
        ));
        until("the last restoration", async || {
            (restored(&agent).await == 9).then_some(())
        })
        .await;
        assert_eq!(table(), right);
        for id in ["sb-1", "sb-2"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn forwarding_is_switched_on_for_the_interfaces_that_need_it_and_off_again() {
    on_private_host(async || {
        make_internet();
        make_container();
        forward_whole_host(false);
        let data = tempfile::tempdir().expect("a directory");
        let agent = start(data.path(), EgressCeiling::default()).await;
        agent.create("sb-closed").await.expect("made");
        assert!(!forwards("wrenn-v1") && !forwards("to-world"));
        create(&agent, "sb-open").await;
        assert!(forwards("wrenn-v2") && forwards("to-world"));
        assert!(!forwards("wrenn-v1") && !forwards("docker0") && !forwards("all"));
        reaches(&agent, "sb-open", &format!("{PUBLIC}:7777")).await;
        // The host is no router for its neighbours, even if they find an interface that forwards.
        set_forwarding("docker0", true);
        let knock = || {
            let address = "172.17.0.2:80".parse().expect("an address");
            std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(1))
                .is_ok()
        };
        ip(&[
            "-n",
            "world",
            "route",
            "add",
            "172.17.0.0/16",
            "via",
            "10.99.0.1",
        ]);
        assert!(!inside("/run/netns/world", knock));

        // Across a restart, also of sandboxes that are adopted.
        agent.stop().await;
        let agent = start(data.path(), EgressCeiling::default()).await;
        reaches(&agent, "sb-open", &format!("{PUBLIC}:7777")).await;
        agent.destroy("sb-open").await.expect("destroyed");
        assert!(!forwards("to-world"));
        agent.destroy("sb-closed").await.expect("destroyed");
        agent.stop().await;

        // A host that forwards anyway keeps doing so.
        forward_whole_host(true);
        let agent = start(data.path(), EgressCeiling::default()).await;
        create(&agent, "sb-open").await;
        assert!(
            inside("/run/netns/world", knock),
            "the host forwards for its containers"
        );
        agent.destroy("sb-open").await.expect("destroyed");
        assert!(forwards("to-world") && forwards("docker0"));
        agent.stop().await;
    });
}

#[test]
fn agents_with_different_ceilings_share_a_host() {
    on_private_host(async || {
        make_internet();
        let data = (
            tempfile::tempdir().expect("one"),
            tempfile::tempdir().expect("two"),
        );
        let open = start(
            data.0.path(),
            ceiling(EgressLimit::Public, &["10.99.0.0/24"]),
        )
        .await;
        let strict = start(data.1.path(), ceiling(EgressLimit::Public, &[])).await;
        create(&open, "sb-open").await;
        create(&strict, "sb-strict").await;
        for (agent, id) in [(&open, "sb-open"), (&strict, "sb-strict")] {
            reaches(agent, id, &format!("{PUBLIC}:7777")).await;
        }
        reaches(&open, "sb-open", "10.99.0.2:7777").await;
        is_out_of_reach(&strict, "sb-strict", "10.99.0.2:7777").await;
        // The rules on the host hold without those of the namespace.
        let accept = [
            "netns",
            "exec",
            "wrenn-ns-2",
            "nft",
            "add rule ip wrenn forward accept",
        ];
        ip(&accept);
        is_out_of_reach(&strict, "sb-strict", "10.99.0.2:7777").await;
        // Both check the same table, and neither takes the other's rules for a change.
        strict.destroy("sb-strict").await.expect("destroyed");
        reaches(&open, "sb-open", "10.99.0.2:7777").await;
        open.destroy("sb-open").await.expect("destroyed");
        assert_eq!((restored(&open).await, restored(&strict).await), (0, 0));
        let table = private_host::run("nft", &["list", "table", "inet", "wrenn"]);
        assert!(!table.contains("agent_"), "{table}");
        open.stop().await;
        strict.stop().await;
    });
}

#[test]
fn without_a_default_route_sandboxes_run_all_the_same() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        create(&agent, "sb-1").await;
        assert_eq!(agent.spec("sb-1").network.mtu, 1500);
        reaches(&agent, "sb-1", "10.99.0.2:7777").await;
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}
