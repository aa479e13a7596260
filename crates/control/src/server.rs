//! The control plane's life: what it is made of, when it is ready, and how it ends.
//!
//! Owns the two listeners' addresses, and the tasks in the background: reconciler, deadlines, samples, traffic. At the end no new
//! connections are taken, requests get [`wrenn_listener::DRAIN_DEADLINE`] to finish, then the rest is dropped; what a dropped
//! request had begun is finished or undone by its own task, or by the next process's reconciler.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{body::Body, extract::Request};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;
use wrenn_listener::{Limits, Received};
use wrenn_proxy::{AgentTunnel, BadAgent, Cuts, Proxy, ProxyConfig};

use crate::{
    agent_client::AgentClient,
    api::{self, App},
    auth::{Auth, ensure_first_keys},
    config::ControlConfig,
    db::Db,
    error::ControlError,
    host::Host,
    lifecycle::Lifecycle,
    reconciler::Reconciler,
    samples::{self, Samples},
    traffic::Traffic,
};

/// What detached tasks (creates, destroys) get after the requests.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 4096;

/// Header fields of one request.
const MAX_HEADERS: usize = 100;

/// Where it listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// The REST API.
    pub api: SocketAddr,
    /// Requests to ports of sandboxes.
    pub traffic: SocketAddr,
}

/// Runs the control plane until `shutdown` is cancelled. Calls `ready` with the addresses once it accepts connections.
///
/// # Errors
/// If it cannot begin: addresses, database, key files, or the agent's address are not usable. An agent that does not answer
/// (yet) is no error.
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
    let auth = Auth::new(db.clone());
    ensure_first_keys(&db, &auth, &config).await?;
    let cuts = Cuts::default();
    let (say_begun, begun) = samples::begun();
    let lifecycle = Lifecycle::new(db.clone(), agent.clone(), cuts.clone(), say_begun);
    let samples = Samples::new(db.clone(), agent.clone());
    let sessions = TaskTracker::new();
    let app = Arc::new(App {
        host: Host::new(agent.clone(), db.clone()),
        db: db.clone(),
        agent: agent.clone(),
        auth,
        lifecycle: Arc::clone(&lifecycle),
        samples: Arc::clone(&samples),
        default_egress: config.default_egress,
        shutdown: shutdown.clone(),
        sessions: sessions.clone(),
    });
    let sandboxes = Traffic {
        db: db.clone(),
        lifecycle: Arc::clone(&lifecycle),
        tunnel,
    };
    let proxy = Proxy::new(Arc::new(sandboxes), cuts, ProxyConfig::default());
    let reconciler = Reconciler::new(db.clone(), agent, Arc::clone(&lifecycle));
    let mut background = JoinSet::new();
    background.spawn(reconciler.run(config.poll_interval, shutdown.clone()));
    background.spawn(Arc::clone(&lifecycle).keep_deadlines(shutdown.clone()));
    background.spawn(samples.run(begun, shutdown.clone()));
    let proxying = shutdown.clone();
    background.spawn(async move { proxy.serve(traffic_listener, proxying).await });
    tracing::info!(%api, %traffic, "control plane is ready");
    ready(Listening { api, traffic });

    serve_api(listener, app, shutdown).await;
    sessions.close();
    if tokio::time::timeout(FINISH_TIMEOUT, sessions.wait())
        .await
        .is_err()
    {
        tracing::warn!(left = sessions.len(), "sessions are still open");
    }
    while background.join_next().await.is_some() {}
    if tokio::time::timeout(FINISH_TIMEOUT, lifecycle.finish())
        .await
        .is_err()
    {
        tracing::warn!("creates or destroys are still under way; the next start settles them");
    }
    // A query that hangs must not keep the process.
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
        BadAgent::Token => ControlError::AgentToken,
        _ => ControlError::AgentUrl {
            url: config.agent_url.clone(),
        },
    })
}

/// Answers the API's requests until told to stop, and lets those that are under way finish.
async fn serve_api(listener: TcpListener, app: Arc<App>, shutdown: CancellationToken) {
    let router = api::router(app);
    let answer = move |request: Request<Received>, _client| {
        let router = router.clone();
        async move {
            let Ok(response) = router.oneshot(request.map(Body::new)).await;
            response
        }
    };
    let limits = Limits {
        clients: MAX_CONNECTIONS,
        headers: MAX_HEADERS,
    };
    wrenn_listener::serve(listener, limits, answer, shutdown).await;
}
