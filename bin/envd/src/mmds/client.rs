//! Request to the metadata service, by version 2 of its protocol (Firecracker's MMDS): first a
//! token, then the data. Each request uses its own connection, so that no open connection becomes
//! part of a snapshot.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::metadata::{Metadata, MetadataError};

/// Maximum time for a request, from connecting to the end of the response.
const DEADLINE: Duration = Duration::from_secs(1);
/// Maximum size of a response, in bytes.
const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// Lifetime of the token, in seconds.
const TOKEN_TTL: &str = "60";

/// Failure of a request to the metadata service.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The service does not accept connections.
    #[error("failed to connect to the metadata service")]
    Connect(#[source] io::Error),
    /// The service does not speak HTTP or closed the connection early.
    #[error("failed to exchange a request with the metadata service")]
    Http(#[source] hyper::Error),
    /// The service did not respond in time.
    #[error("the metadata service did not respond within {DEADLINE:?}")]
    Late,
    /// The service responded with an error status.
    #[error("the metadata service responded with status {0}")]
    Status(StatusCode),
    /// The response is too long or incomplete.
    #[error("the metadata service's response exceeds {MAX_ANSWER_BYTES} bytes or is incomplete")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The token is not a valid header value.
    #[error("the metadata service's token is not a valid header value")]
    Token(#[source] http::Error),
    /// The content of the response is invalid.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// Requests the metadata.
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
    // The request and the connection run on the same task. When the task is dropped, nothing of the
    // connection remains.
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        // The connection may end before its last bytes were read.
        _ = connection => answer.await,
    }
}
