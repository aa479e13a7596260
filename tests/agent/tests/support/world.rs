//! External network of a test, and its servers.

use std::{
    fs::File,
    io::Write as _,
    net::{TcpListener, UdpSocket},
};

use nix::sched::{CloneFlags, setns};

use crate::{
    agent::TestAgent,
    private_host::{ip, run},
};

/// Opens a resource in a network namespace.
pub(crate) fn inside<T: Send + 'static>(
    netns: &str,
    open: impl FnOnce() -> T + Send + 'static,
) -> T {
    let netns = File::open(netns).expect("a namespace");
    let run = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).expect("entered");
        open()
    };
    std::thread::spawn(run).join().expect("no panic")
}

/// Answers every connection with the address that it comes from.
pub(crate) fn answer(listener: TcpListener) {
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut connection = connection;
            let from = connection.peer_addr().expect("an address").ip();
            let _ = connection.write_all(format!("you are {from}\n").as_bytes());
        }
    });
}

pub(crate) fn serve_tcp(netns: &str, address: &'static str) {
    answer(inside(netns, move || {
        TcpListener::bind(address).expect("bound")
    }));
}

/// Creates a network outside the host, with a route back to the networks behind the host.
pub(crate) fn make_world() {
    ip(&["netns", "add", "world"]);
    ip(&[
        "link", "add", "to-world", "type", "veth", "peer", "name", "eth0", "netns", "world",
    ]);
    // An address that the link assigns itself a second later would count as a leftover route.
    ip(&["link", "set", "to-world", "addrgenmode", "none"]);
    ip(&["addr", "add", "10.99.0.1/24", "dev", "to-world"]);
    ip(&["link", "set", "to-world", "up"]);
    ip(&["-n", "world", "addr", "add", "10.99.0.2/24", "dev", "eth0"]);
    ip(&["-n", "world", "addr", "add", "10.99.0.3/24", "dev", "eth0"]);
    ip(&["-n", "world", "link", "set", "eth0", "up"]);
    ip(&[
        "-n",
        "world",
        "route",
        "add",
        "10.0.0.0/8",
        "via",
        "10.99.0.1",
    ]);
    serve_tcp("/run/netns/world", "0.0.0.0:7777");
    echo(inside("/run/netns/world", || {
        TcpListener::bind("0.0.0.0:7778").expect("bound")
    }));
}

/// Public address beyond the external network, for [`make_internet`].
pub(crate) const PUBLIC: &str = "93.184.216.34";

/// Creates an external network with the host's default route, on which servers with these addresses
/// answer, too: a public one, the metadata services of Alibaba and Azure, and one that is shared by
/// the customers of a provider.
pub(crate) fn make_internet() {
    make_world();
    ip(&["-n", "world", "link", "set", "lo", "up"]);
    for address in [PUBLIC, "100.100.100.200", "168.63.129.16", "100.64.7.7"] {
        ip(&["-n", "world", "addr", "add", address, "dev", "lo"]);
    }
    ip(&["route", "add", "default", "via", "10.99.0.2"]);
}

/// Creates a container with the address 172.17.0.2, whose port 80 is published as port 8080 of the
/// host, as Docker does.
pub(crate) fn make_container() {
    ip(&["netns", "add", "container"]);
    ip(&[
        "link",
        "add",
        "docker0",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        "container",
    ]);
    ip(&["link", "set", "docker0", "addrgenmode", "none"]);
    ip(&["addr", "add", "172.17.0.1/16", "dev", "docker0"]);
    ip(&["link", "set", "docker0", "up"]);
    let inside = |args: &[&str]| ip(&[&["-n", "container"], args].concat());
    inside(&["addr", "add", "172.17.0.2/16", "dev", "eth0"]);
    inside(&["link", "set", "eth0", "up"]);
    inside(&["route", "add", "default", "via", "172.17.0.1"]);
    serve_tcp("/run/netns/container", "0.0.0.0:80");
    nft("add table ip nat");
    nft("add chain ip nat prerouting { type nat hook prerouting priority dstnat; }");
    nft("add rule ip nat prerouting fib daddr type local tcp dport 8080 dnat to 172.17.0.2:80");
}

/// Applies packet filter rules on the host.
pub(crate) fn nft(rules: &str) {
    run("nft", &[rules]);
}

/// Sends zeros on every connection, until the other end closes it.
pub(crate) fn send_zeros(netns: &str, address: &'static str) {
    let listener = inside(netns, move || TcpListener::bind(address).expect("bound"));
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            std::thread::spawn(move || while connection.write_all(&[0; 65536]).is_ok() {});
        }
    });
}

/// Answers UDP packets with the same packet.
pub(crate) fn echo_udp(netns: &str, address: &'static str) {
    let socket = inside(netns, move || UdpSocket::bind(address).expect("bound"));
    std::thread::spawn(move || {
        let mut packet = [0; 2000];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            let _ = socket.send_to(&packet[..length], from);
        }
    });
}

/// True if a guest gets a UDP packet back from an address. `false` takes a second.
pub(crate) async fn echoes(agent: &TestAgent, id: &str, address: &str) -> bool {
    let (host, port) = address.split_once(':').expect("a port");
    let script =
        format!("bash -c 'exec 3<>/dev/udp/{host}/{port}; echo tick >&3; timeout 1 head -c 5 <&3'");
    let done = agent.sh(id, &script).await.expect("run");
    done.stdout == b"tick\n"
}

/// Sends received data back.
fn echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (&connection, &connection);
                let _ = std::io::copy(&mut from, &mut to);
            });
        }
    });
}

/// Returns the data that a guest receives from an address that should be reachable, or `None`.
pub(crate) async fn receives(agent: &TestAgent, id: &str, address: &str) -> Option<String> {
    receives_within(agent, id, address, 10).await
}

/// Checks that a guest cannot reach an address. Dropped packets time out after one second.
pub(crate) async fn is_out_of_reach(agent: &TestAgent, id: &str, address: &str) {
    let heard = receives_within(agent, id, address, 1).await;
    assert_eq!(heard, None, "{id} reaches {address}");
}

async fn receives_within(
    agent: &TestAgent,
    id: &str,
    address: &str,
    limit_sec: u32,
) -> Option<String> {
    let (host, port) = address.split_once(':').expect("a port");
    let script = format!("timeout {limit_sec} bash -c 'cat < /dev/tcp/{host}/{port}' 2>/dev/null");
    let done = agent.sh(id, &script).await.expect("run");
    (done.exit_code == 0).then(|| String::from_utf8_lossy(&done.stdout).into_owned())
}
