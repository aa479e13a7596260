//! RPC service of the fake agent.

use std::sync::{Arc, atomic::Ordering};

use connectrpc::{
    ConnectError, ErrorCode, RequestContext, Response, ServiceRequest, ServiceResult,
};
use wrenn_proto::rpc::hostagent::v1::{self as rpc, HostAgentService};

use super::{State, lock};

/// Implementation of `hostagent.v1`.
pub(super) struct Service(pub(super) Arc<State>);

#[expect(
    refining_impl_trait_internal,
    reason = "the concrete types say more than the trait asks"
)]
impl HostAgentService for Service {
    async fn get_host(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::GetHostRequest>,
    ) -> ServiceResult<rpc::GetHostResponse> {
        self.0.host_gate.pass().await;
        Response::ok(rpc::GetHostResponse {
            accel: "tcg".to_owned(),
            cpu: "max".to_owned(),
            host_id: lock(&self.0.host_id).clone(),
            cpu_count: 2,
            memory_total_mib: 8192,
            memory_available_mib: 8192,
            templates: lock(&self.0.templates).clone(),
            ..Default::default()
        })
    }

    async fn create_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::CreateSandboxRequest>,
    ) -> ServiceResult<rpc::CreateSandboxResponse> {
        let request = request.to_owned_message();
        let id = request.id.clone();
        *lock(&self.0.last_create) = Some(request.clone());
        // As in the real agent, the work continues if the caller disconnects.
        let state = Arc::clone(&self.0);
        let task = tokio::spawn(async move { state.create(request).await });
        task.await.unwrap()?;
        let sandbox = self.0.info(&id).unwrap_or_default().into();
        Response::ok(rpc::CreateSandboxResponse {
            sandbox,
            ..Default::default()
        })
    }

    async fn destroy_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::DestroySandboxRequest>,
    ) -> ServiceResult<rpc::DestroySandboxResponse> {
        self.0.destroy_gate.pass().await;
        let removed = lock(&self.0.sandboxes).remove(request.id);
        self.0.cut(request.id);
        if removed.is_none() {
            return Err(ConnectError::new(ErrorCode::NotFound, "no such sandbox"));
        }
        Response::ok(rpc::DestroySandboxResponse::default())
    }

    async fn list_sandboxes(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ListSandboxesRequest>,
    ) -> ServiceResult<rpc::ListSandboxesResponse> {
        self.0.list_gate.pass().await;
        let ids: Vec<_> = lock(&self.0.sandboxes).keys().cloned().collect();
        let sandboxes = ids.iter().filter_map(|id| self.0.info(id)).collect();
        Response::ok(rpc::ListSandboxesResponse {
            sandboxes,
            host_id: lock(&self.0.host_id).clone(),
            ..Default::default()
        })
    }

    async fn adopt_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::AdoptSandboxRequest>,
    ) -> ServiceResult<rpc::AdoptSandboxResponse> {
        let Some(sandbox) = self.0.info(request.id) else {
            return Err(ConnectError::new(ErrorCode::NotFound, "no such sandbox"));
        };
        Response::ok(rpc::AdoptSandboxResponse {
            sandbox: sandbox.into(),
            ..Default::default()
        })
    }

    async fn pause_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::PauseSandboxRequest>,
    ) -> ServiceResult<rpc::PauseSandboxResponse> {
        let id = request.id.to_owned();
        let effort = request.effort.as_known();
        lock(&self.0.efforts).push(effort.unwrap_or_default());
        self.0.detached(&id, State::pause).await?;
        Response::ok(rpc::PauseSandboxResponse {
            sandbox: self.0.info(&id).unwrap_or_default().into(),
            ..Default::default()
        })
    }

    async fn resume_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ResumeSandboxRequest>,
    ) -> ServiceResult<rpc::ResumeSandboxResponse> {
        let id = request.id.to_owned();
        let cold_boot = request.cold_boot;
        self.0.cold_boot.store(cold_boot, Ordering::SeqCst);
        self.0.detached(&id, State::resume).await?;
        Response::ok(rpc::ResumeSandboxResponse {
            sandbox: self.0.info(&id).unwrap_or_default().into(),
            ..Default::default()
        })
    }

    async fn update_network(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::UpdateNetworkRequest>,
    ) -> ServiceResult<rpc::UpdateNetworkResponse> {
        if self.0.info(request.id).is_none() {
            return Err(ConnectError::not_found("no such sandbox"));
        }
        self.0.check("UpdateNetwork")?;
        *lock(&self.0.last_network) = Some(request.to_owned_message());
        Response::ok(rpc::UpdateNetworkResponse::default())
    }

    async fn create_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::CreateSnapshotRequest>,
    ) -> ServiceResult<rpc::CreateSnapshotResponse> {
        let request = request.to_owned_message();
        let id = request.id.clone();
        let work = async |state: Arc<State>, _: String| state.snapshot(request).await;
        let template = self.0.detached(&id, work).await?;
        Response::ok(rpc::CreateSnapshotResponse {
            template: template.into(),
            ..Default::default()
        })
    }

    async fn delete_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::DeleteSnapshotRequest>,
    ) -> ServiceResult<rpc::DeleteSnapshotResponse> {
        self.0.delete_snapshot(request.name)?;
        Response::ok(rpc::DeleteSnapshotResponse::default())
    }

    async fn push_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::PushSnapshotRequest>,
    ) -> ServiceResult<rpc::PushSnapshotResponse> {
        self.0.push_snapshot(request.name)?;
        Response::ok(rpc::PushSnapshotResponse::default())
    }

    async fn pull_snapshot(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::PullSnapshotRequest>,
    ) -> ServiceResult<rpc::PullSnapshotResponse> {
        let template = self.0.pull_snapshot(request.name, request.overwrite)?;
        Response::ok(rpc::PullSnapshotResponse {
            template: template.into(),
            ..Default::default()
        })
    }

    async fn fork_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::ForkSandboxRequest>,
    ) -> ServiceResult<rpc::ForkSandboxResponse> {
        let request = request.to_owned_message();
        let id = request.id.clone();
        let work = async |state: Arc<State>, _: String| state.fork(request).await;
        let copies = self.0.detached(&id, work).await?;
        Response::ok(rpc::ForkSandboxResponse {
            copies: copies.iter().filter_map(|id| self.0.info(id)).collect(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::PingSandboxRequest>,
    ) -> ServiceResult<rpc::PingSandboxResponse> {
        self.0.require(request.id)?;
        Response::ok(rpc::PingSandboxResponse::default())
    }

    async fn get_sandbox_log(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::GetSandboxLogRequest>,
    ) -> ServiceResult<rpc::GetSandboxLogResponse> {
        self.0.require(request.id)?;
        let request = request.to_owned_message();
        Response::ok(rpc::GetSandboxLogResponse {
            content: format!("{:?} of {}\n", request.source.as_known(), request.id).into_bytes(),
            ..Default::default()
        })
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::GetMetricsRequest>,
    ) -> ServiceResult<rpc::GetMetricsResponse> {
        self.0.require_running(request.id)?;
        self.0.check("GetMetrics")?;
        Response::ok(rpc::GetMetricsResponse {
            timestamp_unix_ms: 1_700_000_000_500,
            cpu_count: 2,
            cpu_used_pct: 12.5,
            mem_total_bytes: 1000,
            mem_used_bytes: 400,
            mem_cache_bytes: 100,
            disk_total_bytes: 5000,
            disk_used_bytes: 600,
            ..Default::default()
        })
    }
}
