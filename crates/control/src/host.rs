//! What the host has: asked of its agent, remembered briefly.
//!
//! Owns the last answer and the copy of its templates in the database, which lists them while the agent is away.
//! Never decides on free memory or disk: the agent does, when it is asked to create.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use wrenn_proto::{
    rest::Template,
    rpc::hostagent::v1::{GetHostResponse, TemplateInfo, TemplateKind},
};

use crate::{
    agent_client::{AgentClient, AgentError},
    clock,
    db::Db,
};

/// How long an answer holds. A template built a moment ago must soon be known.
const FRESH: Duration = Duration::from_secs(1);

/// How long a failure holds: for those who waited for it. The host may be back already.
const FAILURE_FRESH: Duration = Duration::from_millis(100);

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
    last: Mutex<Option<Asked>>,
}

/// What the agent said, when.
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
    pub(crate) fn new(agent: AgentClient, db: Db) -> Self {
        Self {
            agent,
            db,
            last: Mutex::new(None),
        }
    }

    /// Forgets the last answer: what the host has was changed just now. Waits for a question that is under way.
    pub(crate) async fn changed(&self) {
        *self.last.lock().await = None;
    }

    /// What the host has, as of a second ago at most. Callers at the same time share one question, and its failure: they do
    /// not wait one after the other for a host that does not answer.
    pub(crate) async fn facts(&self) -> Result<HostFacts, AgentError> {
        let mut last = self.last.lock().await;
        if let Some(asked) = last.as_ref()
            && asked.holds()
        {
            return asked.answer.clone();
        }
        let answer = self.agent.host().await.map(HostFacts::from);
        if let Ok(facts) = &answer {
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
        if let Err(error) = self.db.sync_templates(&facts.templates).await {
            // The list of templates is then an old one; creating goes by the agent's answer.
            tracing::warn!(%error, "cannot store the templates");
        }
    }
}

/// What a template is called that sandboxes boot from.
pub(crate) const BASE: &str = "base";

/// What a template is called that is a frozen moment of a sandbox.
pub(crate) const SNAPSHOT: &str = "snapshot";

/// A template as the API shows it.
pub(crate) fn template(info: TemplateInfo) -> Template {
    let frozen = info.kind.as_known() == Some(TemplateKind::TEMPLATE_KIND_SNAPSHOT);
    let given = |n: u32| (n > 0).then_some(n);
    Template {
        name: info.name,
        kind: if frozen { SNAPSHOT } else { BASE }.to_owned(),
        vcpus: given(info.vcpus),
        memory_mb: given(info.memory_mb),
        disk_size_mb: given(info.disk_size_mb),
        generation: given(info.generation),
        size_bytes: info.size_bytes,
        created_at: clock::timestamp(info.created_unix_ms),
    }
}

impl From<GetHostResponse> for HostFacts {
    fn from(host: GetHostResponse) -> Self {
        Self {
            cpu_count: host.cpu_count,
            memory_total_mib: host.memory_total_mib,
            templates: host.templates.into_iter().map(template).collect(),
        }
    }
}
