//! Answer to clients that get no connection, because their peer has too many.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Semaphore,
};

/// Maximum number of clients that are being answered. Further ones are disconnected at once.
const AT_ONCE: usize = 64;

/// Maximum time of an answer.
const TIMEOUT: Duration = Duration::from_secs(1);

const MESSAGE: &str = "too many connections from this address";

/// Answers that are being sent.
#[derive(Debug, Clone)]
pub(crate) struct Rejections(Arc<Semaphore>);

impl Rejections {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }

    /// Answers 429 and closes the connection, in a task of its own.
    pub(crate) fn reject(&self, stream: TcpStream) {
        let Ok(permit) = Arc::clone(&self.0).try_acquire_owned() else {
            return;
        };
        tokio::spawn(async move {
            let _permit = permit;
            let _ = tokio::time::timeout(TIMEOUT, answer(stream)).await;
        });
    }
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let length = MESSAGE.len();
    let head = format!(
        "HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nRetry-After: 1\r\n\
         Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\r\n{MESSAGE}"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.shutdown().await?;
    // A close with unread data would be a reset, which may overtake the answer.
    let mut unread = [0; 4096];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}
