//! External network of a test, and its servers.

use std::{fs::File, io::Write as _, net::TcpListener};

use nix::sched::{CloneFlags, setns};

use crate::{agent::TestAgent, private_host::ip};

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
