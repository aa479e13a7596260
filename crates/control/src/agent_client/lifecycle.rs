//! Calls that create, pause, resume, snapshot, copy and destroy sandboxes.

use std::time::Duration;

use connectrpc::client::CallOptions;
use wrenn_proto::rpc::hostagent::v1 as rpc;

use super::{AgentClient, AgentError, CALL_TIMEOUT};

/// Deadline of a create. Allows for a cold boot in software emulation on a loaded host.
const CREATE_TIMEOUT: Duration = Duration::from_secs(120);

/// Deadline of a destroy. Allows the guest time to end.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(30);

/// Deadline of a pause, snapshot or fork. The agent bounds the time by the size of the guest's
/// memory and the speed of a slow disk.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2 * 3600);

/// Deadline of a resume, and of the wait for a pause or resume in progress. Many gigabytes of
/// memory may be read from a disk.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);

impl AgentClient {
    /// Creates a sandbox.
    pub async fn create(
        &self,
        request: rpc::CreateSandboxRequest,
    ) -> Result<rpc::SandboxInfo, AgentError> {
        unary!(
            self.lifecycle,
            create_sandbox_with_options,
            request,
            CREATE_TIMEOUT
        )
        .map(|response| response.sandbox.into_option().unwrap_or_default())
    }

    /// Frees all resources of a sandbox on the host. Succeeds for an id that the agent does not
    /// know.
    pub async fn destroy(&self, id: &str) -> Result<(), AgentError> {
        let request = rpc::DestroySandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let done = unary!(
            self.lifecycle,
            destroy_sandbox_with_options,
            request,
            DESTROY_TIMEOUT
        );
        match done {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Makes this installation the owner of a sandbox on the host.
    pub async fn adopt(&self, id: &str) -> Result<rpc::SandboxInfo, AgentError> {
        let request = rpc::AdoptSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            adopt_sandbox_with_options,
            request,
            DESTROY_TIMEOUT
        )
        .map(|response| response.sandbox.into_option().unwrap_or_default())
    }

    /// Returns the host's report on one sandbox; `None` if the host has no sandbox with this id.
    pub async fn find(&self, id: &str) -> Result<Option<rpc::SandboxInfo>, AgentError> {
        let infos = self.list().await?;
        Ok(infos.into_iter().find(|info| info.id == id))
    }

    /// Pauses a sandbox.
    pub async fn pause(
        &self,
        id: &str,
        effort: rpc::PauseEffort,
    ) -> Result<rpc::SandboxInfo, AgentError> {
        let request = rpc::PauseSandboxRequest {
            id: id.to_owned(),
            effort: effort.into(),
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            pause_sandbox_with_options,
            request,
            SAVE_TIMEOUT
        )
        .map(|response| response.sandbox.into_option().unwrap_or_default())
    }

    /// Resumes a sandbox. With `cold_boot`, it boots from its disk.
    pub async fn resume(&self, id: &str, cold_boot: bool) -> Result<rpc::SandboxInfo, AgentError> {
        let request = rpc::ResumeSandboxRequest {
            id: id.to_owned(),
            cold_boot,
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            resume_sandbox_with_options,
            request,
            FREEZE_TIMEOUT
        )
        .map(|response| response.sandbox.into_option().unwrap_or_default())
    }

    /// Replaces the addresses that a sandbox may reach.
    pub async fn update_network(
        &self,
        request: rpc::UpdateNetworkRequest,
    ) -> Result<(), AgentError> {
        unary!(
            self.lifecycle,
            update_network_with_options,
            request,
            CALL_TIMEOUT
        )
        .map(drop)
    }

    /// Creates a snapshot of a sandbox, as a template.
    pub async fn create_snapshot(
        &self,
        request: rpc::CreateSnapshotRequest,
    ) -> Result<rpc::TemplateInfo, AgentError> {
        unary!(
            self.lifecycle,
            create_snapshot_with_options,
            request,
            SAVE_TIMEOUT
        )
        .map(|response| response.template.into_option().unwrap_or_default())
    }

    /// Deletes a snapshot. With `force`, also while sandboxes that were created from it exist.
    pub async fn delete_snapshot(&self, name: &str, force: bool) -> Result<(), AgentError> {
        let request = rpc::DeleteSnapshotRequest {
            name: name.to_owned(),
            force,
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            delete_snapshot_with_options,
            request,
            CALL_TIMEOUT
        )
        .map(drop)
    }

    /// Writes a snapshot to the object store of its host.
    pub async fn push_snapshot(&self, name: &str) -> Result<(), AgentError> {
        let request = rpc::PushSnapshotRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            push_snapshot_with_options,
            request,
            SAVE_TIMEOUT
        )
        .map(drop)
    }

    /// Takes a snapshot from the object store, as a template.
    pub async fn pull_snapshot(
        &self,
        name: &str,
        overwrite: bool,
    ) -> Result<rpc::TemplateInfo, AgentError> {
        let request = rpc::PullSnapshotRequest {
            name: name.to_owned(),
            overwrite,
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            pull_snapshot_with_options,
            request,
            SAVE_TIMEOUT
        )
        .map(|response| response.template.into_option().unwrap_or_default())
    }

    /// Forks a sandbox. The answer reports each copy.
    pub async fn fork(
        &self,
        request: rpc::ForkSandboxRequest,
    ) -> Result<Vec<rpc::SandboxInfo>, AgentError> {
        unary!(
            self.lifecycle,
            fork_sandbox_with_options,
            request,
            SAVE_TIMEOUT
        )
        .map(|response| response.copies)
    }
}
