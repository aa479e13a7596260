//! Calls that make, freeze, copy and end sandboxes.

use std::time::Duration;

use connectrpc::client::CallOptions;
use wrenn_proto::rpc::hostagent::v1 as rpc;

use super::{AgentClient, AgentError, CALL_TIMEOUT};

/// What a create may take: a cold boot in software emulation on a loaded host.
const CREATE_TIMEOUT: Duration = Duration::from_secs(120);

/// What a destroy may take: the guest gets time to end.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(30);

/// What a pause, a resume, a snapshot or a fork may take: memory of many gigabytes goes to a disk or comes from it.
pub(crate) const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);

impl AgentClient {
    pub(crate) async fn create(
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

    /// Frees all that the host has of a sandbox. An id that the agent does not know is freed.
    pub(crate) async fn destroy(&self, id: &str) -> Result<(), AgentError> {
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

    /// Makes this installation the owner of a sandbox at the host.
    pub(crate) async fn adopt(&self, id: &str) -> Result<rpc::SandboxInfo, AgentError> {
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

    /// What the host says of one sandbox; `None` if it has none of that name.
    pub(crate) async fn find(&self, id: &str) -> Result<Option<rpc::SandboxInfo>, AgentError> {
        let infos = self.list().await?;
        Ok(infos.into_iter().find(|info| info.id == id))
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<rpc::SandboxInfo, AgentError> {
        let request = rpc::PauseSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        unary!(
            self.lifecycle,
            pause_sandbox_with_options,
            request,
            FREEZE_TIMEOUT
        )
        .map(|response| response.sandbox.into_option().unwrap_or_default())
    }

    pub(crate) async fn resume(
        &self,
        id: &str,
        cold_boot: bool,
    ) -> Result<rpc::SandboxInfo, AgentError> {
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

    /// Replaces what a sandbox may reach.
    pub(crate) async fn update_network(
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

    pub(crate) async fn create_snapshot(
        &self,
        request: rpc::CreateSnapshotRequest,
    ) -> Result<rpc::TemplateInfo, AgentError> {
        unary!(
            self.lifecycle,
            create_snapshot_with_options,
            request,
            FREEZE_TIMEOUT
        )
        .map(|response| response.template.into_option().unwrap_or_default())
    }

    /// With `force` also while sandboxes that were made from it are there.
    pub(crate) async fn delete_snapshot(&self, name: &str, force: bool) -> Result<(), AgentError> {
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

    /// Makes copies; the answer tells of each.
    pub(crate) async fn fork(
        &self,
        request: rpc::ForkSandboxRequest,
    ) -> Result<Vec<rpc::SandboxInfo>, AgentError> {
        unary!(
            self.lifecycle,
            fork_sandbox_with_options,
            request,
            FREEZE_TIMEOUT
        )
        .map(|response| response.copies)
    }
}
