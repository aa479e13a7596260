//! The HTTP server: accepts, serves, ends.
//!
//! Owns the listeners and the tasks of the API's connections (those of the traffic listener are `wrenn-proxy`'s). Speaks HTTP/1.1 only: that is what WebSockets need here, and without
//! guessing the protocol a connection that says nothing is timed from its start.
//!
//! A connection that does not finish a request's head within 10 s, or is idle for 620 s, is closed (`connection`). At the
//! end no new connections are taken, requests get [`DRAIN_TIMEOUT`] to finish, then the rest is dropped; what a dropped
//! request had begun is finished or undone by its own task, or by the next process's reconciler.

mod connection;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
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

/// What requests get to finish at the end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What detached tasks (creates, destroys) get after that.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 4096;

/// Pause after an accept that failed: the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    let agent = AgentClient::new(&config.agent_url, &config.agent_token)?;
    let tunnel = tunnel(&config)?;
    let (listener, api) = listen(config.listen).await?;
    let (traffic_listener, traffic) = listen(config.traffic_listen).await?;
    let db = Db::open(&config.database_url).await?;
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

    accept_until(&listener, app, &shutdown).await;
    drop(listener);
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

/// Serves connections until told to stop, and then lets them finish.
async fn accept_until(listener: &TcpListener, app: Arc<App>, shutdown: &CancellationToken) {
    let router = api::router(app);
    let connections = TaskTracker::new();
    let drop_all = CancellationToken::new();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(listener, &slots) => accepted,
        };
        let Some((stream, slot)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let serving = connection::serve(stream, router.clone(), shutdown.clone());
        let drop_all = drop_all.clone();
        connections.spawn(async move {
            let _slot = slot;
            tokio::select! {
                () = serving => {}
                () = drop_all.cancelled() => {}
            }
        });
    }
    connections.close();
    if tokio::time::timeout(DRAIN_TIMEOUT, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            left = connections.len(),
            "dropping requests that do not end"
        );
        drop_all.cancel();
        connections.wait().await;
    }
}

/// The next connection, when there is room for it.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, slot)),
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            None
        }
    }
}
