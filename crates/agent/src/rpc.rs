//! Service `hostagent.v1`, and tunnels to guests.
//!
//! Converts messages and errors only. Other modules do the work, and do not know this one.

mod auth;
mod error;
mod files;
mod lifecycle;
mod ownership;
mod process;
mod snapshots;
mod tunnel;

use std::sync::Arc;

use connectrpc::{
    ConnectError, ConnectRpcService, Limits, RequestContext, Response, Router, ServiceRequest,
    ServiceResult, ServiceStream,
};
use wrenn_model::limits;
use wrenn_proto::rpc::hostagent::v1 as pb;

use crate::sandbox::{Running, Sandbox, actor::SandboxActors, service::SandboxService};

/// Room for the fields of a message next to a file's content, in bytes.
const MESSAGE_OVERHEAD_BYTES: usize = 64 * 1024;

/// Implementation of the service.
pub(crate) struct AgentService {
    sandboxes: SandboxService,
}

/// Returns the service behind the token check, ready to be served.
pub(crate) fn router(actors: SandboxActors, token: &str) -> axum::Router {
    let service = Arc::new(AgentService {
        sandboxes: SandboxService::new(actors.clone()),
    });
    let largest = limits::MAX_FILE_MESSAGE_BYTES + MESSAGE_OVERHEAD_BYTES;
    let size_limits = Limits::default()
        .with_max_message_size(largest)
        .with_max_request_body_size(largest);
    let rpc = ConnectRpcService::new(Router::new().add_service(service)).with_limits(size_limits);
    axum::Router::new()
        .route("/tunnel/{id}/{port}", axum::routing::get(tunnel::open))
        .with_state(actors)
        .fallback_service(rpc)
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

    /// Returns a running sandbox and counts the call as activity.
    fn in_use(&self, id: &str) -> Result<InUse, ConnectError> {
        let sandbox = self.sandbox(id)?;
        let running = sandbox.touch_running()?;
        Ok(InUse { sandbox, running })
    }
}

/// Running sandbox that a call is using.
#[derive(Clone)]
struct InUse {
    sandbox: Arc<Sandbox>,
    running: Arc<Running>,
}

impl InUse {
    /// Waits for the guest, but not beyond the end of the sandbox. A guest that is gone never
    /// answers.
    async fn wait_for<T>(
        &self,
        work: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        tokio::select! {
            biased;
            result = work => result,
            () = self.running.gone.cancelled() => Err(self.lost()),
        }
    }

    fn lost(&self) -> ConnectError {
        let id = &self.sandbox.facts.id;
        match self.sandbox.state() {
            crate::sandbox::State::Error { reason } => {
                ConnectError::unavailable(format!("sandbox {id} is lost: {reason}"))
            }
            _ => ConnectError::unavailable(format!("sandbox {id} was destroyed")),
        }
    }
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
        sandbox.pause().await?;
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
        self.in_use(request.id)?;
        Response::ok(pb::PingSandboxResponse::default())
    }

    async fn get_metrics(
        &self,
        _: RequestContext,
        request: Request<'_, pb::GetMetricsRequest>,
    ) -> ServiceResult<pb::GetMetricsResponse> {
        let sandbox = self.sandbox(request.id)?;
        Response::ok(lifecycle::metrics(&sandbox).await?)
    }

    async fn exec(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ExecRequest>,
    ) -> ServiceResult<pb::ExecResponse> {
        let request = request.to_owned_message();
        Response::ok(process::exec(self.in_use(&request.id)?, request).await?)
    }

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<pb::ExecStreamResponse>> {
        let request = request.to_owned_message();
        let events = process::start(self.in_use(&request.id)?, request).await?;
        Response::stream_ok(events)
    }

    async fn connect_process(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<pb::ExecStreamResponse>> {
        let request = request.to_owned_message();
        let events = process::connect(self.in_use(&request.id)?, request).await?;
        Response::stream_ok(events)
    }

    async fn list_processes(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ListProcessesRequest>,
    ) -> ServiceResult<pb::ListProcessesResponse> {
        Response::ok(process::list(&self.in_use(request.id)?).await?)
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: Request<'_, pb::SendInputRequest>,
    ) -> ServiceResult<pb::SendInputResponse> {
        let request = request.to_owned_message();
        Response::ok(process::send_input(&self.in_use(&request.id)?, request).await?)
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: Request<'_, pb::CloseStdinRequest>,
    ) -> ServiceResult<pb::CloseStdinResponse> {
        let request = request.to_owned_message();
        Response::ok(process::close_stdin(&self.in_use(&request.id)?, request).await?)
    }

    async fn resize_pty(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ResizePtyRequest>,
    ) -> ServiceResult<pb::ResizePtyResponse> {
        let request = request.to_owned_message();
        Response::ok(process::resize_pty(&self.in_use(&request.id)?, request).await?)
    }

    async fn signal_process(
        &self,
        _: RequestContext,
        request: Request<'_, pb::SignalProcessRequest>,
    ) -> ServiceResult<pb::SignalProcessResponse> {
        let request = request.to_owned_message();
        Response::ok(process::signal(&self.in_use(&request.id)?, request).await?)
    }

    async fn write_file(
        &self,
        _: RequestContext,
        request: Request<'_, pb::WriteFileRequest>,
    ) -> ServiceResult<pb::WriteFileResponse> {
        let request = request.to_owned_message();
        Response::ok(files::write(self, request).await?)
    }

    async fn read_file(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ReadFileRequest>,
    ) -> ServiceResult<pb::ReadFileResponse> {
        let request = request.to_owned_message();
        Response::ok(files::read(self, request).await?)
    }

    async fn write_file_stream(
        &self,
        _: RequestContext,
        requests: connectrpc::InboundStream<pb::WriteFileStreamRequest>,
    ) -> ServiceResult<pb::WriteFileStreamResponse> {
        Response::ok(files::write_stream(self, requests).await?)
    }

    async fn read_file_stream(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ReadFileStreamRequest>,
    ) -> ServiceResult<ServiceStream<pb::ReadFileStreamResponse>> {
        let request = request.to_owned_message();
        Response::stream_ok(files::read_stream(self, request).await?)
    }

    async fn list_dir(
        &self,
        _: RequestContext,
        request: Request<'_, pb::ListDirRequest>,
    ) -> ServiceResult<pb::ListDirResponse> {
        let request = request.to_owned_message();
        Response::ok(files::list_dir(self, request).await?)
    }

    async fn make_dir(
        &self,
        _: RequestContext,
        request: Request<'_, pb::MakeDirRequest>,
    ) -> ServiceResult<pb::MakeDirResponse> {
        let request = request.to_owned_message();
        Response::ok(files::make_dir(self, request).await?)
    }

    async fn remove_path(
        &self,
        _: RequestContext,
        request: Request<'_, pb::RemovePathRequest>,
    ) -> ServiceResult<pb::RemovePathResponse> {
        let request = request.to_owned_message();
        Response::ok(files::remove_path(self, request).await?)
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
