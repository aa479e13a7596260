//! HTTP connections to an object store.
//!
//! The client of `object_store` would choose the cryptography of every other client in the same
//! program. This one has its own.

use std::{error::Error, time::Duration};

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, Client, connect},
    rt::TokioExecutor,
};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
        HttpResponse, HttpResponseBody, HttpService,
    },
};
use tower_http::timeout::{TimeoutBody, TimeoutError};

/// Time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for the head of a response, and without a byte of its body.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Makes clients.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let mut tcp = connect::HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        let provider = rustls::crypto::ring::default_provider();
        let tls = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider);
        let tls = tls.map_err(|error| object_store::Error::Generic {
            store: "S3",
            source: format!("failed to read the certificates of this host: {error}").into(),
        })?;
        let connector = tls.https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(HttpClient::new(Service(client)))
    }
}

/// Client with a pool of connections.
#[derive(Debug)]
struct Service(Client<HttpsConnector<connect::HttpConnector>, HttpRequestBody>);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = tokio::time::timeout(READ_TIMEOUT, self.0.request(request)).await;
        let response = response
            .map_err(|elapsed| HttpError::new(HttpErrorKind::Timeout, elapsed))?
            .map_err(|error| HttpError::new(kind(&error), error))?;
        Ok(response.map(|body| {
            let body = TimeoutBody::new(READ_TIMEOUT, body);
            HttpResponseBody::new(body.map_err(interrupted))
        }))
    }
}

/// Returns the kind of a failure before a response. It decides whether the request is repeated.
fn kind(error: &legacy::Error) -> HttpErrorKind {
    match error.is_connect() {
        true => HttpErrorKind::Connect,
        false => HttpErrorKind::Request,
    }
}

/// Returns the error of a body that ended too early.
fn interrupted(error: Box<dyn Error + Send + Sync>) -> HttpError {
    let kind = match error.is::<TimeoutError>() {
        true => HttpErrorKind::Timeout,
        false => HttpErrorKind::Interrupted,
    };
    HttpError::new_boxed(kind, error)
}
