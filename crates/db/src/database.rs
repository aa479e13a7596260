//! Operations on the database.

use std::{collections::BTreeMap, fmt};

use async_trait::async_trait;
use wrenn_model::{SandboxId, SandboxStatus, TeamId};

use crate::{ApiKey, DbError, DeadlineRow, EndedRow, Owner, Page, Sandbox, StateRow, Template};

/// Operations of the control plane on its database. Each has a deadline.
///
/// # Errors
/// All operations fail with [`DbError::Query`] or [`DbError::TimedOut`] if the database fails. An
/// insert fails with [`DbError::Exists`] if the row's key is taken. A read fails with
/// [`DbError::Corrupt`] if a value in a row is invalid.
#[async_trait]
pub trait Database: fmt::Debug + Send + Sync {
    /// Inserts a row with version 0.
    async fn insert_sandbox(&self, row: &Sandbox) -> Result<(), DbError>;

    /// Returns the row of a sandbox, if it belongs to the owner.
    async fn sandbox(&self, owner: Owner<'_>, id: &SandboxId) -> Result<Option<Sandbox>, DbError>;

    /// Returns the owner's rows with one of these statuses, newest first, at most `limit`.
    async fn sandboxes(
        &self,
        owner: Owner<'_>,
        statuses: &[SandboxStatus],
        limit: u32,
    ) -> Result<Vec<Sandbox>, DbError>;

    /// Returns the states of all sandboxes with one of these statuses, in no particular order.
    async fn states(&self, statuses: &[SandboxStatus]) -> Result<Vec<StateRow>, DbError>;

    /// Returns rows of one of two hosts that ended before a time (milliseconds since 1970), the
    /// earliest first, at most `limit`. `after` is the last row of the previous call.
    async fn ended(
        &self,
        host_ids: [&str; 2],
        before_ms: i64,
        after: Option<(i64, &SandboxId)>,
        limit: u32,
    ) -> Result<Vec<EndedRow>, DbError>;

    /// Returns a page of sandboxes.
    async fn page(&self, page: Page<'_>) -> Result<Vec<Sandbox>, DbError>;

    /// Returns the number of a team's running sandboxes. The parameters are those of [`Page`].
    async fn running_count(
        &self,
        team: &TeamId,
        template: &str,
        started_from: i64,
    ) -> Result<u64, DbError>;

    /// Returns the metadata of the same sandboxes.
    async fn running_metadata(
        &self,
        team: &TeamId,
        template: &str,
        started_from: i64,
    ) -> Result<Vec<BTreeMap<String, String>>, DbError>;

    /// Returns the deadlines of all running sandboxes that have one.
    async fn deadlines(&self) -> Result<Vec<DeadlineRow>, DbError>;

    /// Returns the tokens of the guest agents of all sandboxes that run or are paused.
    async fn envd_tokens(&self) -> Result<Vec<(SandboxId, String)>, DbError>;

    /// Returns ids and tokens of the sandboxes whose guest agent has this token, in any status,
    /// newest first. Found by the hash of the token: the caller compares the tokens.
    async fn sandboxes_by_token(&self, token: &str) -> Result<Vec<(SandboxId, String)>, DbError>;

    /// Returns the row that the team's request with this idempotency key created, if there is one.
    async fn sandbox_by_idempotency_key(
        &self,
        team: &TeamId,
        key: &str,
    ) -> Result<Option<Sandbox>, DbError>;

    /// Releases the idempotency key of a sandbox that its client never received, so that another
    /// request may use the key.
    async fn release_idempotency_key(&self, id: &SandboxId) -> Result<(), DbError>;

    /// Writes the columns of a row that may change, if the row still has the version that was read.
    /// Returns false otherwise.
    async fn update_sandbox(&self, row: &Sandbox) -> Result<bool, DbError>;

    /// Writes newer data of the host to a row, if the row still has the version that was read.
    /// Returns false otherwise. The data is not a change of the sandbox, so the version stays the
    /// same.
    async fn refresh_sandbox(&self, row: &Sandbox) -> Result<bool, DbError>;

    /// Removes the row of a sandbox that was never created, or that has ended, if the row still has
    /// this version. Returns false otherwise.
    async fn remove_sandbox(&self, id: &SandboxId, version: i64) -> Result<bool, DbError>;

    /// Returns all templates, by name. Hosts report them, so they belong to no team.
    async fn templates(&self) -> Result<Vec<Template>, DbError>;

    /// Makes the stored templates of a host equal to those that it reports. Templates that another
    /// host reported stay.
    async fn sync_templates(&self, host_id: &str, present: &[Template]) -> Result<(), DbError>;

    /// Writes a new snapshot and its source sandbox.
    async fn record_snapshot(
        &self,
        host_id: &str,
        snapshot: &Template,
        sandbox: &str,
    ) -> Result<(), DbError>;

    /// Returns the names of the snapshots of a sandbox.
    async fn templates_of(&self, sandbox: &str) -> Result<Vec<String>, DbError>;

    /// Adds a key.
    async fn insert_api_key(&self, key: &ApiKey) -> Result<(), DbError>;

    /// Returns all keys of a team, oldest first.
    async fn api_keys(&self, team: &TeamId) -> Result<Vec<ApiKey>, DbError>;

    /// Returns the keys that start with these eight characters.
    async fn api_keys_by_prefix(&self, prefix: &str) -> Result<Vec<ApiKey>, DbError>;

    /// Records the use of a key.
    async fn touch_api_key(&self, id: &str, now_ms: i64) -> Result<(), DbError>;

    /// Deletes a key of a team, unless no other key of the team may create keys. Returns false if
    /// the team has no such key, or if it needs this one.
    async fn delete_api_key(&self, team: &TeamId, id: &str) -> Result<bool, DbError>;

    /// Deletes a key, even the last one.
    async fn drop_api_key(&self, id: &str) -> Result<(), DbError>;

    /// Returns the id of the installation. The first control plane of the database chooses it.
    async fn installation_id(&self) -> Result<String, DbError>;

    /// Makes everything written so far survive a power failure. The files of a paused sandbox
    /// survive a power failure, and without its row the sandbox could not be found.
    async fn keep(&self) -> Result<(), DbError>;

    /// Checks that the database answers.
    async fn ping(&self) -> Result<(), DbError>;

    /// Closes all connections.
    async fn close(&self);
}
