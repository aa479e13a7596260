//! Examination of a host's network without an agent, for `wrenn doctor`. Changes nothing.

use super::{
    NetworkError, addresses::Subnets, firewall::Obstacle, host_network::read_surroundings,
    obstacles, on_own_thread, subnets,
};

/// Findings about the network of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkReport {
    /// Subnets that sandboxes would get; the error names the conflict and the setting.
    pub subnets: Result<Subnets, String>,
    /// Firewall that blocks the traffic of sandboxes; the error is the reason why that is unknown.
    pub obstacle: Result<Option<Obstacle>, String>,
}

/// Examines the network of this host, for sandboxes with the operator's subnets, if there are any.
///
/// # Errors
/// The reason why the host's routes cannot be read.
pub async fn examine(wanted: Option<Subnets>) -> Result<NetworkReport, String> {
    let examined = on_own_thread(move || async move {
        let surroundings = read_surroundings().await?;
        let chosen = subnets::choose(wanted, &surroundings).map_err(|error| error.to_string());
        let subnets = *chosen.as_ref().unwrap_or(&Subnets::DEFAULT);
        let obstacle = obstacles::search(subnets).await;
        Ok(NetworkReport {
            subnets: chosen,
            obstacle: obstacle.map_err(|error| report(&error)),
        })
    });
    examined.await.map_err(|error| report(&error))
}

fn report(error: &NetworkError) -> String {
    thiserror_ext::AsReport::to_report_string(error)
}
