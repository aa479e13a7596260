//! Forwarding of ports that are open only inside the guest.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    raw::call,
    world::{World, run, run_with, wait_for},
};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Maximum time until an open port is forwarded. The contract says two seconds; the test machine
/// may be busy.
const SOON: Duration = Duration::from_secs(10);

/// Server that sends its name on each connection and, once the client has sent everything, echoes
/// the input. Dropping it closes its port.
struct Server {
    listener: Arc<TcpListener>,
}

impl Server {
    fn open(address: IpAddr, port: u16, name: &'static str) -> Self {
        let listener = Arc::new(TcpListener::bind((address, port)).expect("free"));
        let accepting = listener.clone();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                std::thread::spawn(move || echo(stream, name));
            }
        });
        Self { listener }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Unblocks `accept` in the other thread, which then drops the listener as well.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
    }
}

fn echo(mut stream: TcpStream, name: &str) {
    let mut all = Vec::new();
    // The client may have closed the connection.
    let _ = stream.write_all(name.as_bytes());
    let _ = stream.read_to_end(&mut all);
    let _ = stream.write_all(&all);
}

fn outside(port: u16) -> Option<TcpStream> {
    let address = SocketAddr::from((OUTSIDE, port));
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("set");
    Some(stream)
}

/// Returns the name of the server that is reached from outside, or `None`.
fn name_of(port: u16) -> Option<String> {
    let mut stream = outside(port)?;
    stream.shutdown(Shutdown::Write).ok()?;
    let mut name = String::new();
    stream.read_to_string(&mut name).ok()?;
    Some(name).filter(|name| !name.is_empty())
}

/// Waits until a server is reached on a port. Returns how long that took.
fn reached(port: u16, name: &str) -> Duration {
    let begin = Instant::now();
    wait_for(name, || (name_of(port)? == name).then_some(()));
    begin.elapsed()
}

/// Waits until nothing listens on the outside address. A refused connection is not enough, because
/// a forwarder passes a refusal on.
fn closed(world: &World, port: u16) {
    wait_for("the port closes", || {
        (listeners(world, port) == 0).then_some(())
    });
    assert!(outside(port).is_none());
}

/// Number of sockets that listen on a port, on any address, as reported by the kernel in the test
/// environment.
fn listeners(world: &World, port: u16) -> usize {
    let port = format!(":{port:04X} ");
    let table = |path: &str| {
        let table = world.read(path);
        let listens = |line: &&str| {
            line.split_whitespace().nth(3) == Some("0A")
                && line
                    .split_whitespace()
                    .nth(1)
                    .is_some_and(|local| format!("{local} ").ends_with(&port))
        };
        table.lines().filter(listens).count()
    };
    table("/proc/1/net/tcp") + table("/proc/1/net/tcp6")
}

#[test]
fn a_server_inside_is_reached_soon_and_gone_when_it_is_gone() {
    run(async |world| {
        let four = Server::open(V4, 8001, "four");
        let six = Server::open(V6, 8002, "six");
        assert!(reached(8001, "four") < SOON);
        assert!(reached(8002, "six") < SOON);
        assert_eq!((listeners(world, 8001), listeners(world, 8002)), (2, 2));
        drop((four, six));
        closed(world, 8001);
        closed(world, 8002);
    });
}

#[test]
fn a_server_on_both_addresses_has_one_forwarder() {
    run(async |world| {
        let _four = Server::open(V4, 8003, "four");
        let _six = Server::open(V6, 8003, "six");
        reached(8003, "four");
        assert_eq!(listeners(world, 8003), 3);
        // Still true after further scans of the ports.
        let later = Server::open(V4, 8004, "later");
        reached(8004, "later");
        drop(later);
        closed(world, 8004);
        assert_eq!(listeners(world, 8003), 3);
    });
}

#[test]
fn what_is_reachable_already_is_left_alone() {
    run(async |world| {
        let _everyone = Server::open(Ipv4Addr::UNSPECIFIED.into(), 8005, "everyone");
        let direct = Server::open(OUTSIDE.into(), 8006, "direct");
        let _inside = Server::open(V4, 8006, "inside");
        // A scan has taken place once this port is forwarded.
        let _mark = Server::open(V4, 8007, "mark");
        reached(8007, "mark");
        assert_eq!(name_of(8005).as_deref(), Some("everyone"));
        assert_eq!(name_of(8006).as_deref(), Some("direct"));
        assert_eq!((listeners(world, 8005), listeners(world, 8006)), (1, 2));
        // Once the direct server is closed, the inner one is forwarded instead.
        drop(direct);
        reached(8006, "inside");
    });
}

#[test]
fn a_server_that_is_started_again_is_reached_without_a_gap() {
    run(async |_| {
        let mut server = Server::open(V4, 8008, "one");
        reached(8008, "one");
        for name in ["two", "three", "four"] {
            drop(server);
            server = wait_for("the port", || {
                TcpListener::bind((V4, 8008)).ok().map(drop)?;
                Some(Server::open(V4, 8008, name))
            });
            assert!(reached(8008, name) < SOON);
        }
    });
}

#[test]
fn bytes_pass_whole_and_the_end_of_one_way_does_not_end_the_other() {
    run(async |_| {
        let _server = Server::open(V4, 8009, "");
        let mut stream = wait_for("the port", || outside(8009));
        let sent: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut writer = stream.try_clone().expect("cloned");
        let piece = sent.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&piece).expect("sent");
            writer.shutdown(Shutdown::Write).expect("open");
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("all comes");
        writing.join().expect("sent");
        assert!(sent == received);
    });
}

#[test]
fn two_hundred_connections_pass_and_leave_nothing() {
    run(async |world| {
        let _server = Server::open(V4, 8010, "x");
        reached(8010, "x");
        let before = world.descriptors();
        let mut all: Vec<_> = (0..200).filter_map(|_| outside(8010)).collect();
        for stream in &mut all {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("answered");
        }
        assert!(world.descriptors() >= 400, "both ends of each");
        drop(all);
        wait_for("connections to end", || {
            (world.descriptors() <= before + 2).then_some(())
        });
    });
}

fn prepare() -> u16 {
    let head = "POST /snapshot/prepare HTTP/1.1\r\ncontent-type: application/json";
    call(head, br#"{"snapshotId":"s","keepCache":true}"#).status
}

fn recover(body: &str) -> u16 {
    let head = "POST /snapshot/recover HTTP/1.1\r\ncontent-type: application/json";
    call(head, body.as_bytes()).status
}

#[test]
fn nothing_is_forwarded_while_a_machine_is_being_frozen_and_all_is_after() {
    run(async |world| {
        let _server = Server::open(V4, 8011, "x");
        for body in ["{}", r#"{"sandboxId":"sb-2","templateId":"base"}"#] {
            reached(8011, "x");
            let mut open = outside(8011).expect("forwarded");
            let mut byte = [0];
            open.read_exact(&mut byte).expect("answered");
            assert_eq!((prepare(), prepare()), (204, 204));
            // Forwarding has already stopped when the call returns.
            assert!(outside(8011).is_none());
            assert_eq!(listeners(world, 8011), 1);
            let rest = open.read(&mut byte);
            assert!(matches!(rest, Ok(0) | Err(_)), "it was cut: {rest:?}");
            assert_eq!(recover(body), 204);
            assert!(reached(8011, "x") < SOON, "{body}");
        }
        // Recovering without a preceding prepare still leaves one forwarder.
        assert_eq!(recover("{}"), 204);
        assert_eq!(recover(r#"{"sandboxId":"sb-3"}"#), 204);
        reached(8011, "x");
        assert_eq!(listeners(world, 8011), 2);
    });
}

#[test]
fn a_guest_that_keeps_running_keeps_its_connections_and_its_copy_does_not() {
    run(async |_| {
        let _server = Server::open(V4, 8014, "x");
        reached(8014, "x");
        let mut open = outside(8014).expect("forwarded");
        let mut byte = [0];
        open.read_exact(&mut byte).expect("answered");
        for body in ["{}", r#"{"sandboxId":"sb-2","templateId":"base"}"#] {
            let head = "POST /snapshot/prepare HTTP/1.1\r\ncontent-type: application/json";
            let live = br#"{"snapshotId":"s","keepCache":true,"keepsRunning":true}"#;
            assert_eq!(call(head, live).status, 204);
            // New connections are forwarded as well.
            assert!(outside(8014).is_some());
            open.write_all(b"y").expect("still connected");
            assert_eq!(recover(body), 204);
        }
        // The second recover was that of a restored copy.
        let rest = open.read(&mut byte);
        assert!(matches!(rest, Ok(0) | Err(_)), "it was cut: {rest:?}");
    });
}

#[test]
fn an_address_that_is_not_there_yet_is_tried_again() {
    run_with(&["--forward-address", "169.254.0.21"], &[], async |world| {
        let address = |verb: &str| {
            let init = world.init_pid().to_string();
            let words = [
                "-t",
                &init,
                "-n",
                "ip",
                "address",
                verb,
                "169.254.0.21/30",
                "dev",
                "eth0",
            ];
            let done = std::process::Command::new("nsenter").args(words).status();
            assert!(done.expect("nsenter").success());
        };
        address("del");
        let _server = Server::open(V4, 8012, "x");
        let _other = Server::open(V4, 8013, "x");
        assert!(outside(8012).is_none());
        address("add");
        assert!(reached(8012, "x") < SOON);
        assert!(reached(8013, "x") < SOON);
    });
}
