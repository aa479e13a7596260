//! Silent clients. The tests run on paused time: it advances at once when every task waits for it.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{ID, Setup, get};

#[tokio::test(start_paused = true)]
async fn incomplete_head_times_out_after_ten_seconds() {
    for head in ["", "GET / HTTP/1.1\r\nHost:"] {
        let setup = Setup::new().await;
        let began = Instant::now();
        let stream = tokio::net::TcpStream::connect(setup.address).await.unwrap();
        let mut buffer = [0; 64];
        stream.try_write(head.as_bytes()).unwrap();
        loop {
            stream.readable().await.unwrap();
            match stream.try_read(&mut buffer) {
                Ok(0) | Err(_) if began.elapsed() >= Duration::from_secs(10) => break,
                read => assert!(read.is_err(), "closed after {:?}", began.elapsed()),
            }
        }
        assert!(
            began.elapsed() < Duration::from_secs(12),
            "{:?}",
            began.elapsed()
        );
    }
}

#[tokio::test]
async fn idle_connection_outlives_the_head_deadline() {
    let setup = Setup::new().await;
    setup
        .open(ID, 80)
        .serve(|_| "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_owned());
    let mut client = setup.client().await;
    client.send(&get("/", ID, 80)).await;
    assert_eq!(client.answer().await.status(), 200);
    setup.until_unused().await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(600)).await;
    tokio::time::resume();
    client.send(&get("/", ID, 80)).await;
    assert_eq!(client.answer().await.status(), 200);
}
