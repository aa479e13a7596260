//! Processes in the guest.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode, ServiceStream};
use futures::{StreamExt as _, stream};
use wrenn_model::limits::{MAX_EXEC_OUTPUT_BYTES, MAX_TIMEOUT_SEC};
use wrenn_proto::rpc::{
    hostagent::v1 as pb,
    process::{
        self as guest,
        __buffa::oneof::{
            process_event::{Event, data_event::Output},
            process_selector::Selector,
        },
        ProcessEvent, ProcessSelector,
    },
};

use super::InUse;
use crate::envd_client::{ConnectStream, StartStream};

/// Grace period beyond the time limit of a collected command, for its end to be reported.
const END_GRACE: Duration = Duration::from_secs(15);

/// Interval at which a running command counts as activity. Far below the shortest useful idle
/// timeout.
const TOUCH_INTERVAL: Duration = Duration::from_secs(1);

/// Event stream of a process, from a start or a connect call.
enum Events {
    Started(StartStream),
    Connected(ConnectStream),
}

impl Events {
    async fn next(&mut self) -> Result<Option<ProcessEvent>, ConnectError> {
        loop {
            let event = match self {
                Self::Started(stream) => match stream.message().await? {
                    Some(message) => message.to_owned_message().event,
                    None => return Ok(None),
                },
                Self::Connected(stream) => match stream.message().await? {
                    Some(message) => message.to_owned_message().event,
                    None => return Ok(None),
                },
            };
            // A message without an event is of a kind that this agent does not know yet.
            if let Some(event) = event.into_option() {
                return Ok(Some(event));
            }
        }
    }
}

/// Runs a command until it ends and collects its output.
pub(super) async fn exec(
    in_use: InUse,
    request: pb::ExecRequest,
) -> Result<pb::ExecResponse, ConnectError> {
    let start = guest::StartRequest {
        process: request.process,
        tag: request.tag,
        // No client can write to the command's input, so the input is at its end from the start. A
        // command that reads it does not block forever.
        stdin: Some(false),
        ..Default::default()
    };
    let limit = time_limit(request.timeout_sec)?;
    let run = async {
        let stream = in_use
            .running
            .envd
            .start(start, &request.user, limit, false)
            .await?;
        collect(&in_use, Events::Started(stream), limit).await
    };
    // The caller is waiting for the command, so the sandbox is in use even while the command is
    // silent.
    let run = touching(&in_use, run);
    let Some(limit) = limit else {
        return in_use.wait_for(run).await;
    };
    // The guest normally enforces the time limit. This deadline covers a guest that does not.
    let run = tokio::time::timeout(limit + END_GRACE, in_use.wait_for(run));
    run.await.unwrap_or_else(|_| {
        Err(ConnectError::deadline_exceeded(format!(
            "the end of the command was not reported within {END_GRACE:?} after its time limit of {limit:?}"
        )))
    })
}

async fn collect(
    in_use: &InUse,
    mut events: Events,
    limit: Option<Duration>,
) -> Result<pb::ExecResponse, ConnectError> {
    let mut response = pb::ExecResponse::default();
    let mut pid = None;
    while let Some(event) = events.next().await? {
        in_use.sandbox.touch();
        match event.event {
            Some(Event::Start(start)) => pid = Some(start.pid),
            Some(Event::Data(data)) => {
                let (buffer, bytes, name) = match data.output {
                    Some(Output::Stdout(bytes)) => (&mut response.stdout, bytes, "stdout"),
                    Some(Output::Stderr(bytes)) => (&mut response.stderr, bytes, "stderr"),
                    Some(Output::Pty(_)) | None => continue,
                };
                if buffer.len() + bytes.len() > MAX_EXEC_OUTPUT_BYTES {
                    end_process(in_use, pid).await;
                    return Err(ConnectError::out_of_range(format!(
                        "the command printed more than {MAX_EXEC_OUTPUT_BYTES} bytes to {name} and was killed; \
                         stream its output instead"
                    )));
                }
                buffer.extend_from_slice(&bytes);
            }
            Some(Event::End(end)) => {
                response.exit_code = end.exit_code;
                // The guest agent also describes a normal exit; that text is dropped.
                let ended = end.error.filter(|_| !end.exited).unwrap_or_default();
                response.error = match (limit, events.next().await) {
                    (Some(limit), Err(after)) if after.code == ErrorCode::DeadlineExceeded => {
                        format!("timed out after {} s: {ended}", limit.as_secs())
                    }
                    _ => ended,
                };
                return Ok(response);
            }
            Some(Event::Keepalive(_)) | None => {}
        }
    }
    Err(ConnectError::unavailable(
        "the command's output ended before the command's exit was reported",
    ))
}

/// Kills a process whose output is no longer needed.
async fn end_process(in_use: &InUse, pid: Option<u32>) {
    let Some(pid) = pid else { return };
    let request = guest::SendSignalRequest {
        process: ProcessSelector {
            selector: Some(Selector::Pid(pid)),
            ..Default::default()
        }
        .into(),
        signal: guest::Signal::SIGNAL_SIGKILL.into(),
        ..Default::default()
    };
    if let Err(error) = in_use.running.envd.signal(request).await {
        tracing::debug!(pid, %error, "failed to kill the process, it may have ended");
    }
}

/// Starts a process and streams its events. The process keeps running if the caller disconnects.
pub(super) async fn start(
    in_use: InUse,
    request: pb::ExecStreamRequest,
) -> Result<ServiceStream<pb::ExecStreamResponse>, ConnectError> {
    let Some(start) = request.start.into_option() else {
        return Err(ConnectError::invalid_argument("`start` is required"));
    };
    let limit = time_limit(request.timeout_sec)?;
    let envd = &in_use.running.envd;
    let call = envd.start(start, &request.user, limit, request.detached);
    let stream = in_use.wait_for(call).await?;
    Ok(forward(in_use, Events::Started(stream)))
}

/// Streams the output of a running process from now on.
pub(super) async fn connect(
    in_use: InUse,
    request: pb::ConnectProcessRequest,
) -> Result<ServiceStream<pb::ExecStreamResponse>, ConnectError> {
    let connect = guest::ConnectRequest {
        process: request.process,
        ..Default::default()
    };
    let call = in_use.running.envd.connect(connect);
    let stream = in_use.wait_for(call).await?;
    Ok(forward(in_use, Events::Connected(stream)))
}

/// Streams events to the caller. Events are fetched only as fast as the caller takes them, so a
/// slow reader slows the process down and nothing accumulates here.
fn forward(in_use: InUse, events: Events) -> ServiceStream<pb::ExecStreamResponse> {
    let next = async |(in_use, mut events): (InUse, Events)| {
        let event = match in_use.wait_for(events.next()).await {
            Ok(event) => Ok(event?),
            Err(error) => Err(error),
        };
        // A keepalive shows that the connection is alive, not that the sandbox is in use.
        if !matches!(&event, Ok(event) if matches!(event.event, Some(Event::Keepalive(_)))) {
            in_use.sandbox.touch();
        }
        let response = event.map(|event| pb::ExecStreamResponse {
            event: event.into(),
            ..Default::default()
        });
        // The stream ends after an error.
        let rest = response.is_ok().then_some((in_use, events));
        Some((response, rest))
    };
    let step = move |state: Option<(InUse, Events)>| async move { next(state?).await };
    stream::unfold(Some((in_use, events)), step).boxed()
}

pub(super) async fn list(in_use: &InUse) -> Result<pb::ListProcessesResponse, ConnectError> {
    Ok(pb::ListProcessesResponse {
        processes: in_use.wait_for(in_use.running.envd.processes()).await?,
        ..Default::default()
    })
}

pub(super) async fn send_input(
    in_use: &InUse,
    request: pb::SendInputRequest,
) -> Result<pb::SendInputResponse, ConnectError> {
    let call = in_use.running.envd.send_input(guest::SendInputRequest {
        process: request.process,
        input: request.input,
        ..Default::default()
    });
    in_use.wait_for(call).await?;
    Ok(pb::SendInputResponse::default())
}

pub(super) async fn close_stdin(
    in_use: &InUse,
    request: pb::CloseStdinRequest,
) -> Result<pb::CloseStdinResponse, ConnectError> {
    let call = in_use.running.envd.close_stdin(guest::CloseStdinRequest {
        process: request.process,
        ..Default::default()
    });
    in_use.wait_for(call).await?;
    Ok(pb::CloseStdinResponse::default())
}

pub(super) async fn resize_pty(
    in_use: &InUse,
    request: pb::ResizePtyRequest,
) -> Result<pb::ResizePtyResponse, ConnectError> {
    let size = guest::pty::Size {
        cols: request.cols,
        rows: request.rows,
        ..Default::default()
    };
    let call = in_use.running.envd.update(guest::UpdateRequest {
        process: request.process,
        pty: guest::PTY {
            size: size.into(),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    });
    in_use.wait_for(call).await?;
    Ok(pb::ResizePtyResponse::default())
}

pub(super) async fn signal(
    in_use: &InUse,
    request: pb::SignalProcessRequest,
) -> Result<pb::SignalProcessResponse, ConnectError> {
    let call = in_use.running.envd.signal(guest::SendSignalRequest {
        process: request.process,
        signal: request.signal,
        ..Default::default()
    });
    in_use.wait_for(call).await?;
    Ok(pb::SignalProcessResponse::default())
}

fn time_limit(seconds: u32) -> Result<Option<Duration>, ConnectError> {
    if seconds > MAX_TIMEOUT_SEC {
        return Err(ConnectError::invalid_argument(format!(
            "`timeout_sec`: {seconds} is out of range, expected 0 to {MAX_TIMEOUT_SEC}"
        )));
    }
    Ok((seconds > 0).then(|| Duration::from_secs(seconds.into())))
}

/// Runs `work` and counts it as activity until it completes.
async fn touching<T>(in_use: &InUse, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        match tokio::time::timeout(TOUCH_INTERVAL, &mut work).await {
            Ok(done) => return done,
            Err(_) => in_use.sandbox.touch(),
        }
    }
}
