//! What the host has: asked of its agent, remembered briefly.
//!
//! Owns the last answer and the copy of its templates in the database, which lists them while the agent is away.
//! Never decides on free memory or disk: the agent does, when it is asked to create.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use wrenn_proto::{rest::Template, rpc::hostagent::v1::GetHostResponse};

use crate::{
    agent_client::{AgentClient, AgentError},
    clock,
    db::Db,
};

/// How long an answer holds. A template built a moment ago must soon be known.
const FRESH: Duration = Duration::from_secs(1);

/// What the host has.
#[derive(Debug, Clone)]
pub(crate) struct HostFacts {
    /// Number of its processors.
    pub(crate) cpu_count: u32,
    /// Its memory, MiB.
    pub(crate) memory_total_mib: u64,
    /// What sandboxes can be made from.
    pub(crate) templates: Vec<Template>,
}

/// The host, as last seen.
pub(crate) struct Host {
    agent: AgentClient,
    db: Db,
    last: Mutex<Option<(Instant, HostFacts)>>,
}

impl Host {
    pub(crate) fn new(agent: AgentClient, db: Db) -> Self {
        Self {
            agent,
            db,
            last: Mutex::new(None),
        }
    }

    /// What the host has, as of a second ago at most. Callers at the same time share one question.
    pub(crate) async fn facts(&self) -> Result<HostFacts, AgentError> {
        let mut last = self.last.lock().await;
        if let Some((when, facts)) = last.as_ref()
            && when.elapsed() < FRESH
        {
            return Ok(facts.clone());
        }
        let facts = HostFacts::from(self.agent.host().await?);
        let known = last.as_ref().map(|(_, known)| &known.templates);
        if known != Some(&facts.templates)
            && let Err(error) = self.db.sync_templates(&facts.templates).await
        {
            // The list of templates is then an old one; creating goes by the agent's answer.
            tracing::warn!(%error, "cannot store the templates");
        }
        *last = Some((Instant::now(), facts.clone()));
        Ok(facts)
    }
}

impl From<GetHostResponse> for HostFacts {
    fn from(host: GetHostResponse) -> Self {
        let templates = host.templates.into_iter().map(|template| Template {
            name: template.name,
            kind: "base".to_owned(),
            vcpus: (template.vcpus > 0).then_some(template.vcpus),
            memory_mb: (template.memory_mb > 0).then_some(template.memory_mb),
            size_bytes: template.size_bytes,
            created_at: clock::timestamp(template.created_unix_ms),
        });
        Self {
            cpu_count: host.cpu_count,
            memory_total_mib: host.memory_total_mib,
            templates: templates.collect(),
        }
    }
}
