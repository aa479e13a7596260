//! Streams through an agent, which is a socket with scripted responses.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use wrenn_proxy::{AgentTunnel, DialError, InvalidAgentUrl};

use crate::support::{ID, Wire};

/// Starts an agent that answers one request with `answer`, and then echoes.
async fn agent(answer: &'static str) -> (AgentTunnel, tokio::task::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut wire = Wire::new(stream);
        let head = wire.head().await;
        wire.send(answer).await;
        let (mut read, mut write) = wire.io.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        head
    });
    (AgentTunnel::new(&url, "t0ken").unwrap(), asked)
}

#[tokio::test]
async fn tunnel_is_requested_with_the_token_and_carries_bytes() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: wrenn-tunnel\r\n\r\nearly";
    let (tunnel, asked) = agent(switch).await;
    let mut io = tunnel.dial(&ID.parse().unwrap(), 8080).await.unwrap();
    io.write_all(b" late").await.unwrap();
    io.shutdown().await.unwrap();
    let mut all = String::new();
    io.read_to_string(&mut all).await.unwrap();
    assert_eq!(all, "early late");
    let head = asked.await.unwrap().to_ascii_lowercase();
    assert!(
        head.starts_with(&format!("get /tunnel/{ID}/8080 http/1.1\r\n")),
        "{head}"
    );
    for line in [
        "authorization: bearer t0ken",
        "connection: upgrade",
        "upgrade: wrenn-tunnel",
    ] {
        assert!(head.contains(&format!("{line}\r\n")), "{head}");
    }
}

#[tokio::test]
async fn rejections_of_the_agent_are_mapped() {
    async fn error_of(answer: &'static str) -> DialError {
        let (tunnel, _) = agent(answer).await;
        tunnel
            .dial(&ID.parse().unwrap(), 80)
            .await
            .expect_err("no tunnel")
    }
    let closed = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 37\r\n\r\n{\"code\":\"port_closed\",\"message\":\"no\"}";
    assert_eq!(error_of(closed).await, DialError::PortClosed);
    let unknown = "HTTP/1.1 404 Not Found\r\nContent-Length: 35\r\n\r\n{\"code\":\"not_found\",\"message\":\"no\"}";
    assert_eq!(error_of(unknown).await, DialError::NotRunning);
    let paused = "HTTP/1.1 409 Conflict\r\nContent-Length: 37\r\n\r\n{\"code\":\"failed_precondition\"}       ";
    assert_eq!(error_of(paused).await, DialError::NotRunning);
    let many = "HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(error_of(many).await, DialError::TooMany);
    // An agent without support for tunnels.
    let old = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    assert!(matches!(error_of(old).await, DialError::Host(_)));
    assert!(matches!(
        error_of("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n").await,
        DialError::Host(_)
    ));
    assert!(matches!(
        error_of("what?\r\n\r\n").await,
        DialError::Host(_)
    ));
}

#[tokio::test]
async fn unreachable_agent_is_reported() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let tunnel = AgentTunnel::new(&url, "t").unwrap();
    let error = tunnel
        .dial(&ID.parse().unwrap(), 80)
        .await
        .expect_err("no agent");
    assert!(matches!(error, DialError::Host(_)), "{error}");
    assert!(matches!(
        AgentTunnel::new("https://x", "t"),
        Err(InvalidAgentUrl::Url(_))
    ));
    assert!(matches!(
        AgentTunnel::new("http://x", "a\nb"),
        Err(InvalidAgentUrl::Token)
    ));
}
