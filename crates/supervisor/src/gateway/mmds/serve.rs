//! Connections of the metadata service. Their number and duration are limited, because the guest is
//! not trusted.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    Mmds,
    http::{MAX_HEAD_BYTES, Request, Response},
};

/// Maximum number of concurrent connections. Further connections wait in the kernel.
const MAX_CONNECTIONS: usize = 8;

/// Maximum duration of a connection, from its first byte to its end.
const DEADLINE: Duration = Duration::from_secs(5);

/// Maximum number of request bytes to read after the response, so that the response is not lost
/// when the connection is closed.
const MAX_REST_BYTES: u64 = 64 * 1024;

/// Answers requests until the task is aborted. The abort closes all connections.
pub(crate) async fn serve(listener: TcpListener, mmds: Mmds) {
    let mmds = Arc::new(Mutex::new(mmds));
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::debug!(%error, "failed to accept a metadata connection");
                // A persistent error must not cause a busy loop.
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let mmds = mmds.clone();
        connections.spawn(async move {
            let _place = place;
            match timeout(DEADLINE, answer(connection, &mmds)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "metadata connection failed"),
                Err(_) => tracing::debug!("metadata connection timed out"),
            }
        });
    }
}

async fn answer(mut connection: TcpStream, mmds: &Mutex<Mmds>) -> io::Result<()> {
    let mut head = Vec::with_capacity(512);
    let response = loop {
        let room = MAX_HEAD_BYTES.saturating_sub(head.len()).max(1);
        let mut limited = (&mut connection).take(room as u64);
        if limited.read_buf(&mut head).await? == 0 {
            // The connection ended before the request was complete.
            return Ok(());
        }
        match Request::parse(&head) {
            Ok(None) => {}
            Ok(Some(request)) => {
                let mut mmds = mmds.lock();
                break mmds.answer(&request, Instant::now());
            }
            Err(_) => break Response::bad_request(),
        }
    };
    connection.write_all(&response.to_bytes()).await?;
    connection.shutdown().await?;
    // Closing a connection with unread data discards the response.
    let mut rest = (&mut connection).take(MAX_REST_BYTES);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}
