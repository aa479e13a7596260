//! HTTP server: routes, limits, and the main loop of the program.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::Response,
    routing::{any, get, post},
};
use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::net::TcpListener;
use tower::ServiceExt as _;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer, ExposeHeaders};
use wrenn_http_server::DrainingBody;
use wrenn_proto::guest;

use crate::{
    app::App,
    auth,
    cgroups::Cgroups,
    connections::Connections,
    filesystem::{FilesystemService, watch::Watchers},
    http::{compose, download, info, snapshot, upload},
    http_error::{connect_error, error_response},
    own_limits,
    process::{ProcessService, output::PATIENCE, spawn::Launcher},
};

/// Maximum time that a connection may wait for the headers of its next request. Longer than clients
/// keep idle connections (E2B's SDKs: 300 s), so that no request arrives on a connection that is
/// being closed.
const IDLE_DEADLINE: Duration = Duration::from_secs(640);

/// Maximum size of the message of a unary call, in bytes.
const MAX_MESSAGE_BYTES: u64 = 4 * 1024 * 1024;

/// Addresses and paths of the agent's environment.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub address: SocketAddr,
    /// Address of the guest, on which loopback ports are forwarded.
    pub forward_address: IpAddr,
    /// Address of the metadata service.
    pub metadata_address: SocketAddr,
    /// Root directory of the cgroup hierarchy.
    pub cgroup_root: PathBuf,
    /// Time after which a client that takes no output of a process is dropped.
    pub patience: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::UNSPECIFIED, guest::ENVD_PORT).into(),
            forward_address: guest::IP.into(),
            metadata_address: (Ipv4Addr::new(169, 254, 169, 254), 80).into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            patience: PATIENCE,
        }
    }
}

/// Serves until the process is killed.
///
/// # Errors
/// Fails if the address cannot be bound.
pub fn run(config: &Config) -> io::Result<()> {
    // One thread for the network and a few for files, so that a snapshot has little work in
    // progress.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(2))
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(config.address).await?;
        let (app, launcher) = initial_state(config);
        app.ports.start().await;
        app.mmds.ask();
        serve(listener, app, launcher).await
    })
}

/// Returns the state of an agent that has just started.
#[must_use]
pub fn initial_state(config: &Config) -> (App, Launcher) {
    let app = App::new(config.forward_address, config.metadata_address);
    let launcher = Launcher {
        settings: app.settings.clone(),
        processes: Arc::default(),
        cgroups: Cgroups::set_up(&config.cgroup_root),
        open_files: own_limits::raise(),
        patience: config.patience,
    };
    (app, launcher)
}

/// Accepts connections from a listener and serves them. The caller decides whether ports are
/// forwarded and metadata is requested.
///
/// # Errors
/// None at present: failures to accept are logged, and the loop continues.
pub async fn serve(listener: TcpListener, app: App, launcher: Launcher) -> io::Result<()> {
    let connections = app.connections.clone();
    serve_router(listener, connections, router(app, launcher)).await
}

/// Like [`serve`], for the routes of [`router`] behind a middleware of the caller.
///
/// # Errors
/// See [`serve`].
pub async fn serve_router(
    listener: TcpListener,
    connections: Arc<Connections>,
    router: Router,
) -> io::Result<()> {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                // The cause may be temporary, for example no free descriptors.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Frames are small, and a client waits for each of them.
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let service = service_fn(move |request| {
            router
                .clone()
                .oneshot(DrainingBody::of(request).map(Body::new))
        });
        let generation = connections.running();
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE_DEADLINE);
            builder.http2().timer(TokioTimer::new());
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = generation.cut.cancelled() => return,
                () = generation.drain.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    tokio::select! {
                        ended = &mut connection => ended,
                        () = generation.cut.cancelled() => return,
                    }
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection failed");
            }
        });
    }
}

/// Returns all routes.
pub fn router(app: App, launcher: Launcher) -> Router {
    let watchers = Arc::new(Watchers::default());
    let rpc = connectrpc::Router::new()
        .add_service(Arc::new(ProcessService::new(launcher)))
        .add_service(Arc::new(FilesystemService::new(
            app.settings.clone(),
            watchers,
        )));
    let hooks = HOOKS.iter().fold(Router::new(), |routes, path| {
        routes.route(path, any(not_built))
    });
    let files = get(download::download).post(upload::upload);
    Router::new()
        .route("/health", get(info::health))
        .route("/init", post(info::init))
        .route("/envs", get(info::envs))
        .route("/metrics", get(info::metrics))
        .route("/snapshot/prepare", post(snapshot::prepare))
        .route("/snapshot/recover", post(snapshot::recover))
        .route("/files/compose", post(compose::compose))
        .route("/files", files.layer(DefaultBodyLimit::disable()))
        .merge(hooks)
        .fallback_service(
            Router::new()
                .fallback_service(rpc.into_axum_service())
                .layer(middleware::from_fn(prepare_call)),
        )
        .layer(middleware::from_fn_with_state(
            app.settings.clone(),
            auth::check_token,
        ))
        .layer(cross_origin())
        .with_state(app)
}

/// Hooks of E2B's own host. Wrenn has its own form of them (`/snapshot/…`).
const HOOKS: [&str; 5] = ["/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw"];

async fn not_built() -> Response {
    error_response(
        StatusCode::NOT_IMPLEMENTED,
        "not implemented: use /snapshot/prepare and /snapshot/recover",
    )
}

/// Middleware for rules of the contract that the Connect library does not implement.
async fn prepare_call(mut request: Request, next: Next) -> Response {
    let headers = request.headers_mut();
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    // A message that is too long is rejected before it is received, because a client may stop in
    // the middle of it.
    let length: u64 = text("content-length")
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    let is_unary = matches!(
        text("content-type"),
        Some("application/json" | "application/proto")
    );
    if is_unary && length > MAX_MESSAGE_BYTES {
        return connect_error(
            StatusCode::TOO_MANY_REQUESTS,
            "resource_exhausted",
            &format!("message exceeds {MAX_MESSAGE_BYTES} bytes"),
        );
    }
    // In the contract, 0 means no limit.
    if text(TIMEOUT).is_some_and(|limit| limit.trim().bytes().all(|digit| digit == b'0')) {
        headers.remove(TIMEOUT);
    }
    next.run(request).await
}

const TIMEOUT: &str = "connect-timeout-ms";

fn cross_origin() -> CorsLayer {
    use http::Method;
    CorsLayer::new()
        .allow_origin(AllowOrigin::any())
        .allow_methods([
            Method::HEAD,
            Method::GET,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ])
        // In browsers, `*` does not include `Authorization`.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::any())
        .max_age(Duration::from_secs(2 * 3600))
}
