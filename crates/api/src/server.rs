//! Lifecycle of the control plane: its parts, its readiness, its shutdown.
//!
//! Owns the addresses of the two listeners, and the background tasks: reconciler, deadlines,
//! samples, traffic. At shutdown, no new connection is accepted. Requests in progress get
//! [`wrenn_http_server::DRAIN_DEADLINE`] to complete, and the remaining ones are dropped. Work that
//! a dropped request started is completed or undone by its own task, or by the reconciler of the
//! next process.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{body::Body, extract::Request};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;
use wrenn_control::{
    ControlConfig, ControlError,
    agent_client::AgentClient,
    api_key::{Auth, ensure_first_keys},
    fleet::{Fleet, HostLink},
    guest::Guests,
    host::Host,
    lifecycle::Lifecycle,
    principal::Ownership,
    reconciler::Reconciler,
    samples::{self, Samples},
    unaddressed::Unaddressed,
};
use wrenn_db::Db;
use wrenn_http_server::{DrainingBody, Limits};
use wrenn_model::ByteBudget;
use wrenn_proxy::{AgentTunnel, ConnectionKillSwitch, InvalidAgentUrl, Proxy, ProxyConfig};

use crate::{app::App, router, traffic::Traffic};

/// Maximum time for each kind of work that remains after the last request: sessions, detached tasks
/// (creates, destroys), database connections.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of header fields per request.
const MAX_HEADERS: usize = 100;

/// Addresses of the control plane's listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Address of the REST API.
    pub api: SocketAddr,
    /// Address for requests to ports of sandboxes.
    pub traffic: SocketAddr,
}

/// Runs the control plane until `shutdown` is cancelled. Calls `ready` with the addresses once
/// connections are accepted.
///
/// # Errors
/// If the control plane cannot start, because an address, the database, a key file or the agent's
/// URL is unusable. An agent that does not answer (yet) is not an error.
pub async fn serve(
    config: ControlConfig,
    ready: impl FnOnce(Listening),
    shutdown: CancellationToken,
) -> Result<(), ControlError> {
    let tunnel = tunnel(&config)?;
    let (listener, api) = listen(config.listen).await?;
    let (traffic_listener, traffic) = listen(config.traffic_listen).await?;
    let db = Db::open(&config.database_url).await?;
    let installation = db.installation_id().await?;
    tracing::info!(installation, "database opened");
    let agent = AgentClient::new(&config.agent_url, &config.agent_token, &installation)?;
    let fleet = Fleet::new(HostLink { agent, tunnel }, []);
    let auth = Auth::new(db.clone());
    ensure_first_keys(&db, &auth, &config).await?;
    let cuts = ConnectionKillSwitch::default();
    let (say_begun, begun) = samples::begun();
    let buffers = ByteBudget::new(config.limits.max_buffered_bytes);
    let guests = Arc::new(Guests::new(fleet.clone(), buffers.clone()));
    let lifecycle = Lifecycle::new(
        db.clone(),
        fleet.clone(),
        Arc::clone(&guests),
        cuts.clone(),
        say_begun,
    );
    let limits = config.limits;
    let samples = Samples::new(db.clone(), fleet.clone());
    let sessions = TaskTracker::new();
    let app = Arc::new(App {
        host: Host::new(fleet.placement().agent.clone(), db.clone()),
        db: db.clone(),
        fleet: fleet.clone(),
        guests,
        auth,
        ownership: Ownership::new(db.clone()),
        lifecycle: Arc::clone(&lifecycle),
        samples: Arc::clone(&samples),
        default_egress: config.default_egress,
        limits,
        buffers,
        shutdown: shutdown.clone(),
        sessions: sessions.clone(),
    });
    let sandboxes = Traffic {
        lifecycle: Arc::clone(&lifecycle),
        unaddressed: Unaddressed::new(db.clone()),
    };
    let proxy_config = ProxyConfig {
        max_clients: limits.max_clients,
        max_clients_per_peer: limits.max_clients_per_peer,
        ..ProxyConfig::default()
    };
    let proxy = Proxy::new(Arc::new(sandboxes), cuts, proxy_config);
    let mut background = JoinSet::new();
    for host in fleet.hosts() {
        let (fleet, host) = (fleet.clone(), host.clone());
        let lifecycle = Arc::clone(&lifecycle);
        let reconciler = Reconciler::new(db.clone(), fleet, host, lifecycle, limits.retention);
        background.spawn(reconciler.run(config.poll_interval, shutdown.clone()));
    }
    background.spawn(Arc::clone(&lifecycle).keep_deadlines(shutdown.clone()));
    background.spawn(samples.run(begun, shutdown.clone()));
    let proxying = shutdown.clone();
    background.spawn(async move { proxy.serve(traffic_listener, proxying).await });
    tracing::info!(%api, %traffic, "control plane ready");
    ready(Listening { api, traffic });

    serve_api(listener, app, limits, shutdown).await;
    sessions.close();
    if tokio::time::timeout(FINISH_TIMEOUT, sessions.wait())
        .await
        .is_err()
    {
        tracing::warn!(left = sessions.len(), "sessions still open");
    }
    while background.join_next().await.is_some() {}
    if tokio::time::timeout(FINISH_TIMEOUT, lifecycle.finish())
        .await
        .is_err()
    {
        tracing::warn!("creates or destroys still in progress, left to the next start");
    }
    // A hanging query must not keep the process running.
    let _ = tokio::time::timeout(FINISH_TIMEOUT, db.close()).await;
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ControlError> {
    let error = |source| ControlError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

fn tunnel(config: &ControlConfig) -> Result<AgentTunnel, ControlError> {
    AgentTunnel::new(&config.agent_url, &config.agent_token).map_err(|error| match error {
        InvalidAgentUrl::Token => ControlError::AgentToken,
        _ => ControlError::AgentUrl {
            url: config.agent_url.clone(),
        },
    })
}

/// Serves the REST API until shutdown. Requests in progress may complete.
async fn serve_api(
    listener: TcpListener,
    app: Arc<App>,
    limits: wrenn_control::Limits,
    shutdown: CancellationToken,
) {
    let router = router::router(app);
    let answer = move |request: Request<DrainingBody>, _client| {
        let router = router.clone();
        async move {
            let Ok(response) = router.oneshot(request.map(Body::new)).await;
            response
        }
    };
    let limits = Limits {
        clients: limits.max_clients,
        clients_per_peer: limits.max_clients_per_peer,
        headers: MAX_HEADERS,
    };
    wrenn_http_server::serve(listener, limits, answer, shutdown).await;
}
