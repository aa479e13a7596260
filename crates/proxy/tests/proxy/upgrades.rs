//! WebSockets and other upgrades.

use tokio::io::AsyncWriteExt as _;

use crate::support::{ID, Setup, get, request};

const UPGRADE: &str =
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n";
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: b\r\n\r\n";

#[tokio::test]
async fn an_upgraded_connection_carries_bytes_both_ways_until_it_is_closed() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&request("GET /ws", ID, 80, UPGRADE)).await;
    let mut guest = port.accept().await;
    let head = guest.head().await.to_ascii_lowercase();
    assert!(
        head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"),
        "{head}"
    );
    // The first bytes arrive together with the response's head.
    guest.send(&format!("{SWITCH}first")).await;
    let head = client.head().await;
    assert!(
        head.starts_with("HTTP/1.1 101") && head.contains("Sec-WebSocket-Accept: b\r\n"),
        "{head}"
    );
    client.until("first").await;
    for n in 0..100 {
        client.send(&format!("ask {n};")).await;
        guest.until(&format!("ask {n};")).await;
        guest.send(&format!("say {n};")).await;
        client.until(&format!("say {n};")).await;
    }
    // The client has closed its side, the guest has not.
    client.io.shutdown().await.unwrap();
    assert!(guest.is_ended().await);
    guest.send("last").await;
    client.until("last").await;
    drop(guest);
    assert!(client.is_ended().await);
    setup.until_unused().await;
}

#[tokio::test]
async fn upgraded_connection_ends_with_its_sandbox() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&request("GET /ws", ID, 80, UPGRADE)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    guest.send(SWITCH).await;
    client.head().await;
    setup.kill_switch.forget(&ID.parse().unwrap());
    assert!(client.is_ended().await && guest.is_ended().await);
    setup.until_unused().await;
}

#[tokio::test]
async fn declined_upgrade_is_a_response() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 80);
    let mut client = setup.client().await;
    client.send(&request("GET /ws", ID, 80, UPGRADE)).await;
    let mut guest = port.accept().await;
    guest.head().await;
    guest.send("HTTP/1.1 426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: other\r\nContent-Length: 2\r\n\r\nno").await;
    let answer = client.answer().await;
    assert!(answer.status() == 426 && answer.body == "no", "{answer:?}");
    assert!(
        answer
            .head
            .to_ascii_lowercase()
            .contains("upgrade: other\r\n"),
        "{answer:?}"
    );
    // The connection can still be used.
    client.send(&get("/", ID, 80)).await;
    guest.head().await;
}

#[tokio::test]
async fn upgrade_is_not_requested_from_the_guest_agent() {
    let setup = Setup::new().await;
    let mut port = setup.open(ID, 49983);
    let mut client = setup.client().await;
    client
        .send(&request(
            "GET /health",
            ID,
            49983,
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n",
        ))
        .await;
    let mut guest = port.accept().await;
    let head = guest.head().await.to_ascii_lowercase();
    assert!(
        !head.contains("upgrade") && !head.contains("http2-settings"),
        "{head}"
    );
    // The guest agent was not asked to switch protocols, so it cannot agree to it.
    guest
        .send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        .await;
    assert_eq!(client.answer().await.status(), 502);
}
