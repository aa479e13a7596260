//! Tunnels to guests. Only the port of the guest agent is open.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use axum::{
    extract::{Path, Request, State as Shared},
    response::{IntoResponse, Response},
};
use connectrpc::{ConnectError, ErrorCode};
use http::{HeaderValue, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;
use wrenn_proto::{guest::ENVD_PORT, rpc::hostagent::v1::SandboxState};

use super::{State, guest::Guest, lock};

/// Number of the received bytes that are kept for the tests.
const HEARD_BYTES: usize = 1 << 20;

/// Answers as the real agent does, and copies the bytes in a task of its own.
pub(super) async fn open(
    Shared((state, down)): Shared<(Arc<State>, CancellationToken)>,
    Path((id, port)): Path<(String, u16)>,
    mut request: Request,
) -> Response {
    if let Err(error) = state.require_running(&id) {
        let status = match error.code {
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            _ => StatusCode::CONFLICT,
        };
        return rejection(status, &error);
    }
    if port != ENVD_PORT {
        let body = r#"{"code":"port_closed","message":"connection refused"}"#;
        return (StatusCode::BAD_GATEWAY, body).into_response();
    }
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().unwrap();
    let cut = lock(&state.cuts).entry(id.clone()).or_default().clone();
    let guest = TcpStream::connect(state.guest(&id).await).await.unwrap();
    tokio::spawn(async move {
        tokio::select! {
            () = carry(&state, &id, upgrade, guest) => {}
            () = cut.cancelled() => {}
            () = down.cancelled() => {}
        }
    });
    let upgraded = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static("wrenn-tunnel")),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, upgraded).into_response()
}

fn rejection(status: StatusCode, error: &ConnectError) -> Response {
    (status, error.to_json()).into_response()
}

async fn carry(state: &State, id: &str, upgrade: OnUpgrade, guest: TcpStream) {
    let Ok(caller) = upgrade.await else { return };
    let (from_caller, to_caller) = tokio::io::split(TokioIo::new(caller));
    let (from_guest, to_guest) = guest.into_split();
    tokio::join!(
        state.copy_to_guest(from_caller, to_guest),
        state.copy_from_guest(id, from_guest, to_caller),
    );
}

impl State {
    /// Closes the open tunnels of a sandbox.
    pub(super) fn cut(&self, id: &str) {
        if let Some(cut) = lock(&self.cuts).remove(id) {
            cut.cancel();
        }
    }

    async fn guest(&self, id: &str) -> SocketAddr {
        let answer = lock(&self.answer).clone();
        if let Some(answer) = answer {
            return stub(answer).await;
        }
        let mut guests = self.guests.lock().await;
        if !guests.contains_key(id) {
            let patience = *lock(&self.patience);
            let guest = Guest::start(&format!("token-of-{id}"), patience).await;
            guests.insert(id.to_owned(), guest);
        }
        guests[id].address
    }

    async fn copy_to_guest(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            self.upload_gate.pass().await;
            self.upload_bytes.fetch_add(length, Ordering::SeqCst);
            {
                let mut heard = lock(&self.heard);
                let room = HEARD_BYTES.saturating_sub(heard.len());
                heard.extend_from_slice(&buffer[..length.min(room)]);
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    }

    async fn copy_from_guest(
        &self,
        id: &str,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) {
        let (mut buffer, mut total) = (vec![0; 64 * 1024], 0);
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            total += length;
            if total > self.lost_after.load(Ordering::SeqCst) {
                if let Some(sandbox) = lock(&self.sandboxes).get_mut(id) {
                    sandbox.state = SandboxState::SANDBOX_STATE_ERROR;
                    "the machine is gone".clone_into(&mut sandbox.reason);
                }
                self.cut(id);
                return;
            }
            self.download_bytes.fetch_add(length, Ordering::SeqCst);
            if to.write_all(&buffer[..length]).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    }
}

/// Starts a guest that gives one answer and closes the connection.
async fn stub(answer: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.windows(4).any(|window| window == b"\r\n\r\n") {
            if stream.read_buf(&mut request).await.unwrap() == 0 {
                return;
            }
        }
        let _ = stream.write_all(&answer).await;
        let _ = stream.shutdown().await;
        // The rest of the request is read, so that the answer is not lost in a reset.
        while let Ok(1..) = stream.read_buf(&mut request).await {}
    });
    address
}
