//! Database in one of the systems: a pool of connections that runs statements within a deadline.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use sqlx::{Pool, migrate::MigrateError, pool::PoolOptions};
use tokio::time::timeout;
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use crate::{
    ApiKey, Database, DbError, DeadlineRow, EndedRow, Owner, Page, Sandbox, StateRow, Template,
    api_key,
    backend::{Backend, Record},
    installation, page, sandbox,
    statement::Statement,
    template,
};

/// Maximum duration of a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum duration of an update of the schema, with the wait for another control plane that
/// updates it.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);

/// Maximum time that a caller waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of connections. SQLite has one writer at a time regardless of this number;
/// readers run beside it.
const MAX_CONNECTIONS: u32 = 8;

/// Number of tokens of an earlier release that are hashed per query.
const HASHED_AT_ONCE: u32 = 500;

/// Opened database.
#[derive(Debug)]
pub(crate) struct Store<B: Backend> {
    pool: Pool<B>,
    flush: Option<&'static str>,
}

impl<B: Backend> Store<B> {
    /// Returns the database of a pool. `flush` is the statement of [`Database::keep`], if one is
    /// needed.
    pub(crate) const fn new(pool: Pool<B>, flush: Option<&'static str>) -> Self {
        Self { pool, flush }
    }

    /// Hashes the tokens that an earlier release stored without a hash.
    pub(crate) async fn hash_tokens(&self) -> Result<(), DbError> {
        loop {
            let statement = sandbox::statements::without_token_hash(HASHED_AT_ONCE);
            let rows: Vec<(String, String)> = self.fetch(statement).await?;
            if rows.is_empty() {
                return Ok(());
            }
            for (id, token) in rows {
                self.execute(sandbox::statements::set_token_hash(&id, &token))
                    .await?;
            }
        }
    }

    /// Reads ids with their tokens.
    async fn fetch_tokens(
        &self,
        statement: Statement<B>,
    ) -> Result<Vec<(SandboxId, String)>, DbError> {
        let rows = self.fetch(statement).await?;
        let known = |(id, token): (String, String)| Some((id.parse().ok()?, token));
        Ok(rows.into_iter().filter_map(known).collect())
    }

    /// Runs a statement. Returns the number of changed rows.
    async fn execute(&self, statement: Statement<B>) -> Result<u64, DbError> {
        let Statement { what, sql, .. } = statement;
        let arguments = statement.arguments()?;
        within_deadline(what, B::execute(&self.pool, sql, arguments)).await
    }

    /// Runs a statement and reads its rows.
    async fn fetch<R: Record>(&self, statement: Statement<B>) -> Result<Vec<R>, DbError> {
        let Statement { what, sql, .. } = statement;
        let arguments = statement.arguments()?;
        let rows = within_deadline(what, B::fetch(&self.pool, sql, arguments)).await?;
        rows.iter().map(|row| B::read(what, row)).collect()
    }

    /// Runs a statement whose result has one column.
    async fn fetch_texts(&self, statement: Statement<B>) -> Result<Vec<String>, DbError> {
        let rows = self.fetch::<(String,)>(statement).await?;
        Ok(rows.into_iter().map(|(text,)| text).collect())
    }
}

/// Returns the limits of a pool.
pub(crate) fn pool_options<B: Backend>() -> PoolOptions<B> {
    PoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
}

/// Runs an update of the schema with its deadline, and converts its error.
pub(crate) async fn update_schema(
    update: impl Future<Output = Result<(), MigrateError>>,
) -> Result<(), DbError> {
    match timeout(MIGRATE_TIMEOUT, update).await {
        Ok(result) => result.map_err(|source| DbError::Migrate { source }),
        Err(_) => Err(DbError::TimedOut {
            what: "update the schema",
            limit: MIGRATE_TIMEOUT,
        }),
    }
}

/// Runs a query with its deadline, and converts its error.
async fn within_deadline<T>(
    what: &'static str,
    query: impl Future<Output = sqlx::Result<T>>,
) -> Result<T, DbError> {
    match timeout(QUERY_TIMEOUT, query).await {
        Ok(result) => result.map_err(|error| DbError::of_query(what, error)),
        Err(_) => Err(DbError::TimedOut {
            what,
            limit: QUERY_TIMEOUT,
        }),
    }
}

#[async_trait]
impl<B: Backend> Database for Store<B> {
    async fn insert_sandbox(&self, row: &Sandbox) -> Result<(), DbError> {
        self.execute(sandbox::statements::insert(row)).await?;
        Ok(())
    }

    async fn sandbox(&self, owner: Owner<'_>, id: &SandboxId) -> Result<Option<Sandbox>, DbError> {
        let statement = sandbox::statements::by_id(owner, id);
        Ok(self.fetch(statement).await?.pop())
    }

    async fn sandboxes(
        &self,
        owner: Owner<'_>,
        statuses: &[SandboxStatus],
        limit: u32,
    ) -> Result<Vec<Sandbox>, DbError> {
        match sandbox::statements::by_status(owner, statuses, limit) {
            Some(statement) => self.fetch(statement).await,
            None => Ok(Vec::new()),
        }
    }

    async fn states(&self, statuses: &[SandboxStatus]) -> Result<Vec<StateRow>, DbError> {
        match sandbox::statements::states(statuses) {
            Some(statement) => self.fetch(statement).await,
            None => Ok(Vec::new()),
        }
    }

    async fn ended(
        &self,
        host_ids: [&str; 2],
        before_ms: i64,
        after: Option<(i64, &SandboxId)>,
        limit: u32,
    ) -> Result<Vec<EndedRow>, DbError> {
        let statement = sandbox::statements::ended(host_ids, before_ms, after, limit);
        self.fetch(statement).await
    }

    async fn page(&self, page: Page<'_>) -> Result<Vec<Sandbox>, DbError> {
        match page::select(&page) {
            Some(statement) => self.fetch(statement).await,
            None => Ok(Vec::new()),
        }
    }

    async fn running_count(
        &self,
        team: &TeamId,
        template: &str,
        started_from: i64,
    ) -> Result<u64, DbError> {
        let statement = page::count_running(team, template, started_from);
        let count = self.fetch::<(i64,)>(statement).await?.pop();
        Ok(count.map_or(0, |(count,)| u64::try_from(count).unwrap_or(0)))
    }

    async fn running_metadata(
        &self,
        team: &TeamId,
        template: &str,
        started_from: i64,
    ) -> Result<Vec<BTreeMap<String, String>>, DbError> {
        let statement = page::running_metadata(team, template, started_from);
        let rows = self.fetch::<sandbox::MetadataRow>(statement).await?;
        Ok(rows.into_iter().map(|row| row.metadata).collect())
    }

    async fn deadlines(&self) -> Result<Vec<DeadlineRow>, DbError> {
        self.fetch(sandbox::statements::deadlines()).await
    }

    async fn envd_tokens(&self) -> Result<Vec<(SandboxId, String)>, DbError> {
        self.fetch_tokens(sandbox::statements::envd_tokens()).await
    }

    async fn sandboxes_by_token(&self, token: &str) -> Result<Vec<(SandboxId, String)>, DbError> {
        self.fetch_tokens(sandbox::statements::by_token(token))
            .await
    }

    async fn sandbox_by_idempotency_key(
        &self,
        team: &TeamId,
        key: &str,
    ) -> Result<Option<Sandbox>, DbError> {
        let statement = sandbox::statements::by_idempotency_key(team, key);
        Ok(self.fetch(statement).await?.pop())
    }

    async fn release_idempotency_key(&self, id: &SandboxId) -> Result<(), DbError> {
        let statement = sandbox::statements::release_idempotency_key(id);
        self.execute(statement).await?;
        Ok(())
    }

    async fn update_sandbox(&self, row: &Sandbox) -> Result<bool, DbError> {
        Ok(self.execute(sandbox::statements::update(row)).await? == 1)
    }

    async fn refresh_sandbox(&self, row: &Sandbox) -> Result<bool, DbError> {
        Ok(self.execute(sandbox::statements::refresh(row)).await? == 1)
    }

    async fn remove_sandbox(&self, id: &SandboxId, version: i64) -> Result<bool, DbError> {
        let statement = sandbox::statements::delete(id, version);
        Ok(self.execute(statement).await? == 1)
    }

    async fn templates(&self) -> Result<Vec<Template>, DbError> {
        self.fetch(template::statements::all()).await
    }

    async fn sync_templates(&self, host_id: &str, present: &[Template]) -> Result<(), DbError> {
        let stored = template::statements::names_of_host(host_id);
        for name in self.fetch_texts(stored).await? {
            if present.iter().all(|t| t.name != name) {
                self.execute(template::statements::delete(&name)).await?;
            }
        }
        for template in present {
            let statement = template::statements::upsert(host_id, template);
            self.execute(statement).await?;
        }
        Ok(())
    }

    async fn record_snapshot(
        &self,
        host_id: &str,
        snapshot: &Template,
        sandbox: &str,
    ) -> Result<(), DbError> {
        let store = template::statements::upsert(host_id, snapshot);
        self.execute(store).await?;
        let record = template::statements::set_source(&snapshot.name, sandbox);
        self.execute(record).await?;
        Ok(())
    }

    async fn templates_of(&self, sandbox: &str) -> Result<Vec<String>, DbError> {
        let statement = template::statements::names_of_sandbox(sandbox);
        self.fetch_texts(statement).await
    }

    async fn insert_api_key(&self, key: &ApiKey) -> Result<(), DbError> {
        self.execute(api_key::statements::insert(key)).await?;
        Ok(())
    }

    async fn api_keys(&self, team: &TeamId) -> Result<Vec<ApiKey>, DbError> {
        self.fetch(api_key::statements::of_team(team)).await
    }

    async fn api_keys_by_prefix(&self, prefix: &str) -> Result<Vec<ApiKey>, DbError> {
        self.fetch(api_key::statements::by_prefix(prefix)).await
    }

    async fn touch_api_key(&self, id: &str, now_ms: i64) -> Result<(), DbError> {
        self.execute(api_key::statements::touch(id, now_ms)).await?;
        Ok(())
    }

    async fn delete_api_key(&self, team: &TeamId, id: &str) -> Result<bool, DbError> {
        let statement = api_key::statements::delete_unless_last(team, id);
        Ok(self.execute(statement).await? == 1)
    }

    async fn drop_api_key(&self, id: &str) -> Result<(), DbError> {
        self.execute(api_key::statements::delete(id)).await?;
        Ok(())
    }

    async fn installation_id(&self) -> Result<String, DbError> {
        self.execute(installation::insert()).await?;
        let mut ids = self.fetch_texts(installation::select()).await?;
        ids.pop().ok_or(DbError::Query {
            what: "read the installation id",
            source: sqlx::Error::RowNotFound,
        })
    }

    async fn keep(&self) -> Result<(), DbError> {
        if let Some(sql) = self.flush {
            self.execute(Statement::new("flush the write-ahead log", sql))
                .await?;
        }
        Ok(())
    }

    async fn ping(&self) -> Result<(), DbError> {
        self.execute(Statement::new("run a test query", "SELECT 1"))
            .await?;
        Ok(())
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}
