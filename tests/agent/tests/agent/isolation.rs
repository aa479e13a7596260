//! Reachability between guest, gateway, host, other sandboxes and external networks. Real packets
//! through the sandboxes' networks.

use std::{
    io::Read as _,
    net::{TcpListener, UdpSocket},
};

use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host::ip,
    world::{self, answer, inside, make_world, receives, serve_tcp},
};

async fn create(agent: &TestAgent, id: &str, egress: pb::Egress) -> String {
    let request = pb::CreateSandboxRequest {
        egress: egress.into(),
        ..agent::request(id)
    };
    agent.create_with(request).await.expect("made").host_ip
}

async fn is_out_of_reach(agent: &TestAgent, id: &str, addresses: &[&str]) {
    for address in addresses {
        world::is_out_of_reach(agent, id, address).await;
    }
}

#[test]
fn guest_reaches_only_permitted_addresses() {
    on_private_host(async || {
        make_world();
        let host_service = TcpListener::bind("0.0.0.0:8000").expect("bound");
        answer(host_service);
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let closed = create(&agent, "sb-closed", pb::Egress::EGRESS_UNSPECIFIED).await;
        let open = create(&agent, "sb-open", pb::Egress::EGRESS_ALLOW).await;
        let other = create(&agent, "sb-other", pb::Egress::EGRESS_ALLOW).await;
        assert_eq!(
            [&*closed, &*open, &*other],
            ["10.11.0.1", "10.11.0.2", "10.11.0.3"]
        );
        assert!(agent.spec("sb-closed").dns.is_empty());
        assert_eq!(agent.spec("sb-open").dns.len(), 1);

        // External network: only a permitted sandbox, and with the host's address.
        let heard = receives(&agent, "sb-open", "10.99.0.2:7777").await;
        assert_eq!(heard.as_deref(), Some("you are 10.99.0.1\n"));
        is_out_of_reach(&agent, "sb-closed", &["10.99.0.2:7777"]).await;

        // The host, at any of its addresses, its links and its loopback: no sandbox.
        let host = [
            "10.99.0.1:8000",
            "10.12.0.2:8000",
            "10.12.0.4:8000",
            "127.0.0.1:8000",
        ];
        is_out_of_reach(&agent, "sb-open", &host).await;
        is_out_of_reach(&agent, "sb-closed", &host).await;

        // Other sandboxes, by either address: no sandbox.
        let others = [
            "10.11.0.3:49983",
            "10.12.0.7:49983",
            "10.11.0.1:49983",
            "10.12.0.3:49983",
        ];
        is_out_of_reach(&agent, "sb-open", &others).await;
        is_out_of_reach(&agent, "sb-closed", &["10.11.0.2:49983", "10.12.0.5:49983"]).await;

        // A sandbox from the external network: never. From the host: always, since the agent
        // depends on it.
        let knock = |limit_sec| {
            std::net::TcpStream::connect_timeout(
                &"10.11.0.2:49983".parse().expect("an address"),
                std::time::Duration::from_secs(limit_sec),
            )
        };
        assert!(inside("/run/netns/world", move || knock(1)).is_err());
        assert!(knock(10).is_ok());

        for id in ["sb-closed", "sb-open", "sb-other"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn guest_reaches_only_time_and_metadata_of_its_gateway() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        create(&agent, "sb-1", pb::Egress::EGRESS_ALLOW).await;
        let netns = "/run/netns/wrenn-ns-1";
        for address in ["0.0.0.0:80", "0.0.0.0:81", "0.0.0.0:49983"] {
            serve_tcp(netns, address);
        }
        let time = inside(netns, || UdpSocket::bind("0.0.0.0:123").expect("bound"));
        let other = inside(netns, || UdpSocket::bind("0.0.0.0:124").expect("bound"));
        for socket in [time, other] {
            std::thread::spawn(move || {
                let mut packet = [0; 100];
                while let Ok((length, from)) = socket.recv_from(&mut packet) {
                    let _ = socket.send_to(&packet[..length], from);
                }
            });
        }
        let echoes = async |port: u16, limit_sec: u32| {
            let script = format!(
                "bash -c 'exec 3<>/dev/udp/169.254.0.22/{port}; echo tick >&3; timeout {limit_sec} head -c 5 <&3'"
            );
            let done = agent.sh("sb-1", &script).await.expect("run");
            done.stdout == b"tick\n"
        };
        assert!(echoes(123, 10).await, "no time");
        assert!(!echoes(124, 1).await);
        let metadata = receives(&agent, "sb-1", "169.254.169.254:80").await;
        assert_eq!(metadata.as_deref(), Some("you are 169.254.0.21\n"));
        let closed = [
            "169.254.169.254:81",
            "169.254.0.22:80",
            "169.254.0.22:81",
            "10.12.0.3:81",
        ];
        is_out_of_reach(&agent, "sb-1", &closed).await;
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

/// A guest that assigns itself another address reaches nothing with it.
#[test]
fn packets_with_a_spoofed_address_are_dropped() {
    on_private_host(async || {
        make_world();
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        create(&agent, "sb-liar", pb::Egress::EGRESS_ALLOW).await;
        create(&agent, "sb-victim", pb::Egress::EGRESS_ALLOW).await;
        assert!(
            receives(&agent, "sb-liar", "10.99.0.2:7777")
                .await
                .is_some()
        );
        let lie = "ip addr add 10.12.0.5/32 dev eth0 && ip route replace default via 169.254.0.22 src 10.12.0.5";
        let done = agent.sh("sb-liar", lie).await.expect("run");
        assert_eq!(
            done.exit_code,
            0,
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        is_out_of_reach(&agent, "sb-liar", &["10.99.0.2:7777"]).await;
        agent.destroy("sb-liar").await.expect("destroyed");
        agent.destroy("sb-victim").await.expect("destroyed");
        agent.stop().await;
    });
}

/// The rules on the host are a second barrier: they hold even without those in the namespace.
#[test]
fn host_rules_hold_without_the_rules_of_the_namespace() {
    on_private_host(async || {
        make_world();
        answer(TcpListener::bind("0.0.0.0:8000").expect("bound"));
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        create(&agent, "sb-closed", pb::Egress::EGRESS_DENY).await;
        create(&agent, "sb-open", pb::Egress::EGRESS_ALLOW).await;
        for slot in [1, 2] {
            let netns = format!("wrenn-ns-{slot}");
            let flush = [
                "netns",
                "exec",
                &netns,
                "nft",
                "add rule ip wrenn forward accept",
            ];
            ip(&flush);
        }
        assert!(
            receives(&agent, "sb-open", "10.99.0.2:7777")
                .await
                .is_some()
        );
        is_out_of_reach(&agent, "sb-closed", &["10.99.0.2:7777", "10.11.0.2:49983"]).await;
        is_out_of_reach(
            &agent,
            "sb-open",
            &["10.99.0.1:8000", "10.11.0.1:49983", "10.12.0.2:8000"],
        )
        .await;
        agent.destroy("sb-closed").await.expect("destroyed");
        agent.destroy("sb-open").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn external_network_of_the_tests_answers_the_host() {
    on_private_host(async || {
        make_world();
        let mut stream = std::net::TcpStream::connect("10.99.0.2:7777").expect("reached");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("read");
        assert_eq!(text, "you are 10.99.0.1\n");
    });
}
