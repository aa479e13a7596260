//! Statements on sandboxes.

use sqlx::types::Json;
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use super::{Sandbox, columns, token_hash};
use crate::{backend::Backend, owner::Owner, statement::Statement, word::egress_word};

/// Inserts a row with version 0.
pub(crate) fn insert<B: Backend>(row: &Sandbox) -> Statement<B> {
    Statement::new(
        "store the sandbox",
        "INSERT INTO sandboxes (id, template, status, version, vcpus, memory_mb, disk_size_mb, timeout_sec, egress, \
         metadata, created_at, last_updated, on_timeout, auto_resume, expires_at, options, idempotency_key, \
         host_id, team_id) VALUES ($1, $2, $3, 0, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)",
    )
    .bind(row.id.as_str())
    .bind(&*row.template)
    .bind(row.status.as_str())
    .bind(i64::from(row.size.vcpus))
    .bind(i64::from(row.size.memory_mib))
    .bind(i64::from(row.size.disk_mib))
    .bind(i64::from(row.timeout_sec))
    .bind(egress_word(row.egress))
    .bind(Json(&row.metadata))
    .bind(row.created_at)
    .bind(row.last_updated)
    .bind(row.on_timeout.as_str())
    .bind(row.auto_resume)
    .bind(row.expires_at)
    .bind(Json(&row.options))
    .bind(&*row.idempotency_key)
    .bind(&*row.host_id)
    .bind(row.team.as_str())
}

/// Selects the row of a sandbox.
pub(crate) fn by_id<B: Backend>(owner: Owner<'_>, id: &SandboxId) -> Statement<B> {
    Statement::new(
        "read the sandbox",
        concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE id = $1 AND ($2 = '' OR team_id = $2)"
        ),
    )
    .bind(id.as_str())
    .bind(owner.as_param())
}

/// Selects the rows with one of these statuses, newest first; `None` if there is no status.
pub(crate) fn by_status<B: Backend>(
    owner: Owner<'_>,
    statuses: &[SandboxStatus],
    limit: u32,
) -> Option<Statement<B>> {
    let first = statuses.first()?;
    let mut statement = Statement::new(
        "list the sandboxes",
        concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE status IN ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
             AND ($10 = '' OR team_id = $10) ORDER BY created_at DESC, id DESC LIMIT $11"
        ),
    );
    // The statement has one placeholder per existing status. The remaining placeholders repeat
    // the first status.
    for place in 0..SandboxStatus::ALL.len() {
        statement = statement.bind(statuses.get(place).unwrap_or(first).as_str());
    }
    Some(statement.bind(owner.as_param()).bind(i64::from(limit)))
}

/// Selects the states of the sandboxes with one of these statuses; `None` if there is no status.
pub(crate) fn states<B: Backend>(statuses: &[SandboxStatus]) -> Option<Statement<B>> {
    let first = statuses.first()?;
    let mut statement = Statement::new(
        "read the states of the sandboxes",
        "SELECT id, status, version, timeout_sec, started_at, last_active_at, host_id, \
         warning <> '' AS is_warned FROM sandboxes WHERE status IN ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    );
    for place in 0..SandboxStatus::ALL.len() {
        statement = statement.bind(statuses.get(place).unwrap_or(first).as_str());
    }
    Some(statement)
}

/// Selects rows of one of two hosts that ended before a time, the earliest first.
pub(crate) fn ended<B: Backend>(
    host_ids: [&str; 2],
    before_ms: i64,
    after: Option<(i64, &SandboxId)>,
    limit: u32,
) -> Statement<B> {
    let (time, id) = after.map_or((-1, ""), |(time, id)| (time, id.as_str()));
    Statement::new(
        "list the sandboxes that have ended",
        "SELECT id, version, last_updated FROM sandboxes WHERE status IN ('stopped', 'error') \
         AND last_updated < $1 AND host_id IN ($2, $3) \
         AND (last_updated > $4 OR (last_updated = $4 AND id > $5)) ORDER BY last_updated, id LIMIT $6",
    )
    .bind(before_ms)
    .bind(host_ids[0])
    .bind(host_ids[1])
    .bind(time)
    .bind(id)
    .bind(i64::from(limit))
}

/// Selects the row that the team's request with this idempotency key created.
pub(crate) fn by_idempotency_key<B: Backend>(team: &TeamId, key: &str) -> Statement<B> {
    Statement::new(
        "find the idempotency key",
        concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE team_id = $1 AND idempotency_key = $2"
        ),
    )
    .bind(team.as_str())
    .bind(key)
}

/// Removes the idempotency key of a row.
pub(crate) fn release_idempotency_key<B: Backend>(id: &SandboxId) -> Statement<B> {
    Statement::new(
        "release the idempotency key",
        "UPDATE sandboxes SET idempotency_key = '' WHERE id = $1",
    )
    .bind(id.as_str())
}

/// Selects ids and tokens of all sandboxes that run or are paused.
pub(crate) fn envd_tokens<B: Backend>() -> Statement<B> {
    Statement::new(
        "read the guest agents' tokens",
        "SELECT id, envd_token FROM sandboxes \
         WHERE status IN ('running', 'pausing', 'paused', 'resuming') AND envd_token <> ''",
    )
}

/// Selects ids and tokens of all sandboxes with this token, newest first.
pub(crate) fn by_token<B: Backend>(token: &str) -> Statement<B> {
    Statement::new(
        "find the sandbox of a guest agent's token",
        "SELECT id, envd_token FROM sandboxes WHERE token_hash = $1 AND token_hash <> '' \
         ORDER BY created_at DESC",
    )
    .bind(token_hash(token))
}

/// Selects ids and tokens of sandboxes whose token has no hash yet.
pub(crate) fn without_token_hash<B: Backend>(limit: u32) -> Statement<B> {
    Statement::new(
        "read the tokens of an earlier release",
        "SELECT id, envd_token FROM sandboxes WHERE token_hash = '' AND envd_token <> '' LIMIT $1",
    )
    .bind(i64::from(limit))
}

/// Writes the hash of a token.
pub(crate) fn set_token_hash<B: Backend>(id: &str, token: &str) -> Statement<B> {
    Statement::new(
        "store the hash of a token",
        "UPDATE sandboxes SET token_hash = $1 WHERE id = $2 AND envd_token = $3",
    )
    .bind(token_hash(token))
    .bind(id)
    .bind(token)
}

/// Selects the deadlines of running sandboxes.
pub(crate) fn deadlines<B: Backend>() -> Statement<B> {
    Statement::new(
        "list the deadlines",
        "SELECT id, host_id, version, expires_at FROM sandboxes \
         WHERE status = 'running' AND expires_at > 0",
    )
}

/// Writes the columns that may change, at the version that was read.
pub(crate) fn update<B: Backend>(row: &Sandbox) -> Statement<B> {
    Statement::new(
        "update the sandbox",
        "UPDATE sandboxes SET status = $1, guest_ip = $2, host_ip = $3, error = $4, boot = $5, started_at = $6, \
         last_active_at = $7, last_updated = $8, warning = $9, expires_at = $10, envd_token = $11, options = $12, \
         egress = $13, on_timeout = $14, auto_resume = $15, host_id = $16, token_hash = $17, \
         version = version + 1 WHERE id = $18 AND version = $19",
    )
    .bind(row.status.as_str())
    .bind(&*row.guest_ip)
    .bind(&*row.host_ip)
    .bind(&*row.error)
    .bind(row.boot.map(Json))
    .bind(row.started_at)
    .bind(row.last_active_at)
    .bind(row.last_updated)
    .bind(&*row.warning)
    .bind(row.expires_at)
    .bind(&*row.envd_token)
    .bind(Json(&row.options))
    .bind(egress_word(row.egress))
    .bind(row.on_timeout.as_str())
    .bind(row.auto_resume)
    .bind(&*row.host_id)
    .bind(token_hash(&row.envd_token))
    .bind(row.id.as_str())
    .bind(row.version)
}

/// Writes newer data of the host, at the version that was read. The data is not a change of the
/// sandbox, so the version stays the same.
pub(crate) fn refresh<B: Backend>(row: &Sandbox) -> Statement<B> {
    Statement::new(
        "refresh the sandbox",
        "UPDATE sandboxes SET guest_ip = $1, host_ip = $2, boot = $3, last_active_at = $4, warning = $5, \
         host_id = $6, envd_token = $7, token_hash = $8 WHERE id = $9 AND version = $10",
    )
    .bind(&*row.guest_ip)
    .bind(&*row.host_ip)
    .bind(row.boot.map(Json))
    .bind(row.last_active_at)
    .bind(&*row.warning)
    .bind(&*row.host_id)
    .bind(&*row.envd_token)
    .bind(token_hash(&row.envd_token))
    .bind(row.id.as_str())
    .bind(row.version)
}

/// Deletes a row at the version that was read.
pub(crate) fn delete<B: Backend>(id: &SandboxId, version: i64) -> Statement<B> {
    Statement::new(
        "remove the sandbox",
        "DELETE FROM sandboxes WHERE id = $1 AND version = $2",
    )
    .bind(id.as_str())
    .bind(version)
}
