//! The metadata service's connections: few at a time, short, and each with a deadline, for the guest is trusted with nothing.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

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

/// Connections at a time; more wait for their turn in the kernel.
const MAX_CONNECTIONS: usize = 8;

/// How long a connection may take, from its first byte to its end.
const DEADLINE: Duration = Duration::from_secs(5);

/// What of a request is read at most after its answer, so that the answer is not lost with the connection.
const MAX_REST_BYTES: u64 = 64 * 1024;

/// Answers requests until the task is aborted, and all connections with it.
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
                tracing::debug!(%error, "metadata connection lost");
                // An error that stays must not become a busy loop.
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let mmds = mmds.clone();
        connections.spawn(async move {
            let _place = place;
            match timeout(DEADLINE, answer(connection, &mmds)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "metadata connection broke"),
                Err(_) => tracing::debug!("metadata connection took too long"),
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
            // It ended before its request did.
            return Ok(());
        }
        match Request::parse(&head) {
            Ok(None) => {}
            Ok(Some(request)) => {
                let mut mmds = mmds.lock().unwrap_or_else(PoisonError::into_inner);
                break mmds.answer(&request, Instant::now());
            }
            Err(_) => break Response::bad_request(),
        }
    };
    connection.write_all(&response.to_bytes()).await?;
    connection.shutdown().await?;
    // A connection that is closed before all is read takes the answer with it.
    let mut rest = (&mut connection).take(MAX_REST_BYTES);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}
