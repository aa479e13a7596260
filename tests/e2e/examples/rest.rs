//! Uses Wrenn's REST API from Rust, with `reqwest` and `serde_json`.
//!
//! Creates a sandbox, runs a command, writes and reads a file, pauses, resumes and destroys the
//! sandbox. Settings: `WRENN_API_URL` (default `http://127.0.0.1:8000`) and `WRENN_API_KEY`.

use std::{env, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::{Method, RequestBuilder, Response, multipart};
use serde_json::{Value, json};

/// File in memory: it is still there after the resume, because a pause saves memory, too.
const NOTE: &str = "/dev/shm/note.txt";

/// Client of the REST API.
struct Client {
    http: reqwest::Client,
    api: String,
    key: String,
}

impl Client {
    fn from_env() -> Result<Self> {
        let api = env::var("WRENN_API_URL");
        Ok(Self {
            http: reqwest::Client::builder()
                .timeout(Duration::from_secs(120))
                .build()?,
            api: api.unwrap_or_else(|_| "http://127.0.0.1:8000".to_owned()),
            key: env::var("WRENN_API_KEY").context("set WRENN_API_KEY")?,
        })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}/v1{path}", self.api))
            .header("X-API-Key", &self.key)
    }

    fn post(&self, path: &str) -> RequestBuilder {
        self.request(Method::POST, path)
    }
}

/// Sends a request. Every error response has the form `{"error": {"code": …, "message": …}}`.
async fn send(request: RequestBuilder) -> Result<Response> {
    let response = request.send().await?;
    let status = response.status();
    if !status.is_success() {
        bail!(
            "{}: {status} {}",
            response.url().clone(),
            response.text().await?
        );
    }
    Ok(response)
}

/// Sandbox of this example.
struct Sandbox<'a> {
    client: &'a Client,
    path: String,
}

impl Sandbox<'_> {
    /// Runs a command and returns its output.
    async fn run(&self, cmd: &str, args: &[&str]) -> Result<String> {
        let request = self.client.post(&format!("{}/exec", self.path));
        let body = json!({ "cmd": cmd, "args": args });
        let result: Value = send(request.json(&body)).await?.json().await?;
        ensure!(result["exit_code"] == 0, "{cmd}: {result}");
        Ok(text(&result, "stdout")?.trim().to_owned())
    }

    /// Writes a file. The part `path` of the form must precede the part `file`.
    async fn write(&self, path: &'static str, content: &'static [u8]) -> Result<()> {
        let file = multipart::Part::bytes(content).file_name("file");
        let form = multipart::Form::new().text("path", path).part("file", file);
        let request = self.client.post(&format!("{}/files/write", self.path));
        send(request.multipart(form)).await?;
        Ok(())
    }

    /// Returns the content of a file.
    async fn read(&self, path: &str) -> Result<String> {
        let request = self.client.post(&format!("{}/files/read", self.path));
        let response = send(request.json(&json!({ "path": path }))).await?;
        Ok(response.text().await?)
    }

    /// Pauses or resumes the sandbox and returns its new status.
    async fn change(&self, verb: &str) -> Result<String> {
        let request = self.client.post(&format!("{}/{verb}", self.path));
        let record: Value = send(request).await?.json().await?;
        Ok(text(&record, "status")?.to_owned())
    }

    async fn destroy(&self) -> Result<()> {
        send(self.client.request(Method::DELETE, &self.path)).await?;
        Ok(())
    }
}

fn text<'a>(object: &'a Value, field: &str) -> Result<&'a str> {
    object[field]
        .as_str()
        .with_context(|| format!("no `{field}` in {object}"))
}

async fn scenario(sandbox: &Sandbox<'_>) -> Result<()> {
    // Commands and file calls wait for a sandbox that is still booting.
    let product = sandbox.run("sh", &["-c", "echo $((6 * 7))"]).await?;
    println!("ran: {product}");
    sandbox.write(NOTE, b"hello").await?;
    println!("read: {}", sandbox.read(NOTE).await?);
    println!("{}", sandbox.change("pause").await?);
    println!("{}", sandbox.change("resume").await?);
    println!("still there: {}", sandbox.run("cat", &[NOTE]).await?);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let client = Client::from_env()?;
    // If this program dies, the sandbox is destroyed when it was idle for `timeout_sec`.
    let body = json!({ "timeout_sec": 300, "on_timeout": "kill" });
    let created: Value = send(client.post("/sandboxes").json(&body))
        .await?
        .json()
        .await?;
    let id = text(&created, "id")?;
    println!("created {id}");
    let sandbox = Sandbox {
        client: &client,
        path: format!("/sandboxes/{id}"),
    };
    let outcome = scenario(&sandbox).await;
    sandbox.destroy().await?;
    outcome?;
    println!("destroyed");
    Ok(())
}
