//! State of the host, queried from its agent and cached briefly.
//!
//! Owns the last answer, and the copy of the host's templates in the database, which is listed
//! while the agent is unavailable. Never decides on free memory or disk; the agent does, when it
//! receives a create.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use wrenn_db::{Db, Template};
use wrenn_proto::rpc::hostagent::v1::{GetHostResponse, TemplateInfo, TemplateKind};

use crate::agent_client::{AgentClient, AgentError};

/// Validity of an answer. A newly built template must become visible soon.
const FRESH: Duration = Duration::from_secs(1);

/// Validity of a failure, for callers that waited for it. The host may be back already.
const FAILURE_FRESH: Duration = Duration::from_millis(100);

/// Maximum time that a caller waits for the accelerator. A health check must be answered while the
/// agent is silent.
const FIRST_ANSWER: Duration = Duration::from_millis(500);

/// Properties of the host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Accelerator of VMs that start: `kvm` or `tcg`.
    pub accel: String,
    /// Number of processors.
    pub cpu_count: u32,
    /// Total memory, in MiB.
    pub memory_total_mib: u64,
    /// Templates that sandboxes can be created from.
    pub templates: Vec<Template>,
}

/// Host, as last observed.
pub struct Host {
    agent: AgentClient,
    db: Db,
    last: Mutex<Option<Asked>>,
    /// Accelerator that the agent last reported; empty if it never answered.
    accel: parking_lot::Mutex<String>,
}

/// Last answer of the agent, with its time.
struct Asked {
    when: Instant,
    answer: Result<HostFacts, AgentError>,
}

impl Asked {
    fn holds(&self) -> bool {
        let limit = match self.answer {
            Ok(_) => FRESH,
            Err(_) => FAILURE_FRESH,
        };
        self.when.elapsed() < limit
    }
}

impl Host {
    /// Returns the host of an agent.
    pub fn new(agent: AgentClient, db: Db) -> Self {
        Self {
            agent,
            db,
            last: Mutex::new(None),
            accel: parking_lot::Mutex::default(),
        }
    }

    /// Discards the last answer, because the state of the host has just changed. Waits for a query
    /// in progress.
    pub async fn changed(&self) {
        *self.last.lock().await = None;
    }

    /// Returns the accelerator that the agent last reported; empty if it does not answer soon. Only
    /// the first call waits for the agent.
    pub async fn accel(&self) -> String {
        let known = self.accel.lock().clone();
        if !known.is_empty() {
            return known;
        }
        match tokio::time::timeout(FIRST_ANSWER, self.facts()).await {
            Ok(Ok(facts)) => facts.accel,
            Ok(Err(_)) | Err(_) => String::new(),
        }
    }

    /// Returns the properties of the host, at most one second old. Concurrent callers share one
    /// query and its failure, so they do not wait one after another for a host that does not
    /// answer.
    pub async fn facts(&self) -> Result<HostFacts, AgentError> {
        let mut last = self.last.lock().await;
        if let Some(asked) = last.as_ref()
            && asked.holds()
        {
            return asked.answer.clone();
        }
        let answer = self.agent.host().await.map(HostFacts::from);
        if let Ok(facts) = &answer {
            self.accel.lock().clone_from(&facts.accel);
            let known = last.as_ref().and_then(|asked| asked.answer.as_ref().ok());
            self.store_templates(facts, known).await;
        }
        let when = Instant::now();
        *last = Some(Asked {
            when,
            answer: answer.clone(),
        });
        answer
    }

    async fn store_templates(&self, facts: &HostFacts, known: Option<&HostFacts>) {
        if known.is_some_and(|known| known.templates == facts.templates) {
            return;
        }
        if let Err(error) = self
            .db
            .sync_templates(&self.agent.row_host_id(), &facts.templates)
            .await
        {
            // The stored list of templates is then outdated. Creates use the agent's answer.
            tracing::warn!(%error, "failed to store the templates");
        }
    }
}

/// Kind of a template that sandboxes boot from.
pub const BASE: &str = "base";

/// Kind of a template that is a snapshot of a sandbox.
pub const SNAPSHOT: &str = "snapshot";

/// Converts a template that the host reports.
pub fn template(info: TemplateInfo) -> Template {
    let is_snapshot = info.kind.as_known() == Some(TemplateKind::TEMPLATE_KIND_SNAPSHOT);
    Template {
        name: info.name,
        kind: if is_snapshot { SNAPSHOT } else { BASE }.to_owned(),
        vcpus: info.vcpus,
        memory_mb: info.memory_mb,
        disk_size_mb: info.disk_size_mb,
        generation: info.generation,
        size_bytes: info.size_bytes,
        created_at: info.created_unix_ms,
    }
}

impl From<GetHostResponse> for HostFacts {
    fn from(host: GetHostResponse) -> Self {
        Self {
            accel: host.accel,
            cpu_count: host.cpu_count,
            memory_total_mib: host.memory_total_mib,
            templates: host.templates.into_iter().map(template).collect(),
        }
    }
}
