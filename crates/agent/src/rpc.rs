//! Service `hostagent.v1`, and tunnels to guests.
//!
//! Converts messages and errors only. Other modules do the work, and do not know this one.

mod auth;
mod error;
mod lifecycle;
mod logs;
mod ownership;
mod snapshots;
mod tunnel;

use std::sync::Arc;

use connectrpc::{
    ConnectError, ConnectRpcService, RequestContext, Response, Router, ServiceRequest,
    ServiceResult,
};
use wrenn_proto::rpc::hostagent::v1 as pb;
use wrenn_sys::failpoint;

use crate::sandbox::{Sandbox, actor::SandboxActors, service::SandboxService};

pub(crate) use tunnel::tune;

/// Implementation of the service.
pub(crate) struct AgentService {
    sandboxes: SandboxService,
}

/// Returns the service behind the token check, ready to be served.
pub(crate) fn router(actors: SandboxActors, token: &str) -> axum::Router {
    let service = Arc::new(AgentService {
        sandboxes: SandboxService::new(actors.clone()),
    });
    let rpc = ConnectRpcService::new(Router::new().add_service(service));
    axum::Router::new()
        .route("/tunnel/{id}/{port}", axum::routing::get(tunnel::open))
        .with_state(actors)
        .fallback_service(rpc)
        .layer(axum::middleware::from_fn(hit_failpoints))
        .layer(axum::middleware::from_fn_with_state(
            auth::Token::new(token),
            auth::require_token,
        ))
}

impl AgentService {
    fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>, ConnectError> {
        Ok(self.sandboxes.find(id)?)
    }

    /// Returns a sandbox that the caller's installation may command.
    fn owned(&self, context: &RequestContext, id: &str) -> Result<Arc<Sandbox>, ConnectError> {
        let sandbox = self.sandbox(id)?;
        ownership::require(&sandbox, &ownership::caller(context)?)?;
        Ok(sandbox)
    }
}

/// Passes the failpoints `rpc.<method>.received` and `rpc.<method>.done`. In one process with the
/// control plane (`wrenn up`), the control plane dies there as well: before the agent has begun the
/// call, or after the agent has completed it and before the row of the sandbox says so.
async fn hit_failpoints(
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    let path = request.uri().path().to_owned();
    let method = path.rsplit('/').next().unwrap_or_default();
    failpoint::hit(&format!("rpc.{method}.received"), None);
    let response = next.run(request).await;
    failpoint::hit(&format!("rpc.{method}.done"), None);
    response
}

type Request<'a, T> = ServiceRequest<'a, T>;

#[allow(
    refining_impl_trait,
    reason = "the methods return plain messages, which satisfy the trait's bound"
)]
impl pb::HostAgentService for AgentService {
    async fn get_host(
        &self,
        _: RequestContext,
        _: Request<'_, pb::GetHostRequest>,
    ) -> ServiceResult<pb::GetHostResponse> {
        Response::ok(lifecycle::get_host(&self.sandboxes).await?)
    }

    async fn create_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::CreateSandboxRequest>,
    ) -> ServiceResult<pb::CreateSandboxResponse> {
        Response::ok(
            lifecycle::create(
                &self.sandboxes,
                request.to_owned_message(),
                ownership::caller(&context)?,
            )
            .await?,
        )
    }

    async fn destroy_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::DestroySandboxRequest>,
    ) -> ServiceResult<pb::DestroySandboxResponse> {
        self.owned(&context, request.id)?.destroy().await?;
        Response::ok(pb::DestroySandboxResponse::default())
    }

    async fn list_sandboxes(
        &self,
        _: RequestContext,
        _: Request<'_, pb::ListSandboxesRequest>,
    ) -> ServiceResult<pb::ListSandboxesResponse> {
        Response::ok(lifecycle::list(&self.sandboxes))
    }

    async fn adopt_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::AdoptSandboxRequest>,
    ) -> ServiceResult<pb::AdoptSandboxResponse> {
        let sandbox = self.sandbox(request.id)?;
        ownership::adopt(
            self.sandboxes.host(),
            &sandbox,
            ownership::caller(&context)?,
        )
        .await?;
        Response::ok(pb::AdoptSandboxResponse {
            sandbox: lifecycle::info(&sandbox).into(),
            ..Default::default()
        })
    }

    async fn pause_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::PauseSandboxRequest>,
    ) -> ServiceResult<pb::PauseSandboxResponse> {
        let sandbox = self.owned(&context, request.id)?;
        let effort = lifecycle::pause_effort(request.effort.as_known())?;
        sandbox.pause(effort).await?;
        Response::ok(pb::PauseSandboxResponse {
            sandbox: lifecycle::info(&sandbox).into(),
            ..Default::default()
        })
    }

    async fn resume_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::ResumeSandboxRequest>,
    ) -> ServiceResult<pb::ResumeSandboxResponse> {
        let sandbox = self.owned(&context, request.id)?;
        sandbox
            .resume(lifecycle::resume_from(request.cold_boot))
            .await?;
        Response::ok(pb::ResumeSandboxResponse {
            sandbox: lifecycle::info(&sandbox).into(),
            ..Default::default()
        })
    }

    async fn update_network(
        &self,
        context: RequestContext,
        request: Request<'_, pb::UpdateNetworkRequest>,
    ) -> ServiceResult<pb::UpdateNetworkResponse> {
        let request = request.to_owned_message();
        let sandbox = self.owned(&context, &request.id)?;
        lifecycle::update_network(self.sandboxes.host(), &sandbox, request).await?;
        Response::ok(pb::UpdateNetworkResponse::default())
    }

    async fn create_snapshot(
        &self,
        context: RequestContext,
        request: Request<'_, pb::CreateSnapshotRequest>,
    ) -> ServiceResult<pb::CreateSnapshotResponse> {
        let request = request.to_owned_message();
        let sandbox = self.owned(&context, &request.id)?;
        Response::ok(snapshots::create(&self.sandboxes, &sandbox, request).await?)
    }

    async fn delete_snapshot(
        &self,
        _: RequestContext,
        request: Request<'_, pb::DeleteSnapshotRequest>,
    ) -> ServiceResult<pb::DeleteSnapshotResponse> {
        snapshots::delete(&self.sandboxes, request.name, request.force).await?;
        Response::ok(pb::DeleteSnapshotResponse::default())
    }

    async fn push_snapshot(
        &self,
        _: RequestContext,
        request: Request<'_, pb::PushSnapshotRequest>,
    ) -> ServiceResult<pb::PushSnapshotResponse> {
        snapshots::push(&self.sandboxes, request.name).await?;
        Response::ok(pb::PushSnapshotResponse::default())
    }

    async fn pull_snapshot(
        &self,
        _: RequestContext,
        request: Request<'_, pb::PullSnapshotRequest>,
    ) -> ServiceResult<pb::PullSnapshotResponse> {
        let pulled = snapshots::pull(&self.sandboxes, request.name, request.overwrite);
        Response::ok(pulled.await?)
    }

    async fn fork_sandbox(
        &self,
        context: RequestContext,
        request: Request<'_, pb::ForkSandboxRequest>,
    ) -> ServiceResult<pb::ForkSandboxResponse> {
        let request = request.to_owned_message();
        let sandbox = self.owned(&context, &request.id)?;
        Response::ok(snapshots::fork(&self.sandboxes, &sandbox, request).await?)
    }

    async fn ping_sandbox(
        &self,
        _: RequestContext,
        request: Request<'_, pb::PingSandboxRequest>,
    ) -> ServiceResult<pb::PingSandboxResponse> {
        let sandbox = self.sandbox(request.id)?;
        sandbox.until_examined().await;
        sandbox.touch_running()?;
        Response::ok(pb::PingSandboxResponse::default())
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: Request<'_, pb::GetMetricsRequest>,
    ) -> ServiceResult<pb::GetMetricsResponse> {
        let sandbox = self.sandbox(request.id)?;
        sandbox.until_examined().await;
        Response::ok(lifecycle::metrics(&sandbox).await?)
    }

    async fn get_sandbox_log(
        &self,
        _: RequestContext,
        request: Request<'_, pb::GetSandboxLogRequest>,
    ) -> ServiceResult<pb::GetSandboxLogResponse> {
        Response::ok(logs::get(&self.sandboxes, request.to_owned_message()).await?)
    }
}

/// Parses a field of a request.
fn parse<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, ConnectError>
where
    T::Err: std::fmt::Display,
{
    text.parse()
        .map_err(|error| ConnectError::invalid_argument(format!("`{field}`: {error}")))
}
