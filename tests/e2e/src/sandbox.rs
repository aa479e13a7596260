//! Sandbox under test.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::{Method, StatusCode, multipart};
use serde_json::{Value, json};

use crate::{
    Service,
    wait::{GENEROUS, until},
};

/// Sandbox, identified by its id, in a service.
pub struct Sandbox<'a> {
    service: &'a Service,
    id: String,
}

/// Result of a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub code: i64,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl<'a> Sandbox<'a> {
    /// Returns a handle to an existing sandbox.
    #[must_use]
    pub fn new(service: &'a Service, id: String) -> Self {
        Self { service, id }
    }

    /// Returns the id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns the URL path of a resource of the sandbox.
    #[must_use]
    pub fn path(&self, rest: &str) -> String {
        format!("/v1/sandboxes/{}{rest}", self.id)
    }

    /// Returns the record of the sandbox.
    ///
    /// # Errors
    /// The sandbox is unknown.
    pub async fn record(&self) -> Result<Value> {
        let (status, body) = self.service.get(&self.path("")).await?;
        ensure!(status == StatusCode::OK, "{status}: {body}");
        Ok(body)
    }

    /// Waits for a status and returns the record. An unexpected status `error` ends the wait.
    ///
    /// # Errors
    /// The sandbox does not reach the status.
    pub async fn until_status(&self, wanted: &str) -> Result<Value> {
        until(&format!("{} is {wanted}", self.id), GENEROUS, async || {
            let record = self.record().await?;
            if record["status"] == wanted {
                return Ok(Some(record));
            }
            if record["status"] == "error" {
                bail!("{record}\n{}", self.service.log());
            }
            Ok(None)
        })
        .await
    }

    /// Pauses the sandbox.
    ///
    /// # Errors
    /// The server does not pause it.
    pub async fn pause(&self) -> Result<()> {
        self.order("/pause").await
    }

    /// Resumes the sandbox.
    ///
    /// # Errors
    /// The server does not resume it.
    pub async fn resume(&self) -> Result<()> {
        self.order("/resume").await
    }

    /// Resumes the paused sandbox from its disk: it boots, as after a power failure.
    ///
    /// # Errors
    /// The server does not resume it.
    pub async fn boot(&self) -> Result<()> {
        let path = format!("/v2/sandboxes/{}/connect", self.id);
        let body = json!({ "memory": false });
        let (status, reply) = self.service.json(Method::POST, &path, &body).await?;
        ensure!(status == StatusCode::CREATED, "{status}: {reply}");
        Ok(())
    }

    async fn order(&self, verb: &str) -> Result<()> {
        let request = self.service.request(Method::POST, &self.path(verb));
        let response = request.send().await?;
        let status = response.status();
        ensure!(status.is_success(), "{status}: {}", response.text().await?);
        Ok(())
    }

    /// Runs a program.
    ///
    /// # Errors
    /// The server does not return a result.
    pub async fn exec(&self, cmd: &str, args: &[&str]) -> Result<Output> {
        self.exec_with(json!({ "cmd": cmd, "args": args, "timeout_sec": 120 }))
            .await
    }

    /// Runs a shell command line.
    ///
    /// # Errors
    /// Same as [`exec`](Self::exec).
    pub async fn shell(&self, line: &str) -> Result<Output> {
        self.exec("sh", &["-c", line]).await
    }

    /// Runs a program with a custom request body.
    ///
    /// # Errors
    /// Same as [`exec`](Self::exec).
    pub async fn exec_with(&self, body: Value) -> Result<Output> {
        let (status, reply) = self
            .service
            .json(Method::POST, &self.path("/exec"), &body)
            .await?;
        ensure!(
            status == StatusCode::OK,
            "{status}: {reply}\n{}",
            self.service.log()
        );
        ensure!(reply["encoding"] == "utf-8", "not UTF-8: {reply}");
        let text = |field: &str| reply[field].as_str().unwrap_or_default().to_owned();
        Ok(Output {
            code: reply["exit_code"].as_i64().context("no exit code")?,
            stdout: text("stdout"),
            stderr: text("stderr"),
        })
    }

    /// Writes a file.
    ///
    /// # Errors
    /// The server rejects the request.
    pub async fn write(&self, path: &str, content: impl Into<Vec<u8>>) -> Result<()> {
        let form = multipart::Form::new().text("path", path.to_owned()).part(
            "file",
            multipart::Part::bytes(content.into()).file_name("f"),
        );
        let request = self
            .service
            .request(Method::POST, &self.path("/files/write"));
        let response = request.multipart(form).send().await?;
        let status = response.status();
        ensure!(
            status == StatusCode::NO_CONTENT,
            "{status}: {}",
            response.text().await?
        );
        Ok(())
    }

    /// Writes a file of any size.
    ///
    /// # Errors
    /// The server rejects the request.
    pub async fn upload(&self, path: &str, file: &Path) -> Result<()> {
        let content = tokio::fs::read(file).await?;
        let form = multipart::Form::new()
            .text("path", path.to_owned())
            .part("file", multipart::Part::bytes(content).file_name("f"));
        let path = self.path("/files/stream/write");
        let request = self.service.request(Method::POST, &path);
        request.multipart(form).send().await?.error_for_status()?;
        Ok(())
    }

    /// Runs a shell script. The exit code must be 0.
    ///
    /// # Errors
    /// The script fails, with its output.
    pub async fn script(&self, text: &str) -> Result<String> {
        let body = json!({ "cmd": "sh", "args": ["-c", text], "timeout_sec": 280 });
        let output = self.exec_with(body).await?;
        ensure!(output.code == 0, "{text}: {output:?}");
        Ok(output.stdout)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The server rejects the request.
    pub async fn read(&self, path: &str) -> Result<Vec<u8>> {
        let request = self
            .service
            .request(Method::POST, &self.path("/files/read"));
        let response = request.json(&json!({ "path": path })).send().await?;
        let status = response.status();
        let bytes = response.bytes().await?;
        ensure!(
            status == StatusCode::OK,
            "{status}: {}",
            String::from_utf8_lossy(&bytes)
        );
        Ok(bytes.into())
    }

    /// Destroys the sandbox.
    ///
    /// # Errors
    /// The server rejects the request.
    pub async fn destroy(&self) -> Result<()> {
        let response = self
            .service
            .request(Method::DELETE, &self.path(""))
            .send()
            .await?;
        let status = response.status();
        ensure!(
            status == StatusCode::NO_CONTENT,
            "{status}: {}",
            response.text().await?
        );
        Ok(())
    }
}
