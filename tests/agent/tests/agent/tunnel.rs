//! Tunnels to ports of guests: bytes in both directions, rejections, and their end with the
//! sandbox.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::{
    agent::{self, TestAgent, on_private_host},
    private_host,
};

/// Port of the echo server in the fake guest.
const ECHO: &str = "7000";

/// Attempts of a timing check. A code path that waits for a timeout is slow every time; a busy host
/// is slow only sometimes.
const ATTEMPTS: usize = 5;

/// Requests a tunnel. Returns the head of the response and the connection behind it.
async fn ask(agent: &TestAgent, path: &str, token: &str) -> (String, TcpStream) {
    let asked = agent::ask_tunnel(agent.address, path, token).await;
    asked.expect("an answer")
}

async fn tunnel(agent: &TestAgent, id: &str) -> TcpStream {
    let (head, connection) = ask(agent, &format!("/tunnel/{id}/{ECHO}"), agent::TOKEN).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    connection
}

/// Returns status and JSON body of a rejection.
async fn refusal(agent: &TestAgent, path: &str) -> (u16, serde_json::Value) {
    let (head, mut connection) = ask(agent, path, agent::TOKEN).await;
    let body = agent::read_body(&head, &mut connection).await;
    let status = head.split(' ').nth(1).expect("a status");
    (status.parse().expect("a number"), body)
}

async fn echoes(connection: &mut TcpStream, text: &[u8]) {
    connection.write_all(text).await.expect("sent");
    let mut back = vec![0; text.len()];
    connection.read_exact(&mut back).await.expect("echoed");
    assert_eq!(back, text);
}

/// Checks that the connection ends soon and carries no more data.
async fn ends(mut connection: TcpStream) {
    let mut rest = Vec::new();
    let end = connection.read_to_end(&mut rest);
    // A reset is an end as well.
    let _ = tokio::time::timeout(Duration::from_secs(20), end)
        .await
        .expect("the tunnel is cut");
    assert!(rest.is_empty());
}

#[test]
fn tunnel_carries_bytes_in_both_directions_after_a_half_close() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        let mut first = tunnel(&agent, "sb-1").await;
        let mut second = tunnel(&agent, "sb-1").await;
        echoes(&mut first, b"one").await;
        echoes(&mut second, &vec![7; 300_000]).await;
        first.write_all(b"last bytes").await.expect("sent");
        first.shutdown().await.expect("half-closed");
        let mut back = String::new();
        first.read_to_string(&mut back).await.expect("echoed");
        assert_eq!(back, "last bytes");
        echoes(&mut second, b"two").await;
        agent.destroy("sb-1").await.expect("destroyed");
        ends(second).await;
        agent.stop().await;
    });
}

#[test]
fn bytes_sent_with_the_request_reach_the_port() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        let mut connection = TcpStream::connect(agent.address).await.expect("connected");
        let request = format!(
            "GET /tunnel/sb-1/{ECHO} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {}\r\n\
             Connection: upgrade\r\nUpgrade: wrenn-tunnel\r\n\r\nearly",
            agent::TOKEN
        );
        let sent = connection.write_all(request.as_bytes()).await;
        sent.expect("sent");
        connection.shutdown().await.expect("half-closed");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.expect("read");
        assert!(answer.ends_with("\r\n\r\nearly"), "{answer}");
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn rejected_tunnel_has_status_and_code() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        for (path, status, code) in [
            ("/tunnel/sb-none/80", 404, "not_found"),
            ("/tunnel/nonsense!/80", 404, "not_found"),
            ("/tunnel/sb-1/0", 400, "invalid_argument"),
            ("/tunnel/sb-1/65536", 400, "invalid_argument"),
            ("/tunnel/sb-1/7001", 502, "port_closed"),
        ] {
            for attempt in 1..=ATTEMPTS {
                let began = Instant::now();
                let (told, body) = refusal(&agent, path).await;
                let took = began.elapsed();
                assert_eq!(
                    (told, &body["code"]),
                    (status, &code.into()),
                    "{path}: {body}"
                );
                assert!(body["message"].is_string());
                if took < Duration::from_secs(1) {
                    break;
                }
                assert!(attempt < ATTEMPTS, "{path}: {took:?}");
            }
        }
        let (head, _) = ask(&agent, "/tunnel/sb-1/7000", "wrong").await;
        assert!(head.starts_with("HTTP/1.1 401"), "{head}");
        agent.pause("sb-1").await.expect("paused");
        let (status, body) = refusal(&agent, "/tunnel/sb-1/7000").await;
        assert_eq!(
            (status, &body["code"]),
            (409, &"failed_precondition".into())
        );
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn tunnel_to_a_silent_port_times_out_after_three_seconds() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        let drop = "insert rule ip wrenn forward tcp dport 7002 drop";
        private_host::ip(&["netns", "exec", "wrenn-ns-1", "nft", drop]);
        let began = Instant::now();
        let (status, body) = refusal(&agent, "/tunnel/sb-1/7002").await;
        assert_eq!((status, &body["code"]), (502, &"port_closed".into()));
        let took = began.elapsed();
        // The kernel would keep trying for minutes.
        assert!(took > Duration::from_secs(2) && took < Duration::from_secs(20));
        agent.destroy("sb-1").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn pause_closes_tunnels_at_once_and_a_resumed_sandbox_accepts_new_ones() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        agent.create("sb-1").await.expect("made");
        for attempt in 1..=ATTEMPTS {
            let seen = agent.find("sb-1").await.expect("there").last_active_unix_ms;
            let mut open = Vec::new();
            for _ in 0..20 {
                open.push(tunnel(&agent, "sb-1").await);
            }
            let now = agent.find("sb-1").await.expect("there").last_active_unix_ms;
            assert_eq!(now, seen, "a tunnel does not count as activity");
            let began = Instant::now();
            agent.pause("sb-1").await.expect("paused");
            let took = began.elapsed();
            for connection in open {
                ends(connection).await;
            }
            agent.resume("sb-1").await.expect("resumed");
            // Calls in progress would get two seconds.
            if took < Duration::from_secs(2) {
                break;
            }
            assert!(attempt < ATTEMPTS, "a tunnel delayed the pause: {took:?}");
        }
        let mut again = tunnel(&agent, "sb-1").await;
        echoes(&mut again, b"here").await;
        agent.destroy("sb-1").await.expect("destroyed");
        ends(again).await;
        agent.stop().await;
    });
}

#[test]
fn tunnels_end_with_their_sandbox_or_agent() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let mut agent = TestAgent::start(data.path()).await;
        agent.create("sb-lost").await.expect("made");
        agent.create("sb-stays").await.expect("made");
        let lost = tunnel(&agent, "sb-lost").await;
        let mut stays = tunnel(&agent, "sb-stays").await;
        agent::kill_9(agent.supervisor_pid("sb-lost"));
        ends(lost).await;
        echoes(&mut stays, b"unharmed").await;
        for attempt in 1..=ATTEMPTS {
            let began = Instant::now();
            agent.stop().await;
            ends(stays).await;
            let took = began.elapsed();
            agent = TestAgent::start(data.path()).await;
            stays = tunnel(&agent, "sb-stays").await;
            echoes(&mut stays, b"adopted").await;
            if took < Duration::from_secs(4) {
                break;
            }
            assert!(attempt < ATTEMPTS, "a tunnel delayed the agent: {took:?}");
        }
        agent.destroy("sb-stays").await.expect("destroyed");
        agent.destroy("sb-lost").await.expect("destroyed");
        agent.stop().await;
    });
}

#[test]
fn sandbox_keeps_its_guest_token_and_copies_have_their_own() {
    on_private_host(async || {
        let data = tempfile::tempdir().expect("a directory");
        let agent = TestAgent::start(data.path()).await;
        let token = agent.create("sb-1").await.expect("made").envd_token;
        assert_eq!((token.len(), &token), (64, &agent.spec("sb-1").envd_token));
        let fork = pb::ForkSandboxRequest {
            id: "sb-1".to_owned(),
            copy_ids: vec!["sb-2".to_owned()],
            ..Default::default()
        };
        let copies = agent.client.fork_sandbox(fork).await.expect("forked");
        let copy = copies.into_owned().copies.remove(0).envd_token;
        assert!(copy != token && copy.len() == 64);
        agent.pause("sb-1").await.expect("paused");
        agent.stop().await;
        let agent = TestAgent::start(data.path()).await;
        let of = async |id: &str| agent.find(id).await.expect("listed").envd_token;
        assert_eq!((of("sb-1").await, of("sb-2").await), (token.clone(), copy));
        let request = pb::ResumeSandboxRequest {
            id: "sb-1".to_owned(),
            ..Default::default()
        };
        let resumed = agent.client.resume_sandbox(request).await.expect("resumed");
        assert_eq!(resumed.into_owned().sandbox.envd_token, token);
        agent.destroy("sb-1").await.expect("destroyed");
        agent.destroy("sb-2").await.expect("destroyed");
        agent.stop().await;
    });
}
