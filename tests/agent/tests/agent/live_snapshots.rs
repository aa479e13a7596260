//! Snapshots of sandboxes that keep running: what is connected stays connected.

use connectrpc::ErrorCode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use wrenn_proto::{guest, rpc::hostagent::v1 as pb};

use crate::agent::{TOKEN, TestAgent, ask_tunnel, is_alive, on_private_host, until};

const ID: &str = "sb-live";

/// Port of the fake guest's echo server.
const ECHO_PORT: u16 = 7000;

/// Port of the one on the guest's loopback address, which the guest agent forwards.
const LOOPBACK_PORT: u16 = 7100;

/// Number of files above which the chain of a running sandbox is compacted for the caller.
const LONG_CHAIN: usize = 32;

/// Opens a tunnel to a port of the guest.
async fn tunnel(agent: &TestAgent, port: u16) -> Option<TcpStream> {
    let path = format!("/tunnel/{ID}/{port}");
    let (head, connection) = ask_tunnel(agent.address, &path, TOKEN).await.ok()?;
    head.starts_with("HTTP/1.1 101").then_some(connection)
}

/// Checks that an echo server answers on this connection.
async fn echoes(connection: &mut TcpStream, what: &str) {
    connection.write_all(b"ping").await.expect(what);
    let mut answer = [0; 4];
    connection.read_exact(&mut answer).await.expect(what);
    assert_eq!(&answer, b"ping", "{what}");
}

/// Checks that the guest agent answers a request on this connection, which stays open.
async fn answers(connection: &mut TcpStream, what: &str) {
    let request = b"GET /health HTTP/1.1\r\nHost: guest\r\n\r\n";
    connection.write_all(request).await.expect(what);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.expect(what));
    }
    let head = String::from_utf8_lossy(&head);
    assert!(head.starts_with("HTTP/1.1 204"), "{what}: {head}");
}

/// Connections to a guest: to a server, to a forwarded server, and an idle one to the guest agent.
struct Connected {
    server: TcpStream,
    forwarded: TcpStream,
    idle: TcpStream,
}

impl Connected {
    async fn to(agent: &TestAgent) -> Self {
        let forwarded = until("the port is forwarded", async || {
            tunnel(agent, LOOPBACK_PORT).await
        });
        let mut connected = Self {
            forwarded: forwarded.await,
            server: tunnel(agent, ECHO_PORT).await.expect("a tunnel"),
            idle: tunnel(agent, guest::ENVD_PORT).await.expect("a tunnel"),
        };
        connected.check("before").await;
        connected
    }

    async fn check(&mut self, what: &str) {
        echoes(&mut self.server, what).await;
        echoes(&mut self.forwarded, what).await;
        answers(&mut self.idle, what).await;
    }
}

#[test]
fn connections_survive_snapshots_and_forks() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        let mut connected = Connected::to(&agent).await;
        for name in ["one", "two"] {
            agent.snapshot(ID, name).await.expect("snapshot taken");
            connected.check(name).await;
        }
        let fork = pb::ForkSandboxRequest {
            id: ID.to_owned(),
            copy_ids: vec!["sb-copy".to_owned()],
            ..Default::default()
        };
        agent.client.fork_sandbox(fork).await.expect("forked");
        connected.check("fork").await;
        // A failed snapshot disturbs nothing, either.
        let fault = agent.sandbox_dir(ID).join("fault");
        std::fs::write(&fault, "reject-snapshot").expect("written");
        agent.snapshot(ID, "never").await.expect_err("rejected");
        connected.check("a failed snapshot").await;
        std::fs::remove_file(fault).expect("it is there");
        for id in [ID, "sb-copy"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn long_chain_of_a_running_sandbox_restarts_nothing() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        let machine = agent.machine_pid(ID);
        let mut connected = Connected::to(&agent).await;
        let last = LONG_CHAIN + 2;
        for n in 0..=last {
            let snapshot = agent.snapshot(ID, &format!("moment-{n}")).await;
            snapshot.expect("snapshot taken");
        }
        connected.check("many snapshots").await;
        assert!(is_alive(machine));
        assert_eq!(agent.machine_pid(ID), machine);
        // Copies depend on few files, and the sandbox can be paused and resumed.
        let copy = pb::CreateSandboxRequest {
            template: format!("moment-{last}"),
            ..crate::agent::request("sb-copy")
        };
        agent.create_with(copy).await.expect("made");
        let layers = agent.spec("sb-copy").disk_layers.len();
        assert!(layers <= 2, "{layers} layers");
        agent.pause(ID).await.expect("paused");
        agent.resume(ID).await.expect("resumed");
        assert!(agent.spec(ID).disk_layers.len() <= 2);
        for id in [ID, "sb-copy"] {
            agent.destroy(id).await.expect("destroyed");
        }
        agent.stop().await;
    });
}

#[test]
fn pause_closes_what_a_snapshot_keeps() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create(ID).await.expect("made");
        let mut connected = Connected::to(&agent).await;
        agent.snapshot(ID, "one").await.expect("snapshot taken");
        agent.pause(ID).await.expect("paused");
        let mut rest = Vec::new();
        // The end of the stream, or a reset.
        let _ = connected.forwarded.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        let error = agent.sh(ID, "true").await.expect_err("paused");
        assert_eq!(error.code, ErrorCode::FailedPrecondition, "{error}");
        agent.destroy(ID).await.expect("destroyed");
        agent.stop().await;
    });
}
