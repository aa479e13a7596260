//! Program in a guest that holds data and answers questions, and its expected state.

use anyhow::{Result, ensure};
use reqwest::Method;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use wrenn_e2e::{
    Sandbox, Service,
    wait::{GENEROUS, patient, until},
};

const PROGRAM: &str = include_str!("../../../guest/witness.py");
const PORT: &str = "9000";
const PAGE: usize = 4096;
const PAGES: usize = 1024;
const FILE: usize = 64 * PAGE;

/// Starts the program in a sandbox, and waits until it answers.
pub(super) async fn start(service: &Service, sandbox: &Sandbox<'_>) -> Result<()> {
    sandbox.write("/root/witness.py", PROGRAM).await?;
    let body = json!({ "cmd": "python3", "args": ["/root/witness.py"], "user": "root", "background": true });
    let (status, started) = service
        .json(Method::POST, &sandbox.path("/exec"), &body)
        .await?;
    ensure!(status.is_success(), "{started}");
    until("the witness answers", GENEROUS, async || {
        Ok(ask(service, sandbox.id(), "is_zero/0/1").await.ok())
    })
    .await?;
    Ok(())
}

/// Sends a question: its name and its numbers, separated by slashes.
pub(super) async fn ask(service: &Service, id: &str, question: &str) -> Result<String> {
    let url = format!("http://{}/{question}", service.traffic_listen());
    let request = reqwest::Client::new().get(url);
    let request = request
        .header("E2b-Sandbox-Id", id)
        .header("E2b-Sandbox-Port", PORT);
    let response = request.timeout(patient(GENEROUS)).send().await?;
    let status = response.status();
    let text = response.text().await?;
    ensure!(status.is_success(), "{question}: {status}: {text}");
    Ok(text)
}

/// Expected memory of the program.
#[derive(Clone)]
pub(super) struct Memory(Vec<u8>);

impl Memory {
    pub(super) fn new() -> Self {
        Self(vec![0; PAGES * PAGE])
    }

    /// Fills pages here and in the guest.
    pub(super) async fn fill(
        &mut self,
        service: &Service,
        id: &str,
        first: usize,
        count: usize,
        generation: u64,
    ) -> Result<()> {
        for page in first..first + count {
            let word = (generation << 32 | page as u64).to_le_bytes();
            self.0[page * PAGE..(page + 1) * PAGE].copy_from_slice(&word.repeat(PAGE / word.len()));
        }
        ask(service, id, &format!("fill/{first}/{count}/{generation}")).await?;
        Ok(())
    }

    /// Fills pages with zeros here and in the guest.
    pub(super) async fn zero(
        &mut self,
        service: &Service,
        id: &str,
        first: usize,
        count: usize,
    ) -> Result<()> {
        self.0[first * PAGE..(first + count) * PAGE].fill(0);
        ask(service, id, &format!("zero/{first}/{count}")).await?;
        Ok(())
    }

    /// Checks the memory of the program, its file in memory and its file on the disk.
    pub(super) async fn check(&self, service: &Service, id: &str) -> Result<()> {
        let sums = ask(service, id, "sums").await?;
        let expected = [&self.0[..], &self.0[..FILE], &self.0[..FILE]];
        let expected = expected.map(|data| hex::encode(Sha256::digest(data)));
        for ((sum, expected), what) in sums.lines().zip(&expected).zip(["memory", "tmpfs", "disk"])
        {
            ensure!(sum == expected, "{id}: {what} has another content");
        }
        ensure!(sums.lines().count() == expected.len(), "{sums}");
        Ok(())
    }
}

/// Returns the identity of a guest: host name, random bytes, machine id, a random number of the
/// kernel, generation id.
pub(super) async fn identity(service: &Service, id: &str) -> Result<Vec<String>> {
    let lines = ask(service, id, "identity").await?;
    let lines: Vec<_> = lines.lines().map(str::to_owned).collect();
    ensure!(lines.len() == 5, "{lines:?}");
    Ok(lines)
}
