//! Counts the sandboxes that outlive the services.

use std::time::Duration;

use serde::Deserialize;

/// Short timeout: the agent is in this process or on this machine.
const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Listed {
    sandboxes: Vec<Sandbox>,
}

#[derive(Debug, Deserialize)]
struct Sandbox {
    #[serde(default)]
    state: String,
}

/// Returns the number of sandboxes that the agent at `url` runs; `None` if it does not respond.
pub(super) async fn count(url: &str, token: &str) -> Option<usize> {
    let call = async {
        // A unary call of the Connect protocol is a plain POST of JSON.
        reqwest::Client::builder()
            .no_proxy()
            .build()?
            .post(format!("{url}/hostagent.v1.HostAgentService/ListSandboxes"))
            .bearer_auth(token)
            .header("Content-Type", "application/json")
            .body("{}")
            .send()
            .await?
            .error_for_status()?
            .json::<Listed>()
            .await
    };
    let listed = tokio::time::timeout(TIMEOUT, call).await.ok()?.ok()?;
    Some(listed.sandboxes.iter().filter(|s| s.runs()).count())
}

impl Sandbox {
    fn runs(&self) -> bool {
        matches!(
            self.state.as_str(),
            "SANDBOX_STATE_STARTING" | "SANDBOX_STATE_RUNNING"
        )
    }
}
