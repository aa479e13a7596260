//! One question to the metadata service, by version 2 of its protocol (Firecracker's MMDS): a token first, then the data.
//! Each request has its own connection: none is left open for a machine to be frozen with.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::metadata::{Metadata, MetadataError};

/// How long a request may take, from its connection to the end of its answer.
const DEADLINE: Duration = Duration::from_secs(1);
/// Longest answer, bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// How long the token is good for, seconds.
const TOKEN_TTL: &str = "60";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// Nobody answers there.
    #[error("the metadata service cannot be reached")]
    Connect(#[source] io::Error),
    /// It does not speak HTTP, or broke off.
    #[error("the metadata service broke off")]
    Http(#[source] hyper::Error),
    /// It is silent.
    #[error("the metadata service did not answer within {DEADLINE:?}")]
    Late,
    /// It does not want to.
    #[error("the metadata service answered {0}")]
    Status(StatusCode),
    /// It says too much.
    #[error("the metadata service's answer is longer than {MAX_ANSWER_BYTES} bytes, or broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Its token is none.
    #[error("the metadata service's token cannot be a header")]
    Token(#[source] http::Error),
    /// Its answer cannot be used.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// Asks for the metadata.
///
/// # Errors
/// See [`AskError`].
pub async fn ask(address: SocketAddr) -> Result<Metadata, AskError> {
    let token = request(address, Method::PUT, "/latest/api/token")
        .header("X-metadata-token-ttl-seconds", TOKEN_TTL);
    let token = send(address, token).await?;
    let data = request(address, Method::GET, "/")
        .header("X-metadata-token", &token[..])
        .header(header::ACCEPT, "application/json");
    Ok(Metadata::parse(&send(address, data).await?)?)
}

fn request(address: SocketAddr, method: Method, path: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, address.ip().to_string())
        .header(header::CONNECTION, "close")
}

async fn send(address: SocketAddr, request: http::request::Builder) -> Result<Bytes, AskError> {
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(AskError::Token)?;
    timeout(DEADLINE, exchange(address, request))
        .await
        .unwrap_or(Err(AskError::Late))
}

async fn exchange(address: SocketAddr, request: Request<Empty<Bytes>>) -> Result<Bytes, AskError> {
    let stream = TcpStream::connect(address)
        .await
        .map_err(AskError::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_ANSWER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(AskError::Http)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(AskError::Http)?;
        if !response.status().is_success() {
            return Err(AskError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
        Ok(body.await.map_err(AskError::Body)?.to_bytes())
    };
    // Both on this task: when it is dropped, nothing of the connection is left.
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection's end may come before its last bytes were taken.
        _ = connection => answer.await,
    }
}
