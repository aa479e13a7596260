//! Rows of sandboxes.

use std::collections::BTreeMap;

use sqlx::{FromRow, Row as _, any::AnyRow};
use wrenn_api_types as rest;
use wrenn_model::SandboxId;
use wrenn_model::{BootTimes, Egress, OnTimeout, SandboxStatus};

use super::{Db, DbError, narrow, options::Options, run};
use crate::clock;

/// All columns. Their order is irrelevant.
macro_rules! columns {
    () => {
        "id, template, status, version, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, guest_ip, host_ip, \
         metadata, error, boot, created_at, started_at, last_active_at, last_updated, on_timeout, auto_resume, warning, \
         expires_at, envd_token, options, idempotency_key, host_id"
    };
}

pub(super) use columns;

/// Maximum number of rows per list.
pub(crate) const MAX_LIST: u32 = 1000;

/// Row of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    /// Sandbox id.
    pub(crate) id: SandboxId,
    /// Template that the sandbox was created from.
    pub(crate) template: String,
    /// Lifecycle status.
    pub(crate) status: SandboxStatus,
    /// Number of changes so far.
    pub(crate) version: i64,
    /// Number of virtual CPUs.
    pub(crate) vcpus: u32,
    /// Memory, in MiB.
    pub(crate) memory_mb: u32,
    /// Disk size as seen by the guest, in MiB.
    pub(crate) disk_size_mb: u32,
    /// Idle time until `on_timeout` is applied, in seconds; 0 means never.
    pub(crate) timeout_sec: u32,
    /// Action when the sandbox was idle for `timeout_sec` or has reached `expires_at`.
    pub(crate) on_timeout: OnTimeout,
    /// True if a call to the paused sandbox resumes it.
    pub(crate) auto_resume: bool,
    /// Network access to addresses beyond the host.
    pub(crate) egress: Egress,
    /// Address of the guest on its own link; empty if unknown.
    pub(crate) guest_ip: String,
    /// Address of the guest as seen from the host; empty if unknown.
    pub(crate) host_ip: String,
    /// User-defined key-value pairs.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Reason for the status `error`, or party that stopped the sandbox; otherwise empty.
    pub(crate) error: String,
    /// Last step that failed and left the sandbox unchanged; empty if there is none.
    pub(crate) warning: String,
    /// Durations of the phases of the boot.
    pub(crate) boot: Option<BootTimes>,
    /// Creation time, in milliseconds since 1970.
    pub(crate) created_at: i64,
    /// Time of the first start, in milliseconds since 1970; 0 before it.
    pub(crate) started_at: i64,
    /// Time of the last activity, in milliseconds since 1970; 0 before the first.
    pub(crate) last_active_at: i64,
    /// Time of the last change of the row, in milliseconds since 1970.
    pub(crate) last_updated: i64,
    /// Time at which `on_timeout` is applied regardless of activity, in milliseconds since 1970; 0
    /// means never.
    pub(crate) expires_at: i64,
    /// Token that the guest agent requires from its clients; empty before the first start.
    pub(crate) envd_token: String,
    /// Rarely used options.
    pub(crate) options: Options,
    /// Idempotency key of the request that created the sandbox; empty if it had none.
    pub(crate) idempotency_key: String,
    /// Host that has the sandbox; [`UNKNOWN_HOST`] in a row of an earlier release.
    pub(crate) host_id: String,
}

/// Host of a row that was written before hosts had ids.
pub(crate) const UNKNOWN_HOST: &str = "default";

impl Sandbox {
    /// True if another host than `here` has the sandbox. An unknown host does not count as another
    /// one.
    pub(crate) fn is_on_other_host(&self, here: &str) -> bool {
        !here.is_empty() && self.host_id != UNKNOWN_HOST && self.host_id != here
    }

    /// Starts the lifetime anew, with the length that the resume in progress requests, otherwise
    /// with the length from the sandbox's creation. A sandbox without a lifetime has no deadline
    /// afterwards.
    pub(crate) fn renew_lifetime(&mut self, now_ms: i64) {
        let asked = self.options.resuming.and_then(|how| how.lifetime_sec);
        let own = Some(self.options.lifetime_sec).filter(|sec| *sec > 0);
        self.expires_at = asked
            .or(own)
            .map_or(0, |sec| now_ms + i64::from(sec) * 1000);
    }

    /// True if a call to the paused sandbox resumes it. A sandbox that was paused without its
    /// memory would boot. Only its user may request that, because a call expects the processes that
    /// ran before.
    pub(crate) fn wakes(&self) -> bool {
        self.auto_resume && !self.options.paused_disk_only
    }

    /// Converts the row to its representation in the API.
    pub(crate) fn into_rest(self) -> rest::Sandbox {
        let given = |text: String| (!text.is_empty()).then_some(text);
        rest::Sandbox {
            id: self.id.into(),
            status: self.status,
            template: self.template,
            vcpus: self.vcpus,
            memory_mb: self.memory_mb,
            disk_size_mb: self.disk_size_mb,
            timeout_sec: self.timeout_sec,
            on_timeout: self.on_timeout,
            auto_resume: self.auto_resume,
            egress: self.egress,
            guest_ip: given(self.guest_ip),
            host_ip: given(self.host_ip),
            metadata: self.metadata,
            error: given(self.error),
            warning: given(self.warning),
            boot: self.boot,
            created_at: clock::timestamp(self.created_at),
            started_at: clock::optional_timestamp(self.started_at),
            last_active_at: clock::optional_timestamp(self.last_active_at),
            last_updated: clock::timestamp(self.last_updated),
            expires_at: clock::optional_timestamp(self.expires_at),
        }
    }
}

/// Row in the types of the database.
#[derive(FromRow)]
pub(super) struct Stored {
    id: String,
    template: String,
    status: String,
    version: i64,
    vcpus: i64,
    memory_mb: i64,
    disk_size_mb: i64,
    timeout_sec: i64,
    egress: String,
    guest_ip: String,
    host_ip: String,
    metadata: String,
    error: String,
    boot: String,
    created_at: i64,
    started_at: i64,
    last_active_at: i64,
    last_updated: i64,
    on_timeout: String,
    auto_resume: i64,
    warning: String,
    expires_at: i64,
    envd_token: String,
    options: String,
    idempotency_key: String,
    host_id: String,
}

impl TryFrom<Stored> for Sandbox {
    type Error = DbError;

    fn try_from(row: Stored) -> Result<Self, DbError> {
        let corrupt = |field| DbError::Corrupt {
            id: row.id.clone(),
            field,
        };
        Ok(Self {
            id: row.id.parse().map_err(|_| corrupt("id"))?,
            status: SandboxStatus::parse(&row.status).ok_or_else(|| corrupt("status"))?,
            vcpus: narrow(&row.id, "vcpus", row.vcpus)?,
            memory_mb: narrow(&row.id, "memory_mb", row.memory_mb)?,
            disk_size_mb: narrow(&row.id, "disk_size_mb", row.disk_size_mb)?,
            timeout_sec: narrow(&row.id, "timeout_sec", row.timeout_sec)?,
            egress: row.egress.parse().map_err(|_| corrupt("egress"))?,
            on_timeout: row.on_timeout.parse().map_err(|_| corrupt("on_timeout"))?,
            auto_resume: row.auto_resume != 0,
            warning: row.warning,
            metadata: serde_json::from_str(&row.metadata).map_err(|_| corrupt("metadata"))?,
            boot: match row.boot.as_str() {
                "" => None,
                text => Some(serde_json::from_str(text).map_err(|_| corrupt("boot"))?),
            },
            template: row.template,
            version: row.version,
            guest_ip: row.guest_ip,
            host_ip: row.host_ip,
            error: row.error,
            created_at: row.created_at,
            started_at: row.started_at,
            last_active_at: row.last_active_at,
            last_updated: row.last_updated,
            expires_at: row.expires_at,
            envd_token: row.envd_token,
            options: serde_json::from_str(&row.options).map_err(|_| corrupt("options"))?,
            idempotency_key: row.idempotency_key,
            host_id: row.host_id,
        })
    }
}

fn json(value: &impl serde::Serialize) -> String {
    // Maps of strings and structs of numbers can always be serialized as JSON.
    serde_json::to_string(value).unwrap_or_default()
}

fn boot_json(boot: Option<&BootTimes>) -> String {
    boot.map(json).unwrap_or_default()
}

const fn egress_word(egress: Egress) -> &'static str {
    match egress {
        Egress::Deny => "deny",
        Egress::Allow => "allow",
    }
}

impl Db {
    /// Inserts a row with version 0.
    pub(crate) async fn insert_sandbox(&self, row: &Sandbox) -> Result<(), DbError> {
        let query = sqlx::query(
            "INSERT INTO sandboxes (id, template, status, version, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
             metadata, created_at, last_updated, on_timeout, auto_resume, expires_at, options, idempotency_key, \
             host_id) VALUES ($1, $2, $3, 0, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
        )
        .bind(row.id.to_string())
        .bind(row.template.clone())
        .bind(row.status.as_str())
        .bind(i64::from(row.vcpus))
        .bind(i64::from(row.memory_mb))
        .bind(i64::from(row.disk_size_mb))
        .bind(i64::from(row.timeout_sec))
        .bind(egress_word(row.egress))
        .bind(json(&row.metadata))
        .bind(row.created_at)
        .bind(row.last_updated)
        .bind(row.on_timeout.as_str())
        .bind(i64::from(row.auto_resume))
        .bind(row.expires_at)
        .bind(json(&row.options))
        .bind(row.idempotency_key.clone())
        .bind(row.host_id.clone());
        run("store the sandbox", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Returns the row of a sandbox.
    pub(crate) async fn sandbox(&self, id: &SandboxId) -> Result<Option<Sandbox>, DbError> {
        let query = sqlx::query_as::<_, Stored>(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE id = $1"
        ))
        .bind(id.to_string());
        let row = run("read the sandbox", query.fetch_optional(&self.pool)).await?;
        row.map(Sandbox::try_from).transpose()
    }

    /// Returns the rows with one of these statuses, newest first, at most `limit`.
    pub(crate) async fn sandboxes(
        &self,
        statuses: &[SandboxStatus],
        limit: u32,
    ) -> Result<Vec<Sandbox>, DbError> {
        let Some(&first) = statuses.first() else {
            return Ok(Vec::new());
        };
        let mut query = sqlx::query_as::<_, Stored>(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE status IN ($1, $2, $3, $4, $5, $6, $7, $8, $9) ORDER BY created_at DESC, id DESC LIMIT $10"
        ));
        // The statement has one placeholder per status that exists. Those that are left repeat the
        // first status.
        for place in 0..SandboxStatus::ALL.len() {
            query = query.bind(statuses.get(place).unwrap_or(&first).as_str());
        }
        let query = query.bind(i64::from(limit));
        let rows = run("list the sandboxes", query.fetch_all(&self.pool)).await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// Returns the row that the request with this idempotency key created, if there is one.
    pub(crate) async fn sandbox_by_idempotency_key(
        &self,
        key: &str,
    ) -> Result<Option<Sandbox>, DbError> {
        let query = sqlx::query_as::<_, Stored>(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE idempotency_key = $1"
        ))
        .bind(key.to_owned());
        let row = run("find the idempotency key", query.fetch_optional(&self.pool)).await?;
        row.map(Sandbox::try_from).transpose()
    }

    /// Returns the tokens of the guest agents of all sandboxes that run or are paused.
    pub(crate) async fn envd_tokens(&self) -> Result<Vec<(SandboxId, String)>, DbError> {
        let query = sqlx::query_as::<_, (String, String)>(
            "SELECT id, envd_token FROM sandboxes \
             WHERE status IN ('running', 'pausing', 'paused', 'resuming') AND envd_token <> ''",
        );
        let rows = run("read the guest agents' tokens", query.fetch_all(&self.pool)).await?;
        let known = |(id, token): (String, String)| Some((id.parse().ok()?, token));
        Ok(rows.into_iter().filter_map(known).collect())
    }

    /// Releases the idempotency key of a sandbox that its client never received, so that another
    /// request may use the key.
    pub(crate) async fn release_idempotency_key(&self, id: &SandboxId) -> Result<(), DbError> {
        let query = sqlx::query("UPDATE sandboxes SET idempotency_key = '' WHERE id = $1")
            .bind(id.to_string());
        run("release the idempotency key", query.execute(&self.pool)).await?;
        Ok(())
    }

    /// Returns running sandboxes with a deadline, earliest deadline first.
    pub(crate) async fn expiring(&self, limit: u32) -> Result<Vec<Sandbox>, DbError> {
        let query = sqlx::query_as::<_, Stored>(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE status = 'running' AND expires_at > 0 ORDER BY expires_at LIMIT $1"
        ))
        .bind(i64::from(limit));
        let rows = run("list the deadlines", query.fetch_all(&self.pool)).await?;
        rows.into_iter().map(Sandbox::try_from).collect()
    }

    /// Writes the columns of a row that may change, if the row still has the version that was read.
    /// Returns false otherwise.
    pub(crate) async fn update_sandbox(&self, row: &Sandbox) -> Result<bool, DbError> {
        let query = sqlx::query(
            "UPDATE sandboxes SET status = $1, guest_ip = $2, host_ip = $3, error = $4, boot = $5, started_at = $6, \
             last_active_at = $7, last_updated = $8, warning = $9, expires_at = $10, envd_token = $11, options = $12, \
             egress = $13, on_timeout = $14, auto_resume = $15, host_id = $16, version = version + 1 \
             WHERE id = $17 AND version = $18",
        )
        .bind(row.status.as_str())
        .bind(row.guest_ip.clone())
        .bind(row.host_ip.clone())
        .bind(row.error.clone())
        .bind(boot_json(row.boot.as_ref()))
        .bind(row.started_at)
        .bind(row.last_active_at)
        .bind(row.last_updated)
        .bind(row.warning.clone())
        .bind(row.expires_at)
        .bind(row.envd_token.clone())
        .bind(json(&row.options))
        .bind(egress_word(row.egress))
        .bind(row.on_timeout.as_str())
        .bind(i64::from(row.auto_resume))
        .bind(row.host_id.clone())
        .bind(row.id.to_string())
        .bind(row.version);
        let done = run("update the sandbox", query.execute(&self.pool)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes newer data of the host to a row, if the row still has the version that was read.
    /// Returns false otherwise. The data is not a change of the sandbox, so the version stays the
    /// same.
    pub(crate) async fn refresh_sandbox(&self, row: &Sandbox) -> Result<bool, DbError> {
        let query = sqlx::query(
            "UPDATE sandboxes SET guest_ip = $1, host_ip = $2, boot = $3, last_active_at = $4, warning = $5, \
             host_id = $6 WHERE id = $7 AND version = $8",
        )
        .bind(row.guest_ip.clone())
        .bind(row.host_ip.clone())
        .bind(boot_json(row.boot.as_ref()))
        .bind(row.last_active_at)
        .bind(row.warning.clone())
        .bind(row.host_id.clone())
        .bind(row.id.to_string())
        .bind(row.version);
        let done = run("refresh the sandbox", query.execute(&self.pool)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Removes the row of a sandbox that was never created, if the row still has this version.
    /// Returns false otherwise.
    pub(crate) async fn remove_sandbox(
        &self,
        id: &SandboxId,
        version: i64,
    ) -> Result<bool, DbError> {
        let query = sqlx::query("DELETE FROM sandboxes WHERE id = $1 AND version = $2")
            .bind(id.to_string())
            .bind(version);
        let done = run("remove the sandbox", query.execute(&self.pool)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Checks that the database answers.
    pub(crate) async fn ping(&self) -> Result<(), DbError> {
        let row: AnyRow = run(
            "run a test query",
            sqlx::query("SELECT 1 AS one").fetch_one(&self.pool),
        )
        .await?;
        row.try_get::<i64, _>("one")
            .map(drop)
            .map_err(|source| DbError::Query {
                what: "run a test query",
                source,
            })
    }
}
