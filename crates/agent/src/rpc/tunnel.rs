//! `GET /tunnel/{sandbox_id}/{port}`: connection to a port of a guest, for holders of the agent's
//! token.
//!
//! The request asks for `Upgrade: wrenn-tunnel` (HTTP/1.1). The agent first connects to the guest
//! and answers `101` once it is connected. From then on, both directions carry the bytes of the
//! connection. The end of one direction is passed on, and the other direction stays open. A failure
//! before `101` is JSON, `{"code": …, "message": …}`:
//!
//! | status | code                  | cause                                                   |
//! |--------|-----------------------|---------------------------------------------------------|
//! | 400    | `invalid_argument`    | invalid port, or no upgrade requested                   |
//! | 404    | `not_found`           | the sandbox does not exist                              |
//! | 409    | `failed_precondition` | not running: paused, starting, being destroyed, or lost |
//! | 429    | `resource_exhausted`  | the sandbox has too many tunnels                        |
//! | 502    | `port_closed`         | no listener, or no answer within [`CONNECT_DEADLINE`]   |
//!
//! The control plane reaches the guest agent through tunnels, too: commands, files and terminals of
//! its API, and the traffic of E2B clients. A tunnel does not count as activity of the sandbox; the
//! control plane, which keeps idle tunnels for the next call, decides what keeps the sandbox awake.
//! The tunnel ends when either side closes it. It ends at once when the sandbox
//! is paused, destroyed or lost, or when the agent ends. A peer that has disappeared is noticed by
//! keepalive probes, after some twelve minutes without an answer: longer than a guest stops for a
//! snapshot.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Request, State as Extract},
    response::{IntoResponse as _, Response},
};
use connectrpc::ConnectError;
use http::{HeaderValue, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use wrenn_proto::headers::TUNNEL_PROTOCOL;

use crate::sandbox::{Running, Sandbox, State, Tunnel, actor::SandboxActors};

/// Maximum time for the guest to accept a connection. A port without a listener is refused at once.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Maximum time for the caller to switch protocols after the `101` response.
const UPGRADE_DEADLINE: Duration = Duration::from_secs(10);

/// Idle time before keepalive probes. Interval and number of probes are the kernel's (75 s, 9).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// Buffer size for each direction of each tunnel, in bytes.
const BUFFER_BYTES: usize = 32 * 1024;

/// Answers the request, and copies the bytes of the tunnel in a separate task.
pub(super) async fn open(
    Extract(actors): Extract<SandboxActors>,
    Path((id, port)): Path<(String, String)>,
    mut request: Request,
) -> Response {
    let Some(upgrade) = requested_upgrade(&mut request) else {
        let message = format!("this route requires HTTP/1.1 with `Upgrade: {TUNNEL_PROTOCOL}`");
        return refusal(StatusCode::BAD_REQUEST, "invalid_argument", &message);
    };
    let Some(port) = port.parse().ok().filter(|port| *port > 0_u16) else {
        let message = "`port`: expected 1 to 65535";
        return refusal(StatusCode::BAD_REQUEST, "invalid_argument", message);
    };
    let sandbox = match actors.registry.get(&id) {
        Ok(sandbox) => sandbox,
        Err(error) => return rejected(StatusCode::NOT_FOUND, &error.into()),
    };
    let (running, tunnel, guest) = match connect(&sandbox, port).await {
        Ok(connected) => connected,
        Err(refusal) => return refusal,
    };
    let shutdown = actors.shutdown.clone();
    tokio::spawn(async move {
        // Held until the tunnel ends, because a pause waits for users of the guest.
        let _running = running.clone();
        carry(upgrade, guest, &running, &tunnel, &shutdown).await;
    });
    let upgraded = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(TUNNEL_PROTOCOL)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, upgraded).into_response()
}

/// Returns the caller's connection, if the request asks for a tunnel.
fn requested_upgrade(request: &mut Request) -> Option<OnUpgrade> {
    let wanted = request.headers().get(header::UPGRADE)?;
    if !wanted
        .as_bytes()
        .eq_ignore_ascii_case(TUNNEL_PROTOCOL.as_bytes())
    {
        return None;
    }
    request.extensions_mut().remove::<OnUpgrade>()
}

/// Connects to the guest, if the sandbox is running and keeps running meanwhile.
async fn connect(
    sandbox: &Sandbox,
    port: u16,
) -> Result<(Arc<Running>, Tunnel, TcpStream), Response> {
    let unusable = || rejected(StatusCode::CONFLICT, &sandbox.unusable().into());
    sandbox.until_examined().await;
    let State::Running(running) = sandbox.state() else {
        return Err(unusable());
    };
    let Some(tunnel) = sandbox.tunnels.open() else {
        let message = format!("sandbox {} has too many tunnels", sandbox.facts.id);
        let status = StatusCode::TOO_MANY_REQUESTS;
        return Err(refusal(status, "resource_exhausted", &message));
    };
    let (State::Running(_), Some(ip)) = (sandbox.state(), sandbox.host_ip()) else {
        return Err(unusable());
    };
    let address = SocketAddr::from((ip, port));
    let guest = tokio::select! {
        biased;
        () = tunnel.cut.cancelled() => return Err(unusable()),
        () = running.gone.cancelled() => return Err(unusable()),
        guest = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address)) => guest,
    };
    let reason = match guest {
        Ok(Ok(guest)) => {
            tune(&guest);
            return Ok((running, tunnel, guest));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {CONNECT_DEADLINE:?}"),
    };
    let message = format!("port {port} of sandbox {}: {reason}", sandbox.facts.id);
    Err(refusal(StatusCode::BAD_GATEWAY, "port_closed", &message))
}

/// Sets the options of a connection that is or may become a side of a tunnel. It carries small
/// writes one after another; each would otherwise wait for the acknowledgment of the one before,
/// some 40 ms. Best effort: a failure costs speed, or a connection that lives too long.
pub(crate) fn tune(connection: &TcpStream) {
    let _ = connection.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(connection, true);
    let _ = sockopt::set_tcp_keepidle(connection, KEEPALIVE_IDLE);
}

/// Copies in both directions until both ends are closed or the tunnel must end. Dropping the
/// connections closes them.
async fn carry(
    upgrade: OnUpgrade,
    mut guest: TcpStream,
    running: &Running,
    tunnel: &Tunnel,
    shutdown: &CancellationToken,
) {
    let copy = async {
        let upgraded = tokio::time::timeout(UPGRADE_DEADLINE, upgrade).await;
        let Ok(Ok(upgraded)) = upgraded else {
            return;
        };
        let mut caller = TokioIo::new(upgraded);
        // A broken connection on one side is passed on to the other side as the end of its
        // connection.
        let _ = tokio::io::copy_bidirectional_with_sizes(
            &mut caller,
            &mut guest,
            BUFFER_BYTES,
            BUFFER_BYTES,
        )
        .await;
    };
    tokio::select! {
        () = copy => {}
        () = tunnel.cut.cancelled() => {}
        () = running.gone.cancelled() => {}
        () = shutdown.cancelled() => {}
    }
}

fn rejected(status: StatusCode, error: &ConnectError) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (status, json, error.to_json()).into_response()
}

fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    let body = serde_json::json!({ "code": code, "message": message });
    (status, axum::Json(body)).into_response()
}
