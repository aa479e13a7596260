//! S3 server of a test: a real implementation of the protocol on a directory, on loopback. It counts
//! what clients load, and can refuse requests.
#![forbid(unsafe_code)]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{
    Body,
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::{net::TcpListener, runtime::Runtime};

/// Access key of the server.
pub const ACCESS_KEY: &str = "test-key";
/// Secret of the access key.
pub const SECRET_KEY: &str = "test-secret";
/// Name of the bucket.
pub const BUCKET: &str = "bucket";

/// Running server. It ends when the value is dropped.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    dir: tempfile::TempDir,
    counters: Arc<Counters>,
    runtime: Option<Runtime>,
}

/// Requests since the start, and refusals to come.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    refusals: AtomicU64,
}

impl S3Server {
    /// Starts a server with an empty bucket.
    ///
    /// # Panics
    /// If the server cannot start.
    #[must_use]
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join(BUCKET)).expect("a bucket");
        let files = s3s_fs::FileSystem::new(dir.path()).expect("a file system");
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
        let address = listener.local_addr().expect("an address");
        listener.set_nonblocking(true).expect("non-blocking");
        let counters = Arc::<Counters>::default();
        let counted = counters.clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            serve(listener, service, counted).await;
        });
        Self {
            address,
            dir,
            counters,
            runtime: Some(runtime),
        }
    }

    /// Returns the URL of the server.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the file of an object.
    #[must_use]
    pub fn object(&self, name: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(name)
    }

    /// Returns the names of all objects below a prefix, sorted.
    ///
    /// # Panics
    /// If a directory cannot be read.
    #[must_use]
    pub fn objects(&self, prefix: &str) -> Vec<String> {
        let root = self.dir.path().join(BUCKET);
        let mut names = Vec::new();
        let dir = root.join(prefix);
        if dir.is_dir() {
            collect(&root, &dir, &mut names);
        }
        names.sort();
        names
    }

    /// Returns the number of objects and parts of objects that were read.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.counters.reads.load(Ordering::SeqCst)
    }

    /// Returns the number of bytes that were read.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.counters.read_bytes.load(Ordering::SeqCst)
    }

    /// Returns the number of requests that wrote something.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.counters.writes.load(Ordering::SeqCst)
    }

    /// Refuses the next requests with the status 503.
    pub fn refuse(&self, requests: u64) {
        self.counters.refusals.store(requests, Ordering::SeqCst);
    }

    /// Returns the number of requests that are still to be refused.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.counters.refusals.load(Ordering::SeqCst)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(listener: TcpListener, service: S3Service, counters: Arc<Counters>) {
    while let Ok((socket, _)) = listener.accept().await {
        let (service, counters) = (service.clone(), counters.clone());
        let answer = service_fn(move |request: Request<Incoming>| {
            let (service, counters) = (service.clone(), counters.clone());
            async move {
                let is_refused = counters
                    .refusals
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                        left.checked_sub(1)
                    })
                    .is_ok();
                if is_refused {
                    return Ok(refusal());
                }
                let method = request.method().clone();
                let response = service.call(request.map(Body::from)).await;
                if let Ok(response) = &response {
                    counters.count(&method, response);
                }
                response
            }
        });
        let connection = hyper::server::conn::http1::Builder::new();
        tokio::spawn(connection.serve_connection(TokioIo::new(socket), answer));
    }
}

impl Counters {
    fn count(&self, method: &Method, response: &Response<Body>) {
        if method != Method::GET && method != Method::HEAD {
            self.writes.fetch_add(1, Ordering::SeqCst);
        }
        if method != Method::GET || !response.status().is_success() {
            return;
        }
        let len = response.headers().get(header::CONTENT_LENGTH);
        let len = len.and_then(|len| len.to_str().ok()?.parse().ok());
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.read_bytes
            .fetch_add(len.unwrap_or(0), Ordering::SeqCst);
    }
}

fn refusal() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let length = HeaderValue::from_static("0");
    response
        .headers_mut()
        .insert(header::CONTENT_LENGTH, length);
    response
}

fn collect(root: &Path, dir: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(root, &path, names);
        } else if let Ok(name) = path.strip_prefix(root) {
            names.push(name.to_string_lossy().into_owned());
        }
    }
}
