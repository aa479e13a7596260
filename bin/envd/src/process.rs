//! Service `process.Process`, a thin layer over [`registry`], [`spawn`] and [`output`].

pub mod child;
mod descendants;
pub mod input;
pub mod output;
mod reader;
pub mod registry;
pub mod signals;
pub mod spawn;
pub mod start_error;

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures::{Stream, StreamExt as _, stream};
use tokio::time::timeout;
use wrenn_proto::{
    headers,
    rpc::process::{
        self as rpc,
        __buffa::oneof::{
            process_event::Event as WireEvent, process_input::Input, process_selector::Selector,
            stream_input_request::Event as InputEvent,
        },
    },
};

use self::{
    output::{Event, Kind, Subscription, data_event},
    registry::Running,
    spawn::Launcher,
};
use crate::auth;

/// Silence after which a keep-alive is sent, unless the client requests another interval.
const KEEPALIVE: Duration = Duration::from_secs(90);
/// Maximum time that a SIGKILL call waits for the process to die.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// Implementation of the service.
pub struct ProcessService {
    launcher: Launcher,
}

impl ProcessService {
    /// Creates a service that starts processes with `launcher`.
    #[must_use]
    pub fn new(launcher: Launcher) -> Self {
        Self { launcher }
    }

    fn running(
        &self,
        selector: Option<&rpc::ProcessSelector>,
    ) -> Result<Arc<Running>, ConnectError> {
        self.launcher.processes.find_running(required(selector)?)
    }
}

fn required(selector: Option<&rpc::ProcessSelector>) -> Result<&Selector, ConnectError> {
    selector
        .and_then(|s| s.selector.as_ref())
        .ok_or_else(|| ConnectError::invalid_argument("`process` requires a pid or a tag"))
}

/// Stream message of `Start` or `Connect`.
trait FromEvent: Send + 'static {
    fn of(event: rpc::ProcessEvent) -> Self;
}

impl FromEvent for rpc::StartResponse {
    fn of(event: rpc::ProcessEvent) -> Self {
        Self {
            event: event.into(),
            ..Default::default()
        }
    }
}

impl FromEvent for rpc::ConnectResponse {
    fn of(event: rpc::ProcessEvent) -> Self {
        Self {
            event: event.into(),
            ..Default::default()
        }
    }
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, ConnectError>> + Send>>;

/// Requests of a client about the form of an event stream.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Silence after which a keep-alive is sent.
    keepalive: Duration,
    /// True if lost output is an event of its own. Otherwise it is text in the output, because
    /// clients of E2B reject events that they do not know.
    has_lost_events: bool,
}

impl Form {
    fn of(context: &RequestContext) -> Self {
        Self {
            keepalive: keepalive_of(context),
            has_lost_events: context.header(headers::LOST_OUTPUT).is_some(),
        }
    }

    /// Returns the event for lost output of a process.
    fn lost(self, bytes: u64, is_terminal: bool) -> WireEvent {
        if self.has_lost_events {
            let lost = rpc::process_event::LostEvent {
                bytes,
                ..Default::default()
            };
            return lost.into();
        }
        let (kind, end) = match is_terminal {
            true => (Kind::Terminal, "\r\n"),
            false => (Kind::Stderr, "\n"),
        };
        let text = format!("[envd: {bytes} bytes of output that no client took were dropped]{end}");
        data_event(kind, text.into_bytes()).into()
    }
}

/// Output of a process, and its form for one client.
struct Outlet {
    subscription: Subscription,
    form: Form,
    is_terminal: bool,
}

impl Outlet {
    /// Returns the next event, and the outlet unless it was the last event.
    async fn next(mut self) -> (Result<WireEvent, ConnectError>, Option<Self>) {
        let event: WireEvent = match timeout(self.form.keepalive, self.subscription.next()).await {
            Err(_) => rpc::process_event::KeepAlive::default().into(),
            Ok(Some(Event::Data(data))) => data.into(),
            Ok(Some(Event::Lost(bytes))) => self.form.lost(bytes, self.is_terminal),
            Ok(Some(Event::End(end))) => return (Ok(end.into()), None),
            Ok(Some(Event::TooSlow)) => {
                let text = "output was not taken for too long, and the rest was not sent; \
                            connect to the process to continue";
                return (Err(ConnectError::data_loss(text)), None);
            }
            // The task that owns the process ended without an end event. The stream must not look
            // complete.
            Ok(None) => {
                let text = "output of the process ended without an end event";
                return (Err(ConnectError::internal(text)), None);
            }
        };
        (Ok(event), Some(self))
    }
}

/// Returns the stream of a process's events: the start, then the output with keep-alives during
/// silence, then the end. Without an outlet, the stream consists of the start only. If the process
/// was killed because the call's timeout expired, the stream fails after the end event, so that
/// clients can distinguish a timeout from a kill.
fn events<T: FromEvent>(
    pid: u32,
    outlet: Option<Outlet>,
    started: Option<Arc<Running>>,
) -> Events<T> {
    let wire = |event: WireEvent| {
        Ok(T::of(rpc::ProcessEvent {
            event: Some(event),
            ..Default::default()
        }))
    };
    let start = rpc::process_event::StartEvent {
        pid,
        ..Default::default()
    };
    let first = stream::once(async move { wire(start.into()) });
    let rest = stream::unfold(outlet, move |outlet| async move {
        let (event, outlet) = outlet?.next().await;
        Some((event.and_then(wire), outlet))
    });
    let last = stream::iter(started).filter_map(async |process| {
        let expired = process.expired.load(Ordering::SeqCst);
        expired.then(|| {
            Err(ConnectError::deadline_exceeded(
                "process timed out and was killed",
            ))
        })
    });
    first.chain(rest).chain(last).boxed()
}

fn keepalive_of(context: &RequestContext) -> Duration {
    context
        .header("keepalive-ping-interval")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .filter(|seconds| *seconds > 0)
        .map_or(KEEPALIVE, Duration::from_secs)
}

#[expect(refining_impl_trait, reason = "plain messages")]
impl rpc::Process for ProcessService {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, rpc::ListRequest>,
    ) -> ServiceResult<rpc::ListResponse> {
        Response::ok(rpc::ListResponse {
            processes: self.launcher.processes.list(),
            ..Default::default()
        })
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::StartRequest>,
    ) -> ServiceResult<ServiceStream<rpc::StartResponse>> {
        let user = auth::rpc_user(&context, &self.launcher.settings)?;
        let limit = context.time_remaining();
        let request = request.to_owned_message();
        let (process, subscription) =
            spawn::start(&self.launcher, &user, request, limit).map_err(ConnectError::from)?;
        // Without a subscriber, the output is kept from its first byte.
        let is_detached = context.header(headers::DETACHED).is_some();
        let outlet = (!is_detached).then(|| Outlet {
            subscription,
            form: Form::of(&context),
            is_terminal: process.input.is_terminal(),
        });
        Response::stream_ok(events(process.pid, outlet, Some(process)))
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, rpc::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<rpc::ConnectResponse>> {
        let request = request.to_owned_message();
        // A process that has just ended may still have output to deliver.
        let selector = required(request.process.as_option())?;
        let found = self.launcher.processes.find_output(selector)?;
        let outlet = Outlet {
            subscription: found.output.subscribe(),
            form: Form::of(&context),
            is_terminal: found.is_terminal,
        };
        Response::stream_ok(events(found.pid, Some(outlet), None))
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::UpdateRequest>,
    ) -> ServiceResult<rpc::UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        if let Some(size) = request.pty.as_option().and_then(|pty| pty.size.as_option()) {
            process.input.resize(size.cols, size.rows)?;
        }
        Response::ok(rpc::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: InboundStream<rpc::StreamInputRequest>,
    ) -> ServiceResult<rpc::StreamInputResponse> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(InputEvent::Start(start)) => {
                    process = Some(self.running(start.process.as_option())?);
                }
                Some(InputEvent::Data(data)) => {
                    let process = process.as_ref().ok_or_else(|| {
                        ConnectError::invalid_argument("the first message must be `start`")
                    })?;
                    send(
                        process,
                        data.input.as_option().and_then(|i| i.input.clone()),
                    )
                    .await?;
                }
                Some(InputEvent::Keepalive(_)) | None => {}
            }
        }
        Response::ok(rpc::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::SendInputRequest>,
    ) -> ServiceResult<rpc::SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        send(
            &process,
            request.input.as_option().and_then(|i| i.input.clone()),
        )
        .await?;
        Response::ok(rpc::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::SendSignalRequest>,
    ) -> ServiceResult<rpc::SendSignalResponse> {
        let request = request.to_owned_message();
        let process = self.running(request.process.as_option())?;
        let signal = match request.signal.as_known() {
            Some(rpc::Signal::SIGNAL_SIGTERM) => nix::sys::signal::Signal::SIGTERM,
            Some(rpc::Signal::SIGNAL_SIGKILL) => nix::sys::signal::Signal::SIGKILL,
            _ => {
                return Err(ConnectError::unimplemented(
                    "unsupported signal: only SIGTERM and SIGKILL can be sent",
                ));
            }
        };
        process.signal(signal)?;
        if signal == nix::sys::signal::Signal::SIGKILL {
            // The client may check for the process as soon as it gets this response. A process that
            // is blocked in the kernel dies later.
            let _ = tokio::time::timeout(KILL_WAIT, process.reaped.cancelled()).await;
        }
        Response::ok(rpc::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, rpc::CloseStdinRequest>,
    ) -> ServiceResult<rpc::CloseStdinResponse> {
        let process = self.running(request.to_owned_message().process.as_option())?;
        process.input.close().await?;
        Response::ok(rpc::CloseStdinResponse::default())
    }
}

async fn send(process: &Running, input: Option<Input>) -> Result<(), ConnectError> {
    match input {
        Some(Input::Stdin(bytes)) => process.input.write_stdin(&bytes).await,
        Some(Input::Pty(bytes)) => process.input.write_terminal(&bytes).await,
        None => Err(ConnectError::invalid_argument(
            "`input` requires `stdin` or `pty`",
        )),
    }
}

/// Returns a selector for a pid.
#[must_use]
pub fn by_pid(pid: u32) -> rpc::ProcessSelector {
    rpc::ProcessSelector {
        selector: Some(Selector::Pid(pid)),
        ..Default::default()
    }
}
