//! Client of the REST API, used by the client commands.
//!
//! Owns the base URL, the API key and all deadlines. Never prints and never retries: the command
//! decides how to handle a failure. Responses are deserialized into the types of
//! `wrenn_api_types`.

mod error;
mod files;
mod socket;
#[cfg(test)]
mod tests;

use std::{path::Path, time::Duration};

use reqwest::{Method, RequestBuilder, Response, Url};
use serde::{Serialize, de::DeserializeOwned};
use wrenn_api_types::{
    ApiKey, BackgroundProcess, CreateApiKey, CreateSandbox, CreateSnapshot, CreatedApiKey,
    ExecRequest, ExecResult, ForkSandbox, Metrics, ProcessList, ResumeSandbox, Sandbox, Template,
    UnknownSandbox,
};
use wrenn_model::{SandboxId, SandboxStatus, Scope, TemplateName};

use crate::config::Settings;

pub(crate) use error::ClientError;
pub(crate) use files::Upload;
pub(crate) use socket::{Event, Receiver, Sender, Start, StreamKind};

/// Connect timeout: a running server accepts a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of a call other than an exec or a file transfer. The server answers even the slowest one
/// within 5 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Timeout of a call that saves or restores a sandbox. Such a call may transfer the whole memory at
/// the speed of a slow disk.
const LONG_CALL_TIMEOUT: Duration = Duration::from_secs(330);

/// Maximum duration of a call that transfers a snapshot to or from an object store.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2 * 3600);

/// Time that a foreground exec may take in addition to the timeout of its command.
const EXEC_GRACE: Duration = Duration::from_secs(15);

/// Timeout that the server applies to a command when the request has none, in seconds.
const DEFAULT_EXEC_TIMEOUT_SEC: u64 = 30;

/// Client of one server with one API key.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    key: String,
}

impl Client {
    /// Creates a client from the settings; reads the key file if no key is set.
    pub(crate) fn new(settings: &Settings) -> Result<Self, ClientError> {
        let base = parse_base(&settings.api_url)?;
        let key = match &settings.api_key {
            Some(key) => key.clone(),
            None => read_key(&settings.key_file())?,
        };
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
            // Sandbox hosts are reached directly; a proxy configured for web access is not meant
            // for them.
            .no_proxy()
            .build()
            .map_err(ClientError::Setup)?;
        Ok(Self { http, base, key })
    }

    /// `POST /v1/sandboxes`.
    pub(crate) async fn create(&self, body: &CreateSandbox) -> Result<Sandbox, ClientError> {
        self.call(Method::POST, &["sandboxes"], Some(body)).await
    }

    /// `GET /v1/sandboxes?status=...`.
    pub(crate) async fn list(
        &self,
        statuses: &[SandboxStatus],
    ) -> Result<Vec<Sandbox>, ClientError> {
        let words: Vec<_> = statuses.iter().map(|status| status.as_str()).collect();
        let mut url = self.url(&["sandboxes"]);
        url.query_pairs_mut()
            .append_pair("status", &words.join(","));
        let request = self.request_to(Method::GET, url).timeout(CALL_TIMEOUT);
        self.decode(self.send(request).await?).await
    }

    /// `GET /v1/sandboxes/{id}`.
    pub(crate) async fn get(&self, id: &SandboxId) -> Result<Sandbox, ClientError> {
        self.call(Method::GET, &["sandboxes", id.as_str()], NO_BODY)
            .await
    }

    /// `DELETE /v1/sandboxes/{id}`.
    pub(crate) async fn destroy(&self, id: &SandboxId) -> Result<(), ClientError> {
        self.order(Method::DELETE, &["sandboxes", id.as_str()])
            .await
    }

    /// `GET /v1/host/sandboxes/{id}/log?source=...`.
    pub(crate) async fn log(&self, id: &SandboxId, source: &str) -> Result<Vec<u8>, ClientError> {
        let mut url = self.url(&["host", "sandboxes", id.as_str(), "log"]);
        url.query_pairs_mut().append_pair("source", source);
        let request = self.request_to(Method::GET, url).timeout(CALL_TIMEOUT);
        let answer = self.send(request).await?.bytes().await;
        let log = answer.map_err(|e| ClientError::transport(&self.base, e))?;
        Ok(log.into())
    }

    /// `GET /v1/unknown-sandboxes`.
    pub(crate) async fn unknown(&self) -> Result<Vec<UnknownSandbox>, ClientError> {
        self.call(Method::GET, &["unknown-sandboxes"], NO_BODY)
            .await
    }

    /// `POST /v1/unknown-sandboxes/{id}/adopt`.
    pub(crate) async fn adopt(&self, id: &SandboxId) -> Result<Sandbox, ClientError> {
        let path = ["unknown-sandboxes", id.as_str(), "adopt"];
        self.call(Method::POST, &path, NO_BODY).await
    }

    /// `DELETE /v1/unknown-sandboxes/{id}`.
    pub(crate) async fn destroy_unknown(&self, id: &SandboxId) -> Result<(), ClientError> {
        let path = ["unknown-sandboxes", id.as_str()];
        self.order(Method::DELETE, &path).await
    }

    /// `POST /v1/sandboxes/{id}/pause`.
    pub(crate) async fn pause(&self, id: &SandboxId) -> Result<Sandbox, ClientError> {
        self.long_call(&["sandboxes", id.as_str(), "pause"], NO_BODY)
            .await
    }

    /// `POST /v1/sandboxes/{id}/resume`.
    pub(crate) async fn resume(
        &self,
        id: &SandboxId,
        body: &ResumeSandbox,
    ) -> Result<Sandbox, ClientError> {
        self.long_call(&["sandboxes", id.as_str(), "resume"], Some(body))
            .await
    }

    /// `POST /v1/sandboxes/{id}/fork`.
    pub(crate) async fn fork(
        &self,
        id: &SandboxId,
        body: &ForkSandbox,
    ) -> Result<Vec<Sandbox>, ClientError> {
        self.long_call(&["sandboxes", id.as_str(), "fork"], Some(body))
            .await
    }

    /// `POST /v1/snapshots`.
    pub(crate) async fn create_snapshot(
        &self,
        body: &CreateSnapshot,
        overwrite: bool,
    ) -> Result<Template, ClientError> {
        let mut url = self.url(&["snapshots"]);
        if overwrite {
            url.query_pairs_mut().append_pair("overwrite", "true");
        }
        let request = self.request_to(Method::POST, url).json(body);
        self.decode(self.send(request.timeout(LONG_CALL_TIMEOUT)).await?)
            .await
    }

    /// `GET /v1/snapshots?type=snapshot`.
    pub(crate) async fn snapshots(&self) -> Result<Vec<Template>, ClientError> {
        let mut url = self.url(&["snapshots"]);
        url.query_pairs_mut().append_pair("type", "snapshot");
        let request = self.request_to(Method::GET, url).timeout(CALL_TIMEOUT);
        self.decode(self.send(request).await?).await
    }

    /// `DELETE /v1/snapshots/{name}`.
    pub(crate) async fn delete_snapshot(&self, name: &TemplateName) -> Result<(), ClientError> {
        self.order(Method::DELETE, &["snapshots", name.as_str()])
            .await
    }

    /// `POST /v1/snapshots/{name}/push`.
    pub(crate) async fn push_snapshot(&self, name: &TemplateName) -> Result<(), ClientError> {
        let url = self.url(&["snapshots", name.as_str(), "push"]);
        let request = self.request_to(Method::POST, url);
        self.send(request.timeout(TRANSFER_TIMEOUT)).await.map(drop)
    }

    /// `POST /v1/snapshots/{name}/pull`.
    pub(crate) async fn pull_snapshot(
        &self,
        name: &TemplateName,
        overwrite: bool,
    ) -> Result<Template, ClientError> {
        let mut url = self.url(&["snapshots", name.as_str(), "pull"]);
        if overwrite {
            url.query_pairs_mut().append_pair("overwrite", "true");
        }
        let request = self.request_to(Method::POST, url);
        self.decode(self.send(request.timeout(TRANSFER_TIMEOUT)).await?)
            .await
    }

    /// `POST /v1/sandboxes/{id}/ping`.
    pub(crate) async fn ping(&self, id: &SandboxId) -> Result<(), ClientError> {
        self.order(Method::POST, &["sandboxes", id.as_str(), "ping"])
            .await
    }

    /// `GET /v1/sandboxes/{id}/metrics`.
    pub(crate) async fn metrics(&self, id: &SandboxId) -> Result<Metrics, ClientError> {
        self.call(Method::GET, &["sandboxes", id.as_str(), "metrics"], NO_BODY)
            .await
    }

    /// `GET /v1/sandboxes/{id}/processes`.
    pub(crate) async fn processes(&self, id: &SandboxId) -> Result<ProcessList, ClientError> {
        let path = ["sandboxes", id.as_str(), "processes"];
        self.call(Method::GET, &path, NO_BODY).await
    }

    /// `DELETE /v1/sandboxes/{id}/processes/{pid or tag}`.
    pub(crate) async fn kill(
        &self,
        id: &SandboxId,
        process: &str,
        signal: &str,
    ) -> Result<(), ClientError> {
        let path = ["sandboxes", id.as_str(), "processes", process];
        let mut url = self.url(&path);
        url.query_pairs_mut().append_pair("signal", signal);
        let request = self.request_to(Method::DELETE, url).timeout(CALL_TIMEOUT);
        self.send(request).await.map(drop)
    }

    /// `POST /v1/sandboxes/{id}/exec`, in the foreground.
    pub(crate) async fn exec(
        &self,
        id: &SandboxId,
        body: &ExecRequest,
    ) -> Result<ExecResult, ClientError> {
        let path = ["sandboxes", id.as_str(), "exec"];
        let mut request = self.request(Method::POST, &path).json(body);
        let seconds = match body.timeout_sec {
            None => DEFAULT_EXEC_TIMEOUT_SEC,
            Some(n) => u64::try_from(n).unwrap_or(0),
        };
        // 0 disables the command's timeout, so the call has none either.
        if seconds > 0 {
            request = request.timeout(Duration::from_secs(seconds).saturating_add(EXEC_GRACE));
        }
        self.decode(self.send(request).await?).await
    }

    /// `POST /v1/sandboxes/{id}/exec`, in the background.
    pub(crate) async fn exec_background(
        &self,
        id: &SandboxId,
        body: &ExecRequest,
    ) -> Result<BackgroundProcess, ClientError> {
        let path = ["sandboxes", id.as_str(), "exec"];
        self.call(Method::POST, &path, Some(body)).await
    }

    /// `POST /v1/api-keys`.
    pub(crate) async fn create_key(
        &self,
        name: String,
        e2b: bool,
        scopes: Option<Vec<Scope>>,
    ) -> Result<CreatedApiKey, ClientError> {
        let body = CreateApiKey { name, e2b, scopes };
        self.call(Method::POST, &["api-keys"], Some(&body)).await
    }

    /// `GET /v1/api-keys`.
    pub(crate) async fn keys(&self) -> Result<Vec<ApiKey>, ClientError> {
        self.call(Method::GET, &["api-keys"], NO_BODY).await
    }

    /// `DELETE /v1/api-keys/{id}`.
    pub(crate) async fn delete_key(&self, id: &str) -> Result<(), ClientError> {
        self.order(Method::DELETE, &["api-keys", id]).await
    }

    /// Sends a call that may save all memory of a sandbox before it is answered.
    async fn long_call<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let mut request = self.request(Method::POST, path).timeout(LONG_CALL_TIMEOUT);
        if let Some(body) = body {
            request = request.json(body);
        }
        self.decode(self.send(request).await?).await
    }

    /// Sends a call to `/v1/...` with an optional JSON body and returns the JSON response.
    async fn call<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let mut request = self.request(method, path).timeout(CALL_TIMEOUT);
        if let Some(body) = body {
            request = request.json(body);
        }
        self.decode(self.send(request).await?).await
    }

    /// Sends a call to `/v1/...` without a body whose response has no content.
    async fn order(&self, method: Method, path: &[&str]) -> Result<(), ClientError> {
        let request = self.request(method, path).timeout(CALL_TIMEOUT);
        self.send(request).await.map(drop)
    }

    /// Returns the URL of a path under `/v1`. Each part becomes one segment, regardless of its
    /// characters.
    fn url(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(path);
        }
        url
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.request_to(method, self.url(path))
    }

    fn request_to(&self, method: Method, url: Url) -> RequestBuilder {
        self.http
            .request(method, url)
            .header("X-API-Key", &self.key)
    }

    /// Sends a request and converts a response that is not a success into an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let answer = request
            .send()
            .await
            .map_err(|e| ClientError::transport(&self.base, e))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = answer.bytes().await.unwrap_or_default();
        Err(ClientError::rejected(status, &body))
    }

    async fn decode<T: DeserializeOwned>(&self, answer: Response) -> Result<T, ClientError> {
        let body = answer
            .bytes()
            .await
            .map_err(|e| ClientError::transport(&self.base, e))?;
        serde_json::from_slice(&body).map_err(ClientError::Answer)
    }
}

const NO_BODY: Option<&()> = None;

fn parse_base(text: &str) -> Result<Url, ClientError> {
    let bad = |why: &'static str| ClientError::BadUrl {
        url: text.to_owned(),
        why,
    };
    let url = Url::parse(text).map_err(|_| bad("expected a URL such as http://127.0.0.1:8000"))?;
    match url.scheme() {
        "http" if url.has_host() => Ok(url),
        "https" => Err(bad(
            "TLS is not supported; reach the server through a tunnel such as `ssh -L 8000:127.0.0.1:8000 HOST`",
        )),
        _ => Err(bad("expected a URL such as http://127.0.0.1:8000")),
    }
}

fn read_key(path: &Path) -> Result<String, ClientError> {
    let text = std::fs::read_to_string(path).map_err(|source| ClientError::NoKey {
        path: path.to_owned(),
        source,
    })?;
    Ok(text.trim().to_owned())
}
