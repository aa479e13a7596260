//! A session: one client and one process, connected by a WebSocket.
//!
//! Three activities run side by side in one task: process events go out, client messages come in,
//! and `controls` delivers them to the guest. The session ends with the process, with the client,
//! or with the server. A process outlives its client.

use std::time::Duration;

use connectrpc::ErrorCode;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at},
};
use wrenn_control::{
    guest::{Guest, GuestEvents},
    lifecycle::ActivityGuard,
};
use wrenn_model::SandboxId;
use wrenn_proto::rpc::process::{
    StartRequest,
    process_event::{EndEvent, Event},
};

use super::{
    controls::{Controls, InputKind, Kill, Target, controls},
    process::Selector,
    socket::{Gone, Inbox, Incoming, Outbox, Outgoing, PING_EVERY},
};
use crate::{
    app::AppState,
    error::{ApiError, Code},
};

/// Maximum number of queued error messages to the client. These messages concern the client's own
/// messages; further ones are dropped.
const MAX_COMPLAINTS: usize = 16;

/// Maximum time until the stream of a process that has ended is at its end.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Protocol of a kind of session.
pub(super) trait Protocol: Send {
    /// Input that the process takes.
    const INPUT: InputKind;
    /// Way in which a client ends the process.
    const KILL: Kill;
    /// Message of a client.
    type ClientMessage: Incoming + Send;
    /// Message to a client.
    type ServerMessage: Outgoing + Send + Sync;
    /// Receiver of client messages. It runs beside the encoder of the output.
    type Listener: Send + Sync;

    /// Returns the receiver of client messages.
    fn listener(&self) -> Self::Listener;

    /// Handles a client message. An error is sent to the client and does not end the session.
    fn on_message(
        listener: &Self::Listener,
        message: Self::ClientMessage,
        controls: &Controls,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// Waits until the next event can be encoded. Cancel-safe.
    fn ready(&mut self) -> impl Future<Output = ()> + Send;

    /// Encodes a process event as messages to the client.
    fn encode(&mut self, event: Event) -> Vec<Self::ServerMessage>;

    /// Encodes a failure.
    fn failure(failure: Failure) -> Self::ServerMessage;

    /// Returns the keep-alive message of the protocol, if the protocol has one.
    fn ping() -> Option<Self::ServerMessage>;
}

/// Failure, as the client receives it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Failure {
    /// Message for the user.
    data: String,
    /// True if the failure ends the session.
    fatal: bool,
    /// Error code for programs, as in the body of an error response, or [`OUTPUT_LOST`].
    code: &'static str,
    /// Exit code that a shell reports for a command that was not started.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    /// Number of bytes of lost output.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_bytes: Option<u64>,
}

/// Code of a failure that is lost output.
const OUTPUT_LOST: &str = "output_lost";

impl Failure {
    fn new(error: ApiError, fatal: bool) -> Self {
        Self {
            data: error.message,
            fatal,
            code: error.code.as_str(),
            exit_code: error.exit_code,
            lost_bytes: None,
        }
    }

    /// Creates the mark for output that no client took and that was dropped.
    pub(super) fn output_lost(bytes: u64) -> Self {
        Self {
            data: format!("{bytes} bytes of output that no client took were dropped"),
            fatal: false,
            code: OUTPUT_LOST,
            exit_code: None,
            lost_bytes: Some(bytes),
        }
    }
}

/// Returns the reason for which a process ended without exiting. The guest agent also reports a
/// reason for normal exits, which is dropped.
pub(super) fn other_end(end: &EndEvent) -> Option<String> {
    end.error
        .clone()
        .filter(|text| !end.exited && !text.is_empty())
}

/// Detects that a process was killed by its timeout. The guest agent reports this after the end
/// event.
async fn explain(mut end: Box<EndEvent>, events: &mut GuestEvents) -> Event {
    let after = tokio::time::timeout(EXPLAIN_TIMEOUT, events.next()).await;
    if let Ok(Err(after)) = after
        && after.code == ErrorCode::DeadlineExceeded
    {
        let how = end.error.take().unwrap_or_default();
        end.error = Some(format!("timed out: {how}"));
    }
    Event::End(end)
}

/// Connection to the process of a session. Its sandbox counts as used as long as it exists.
pub(super) struct Session<P> {
    events: GuestEvents,
    target: Target,
    protocol: P,
    _used: ActivityGuard,
}

impl<P: Protocol> Session<P> {
    /// Starts a process. The request has a tag, by which the session addresses the process. A
    /// `timeout_sec` of 0 means no limit.
    pub(super) async fn start(
        app: &AppState,
        id: &SandboxId,
        request: StartRequest,
        user: &str,
        timeout_sec: u32,
        protocol: P,
    ) -> Result<Self, ApiError> {
        let process = Selector::Tag(request.tag.clone().unwrap_or_default());
        let (guest, used) = app.ready(id).await?;
        let events = guest.start(request, user, timeout_sec, false).await?;
        Ok(Self::new(guest, process, events, protocol, used))
    }

    /// Connects to a running process.
    pub(super) async fn connect(
        app: &AppState,
        id: &SandboxId,
        process: Selector,
        protocol: P,
    ) -> Result<Self, ApiError> {
        let (guest, used) = app.ready(id).await?;
        let events = guest.connect(process.to_rpc()).await?;
        Ok(Self::new(guest, process, events, protocol, used))
    }

    fn new(
        guest: Guest,
        process: Selector,
        events: GuestEvents,
        protocol: P,
        used: ActivityGuard,
    ) -> Self {
        let target = Target {
            guest,
            process,
            input: P::INPUT,
            kill: P::KILL,
        };
        Self {
            events,
            target,
            protocol,
            _used: used,
        }
    }

    async fn run(self, app: &AppState, mut outbox: Outbox, mut inbox: Inbox) {
        let Self {
            events,
            target,
            protocol,
            _used,
        } = self;
        let (controls, pumps) = controls(target);
        let (complain, complaints) = mpsc::channel(MAX_COMPLAINTS);
        {
            let listener = protocol.listener();
            let reading = read::<P>(&mut inbox, listener, controls, complain.clone());
            let delivering = pumps.run(reading, |error| {
                let _ = complain.try_send(ApiError::from(error));
            });
            let sending = send_events(&mut outbox, events, complaints, protocol);
            tokio::select! {
                () = sending => {}
                () = delivering => {}
                () = app.shutdown.cancelled() => {}
            }
        }
        outbox.close(inbox, app).await;
    }
}

/// Runs a session to its end, or rejects it if it could not be opened, and closes the connection.
pub(super) async fn serve<P: Protocol>(
    app: &AppState,
    mut outbox: Outbox,
    inbox: Inbox,
    opened: Result<Session<P>, ApiError>,
) {
    match opened {
        Ok(session) => session.run(app, outbox, inbox).await,
        Err(error) => {
            let failure = P::failure(Failure::new(error, true));
            if outbox.send(&failure).await.is_ok() {
                outbox.close(inbox, app).await;
            }
        }
    }
}

/// Reads until the client has disconnected.
async fn read<P: Protocol>(
    inbox: &mut Inbox,
    listener: P::Listener,
    controls: Controls,
    complain: mpsc::Sender<ApiError>,
) {
    while let Ok(message) = inbox.next::<P::ClientMessage>().await {
        let handled = match message {
            Ok(message) => P::on_message(&listener, message, &controls).await,
            Err(why) => Err(format!("invalid message: {why}")),
        };
        if let Err(text) = handled {
            let _ = complain.try_send(ApiError::new(Code::InvalidRequest, text));
        }
    }
}

/// Sends process events to the client until the process ends. If the client disconnects first,
/// waits until the reader notices, so that messages which the client has already sent are still
/// delivered.
async fn send_events<P: Protocol>(
    outbox: &mut Outbox,
    events: GuestEvents,
    complaints: mpsc::Receiver<ApiError>,
    protocol: P,
) {
    if send_all(outbox, events, complaints, protocol).await == Err(Gone) {
        std::future::pending::<()>().await;
    }
}

async fn send_all<P: Protocol>(
    outbox: &mut Outbox,
    mut events: GuestEvents,
    mut complaints: mpsc::Receiver<ApiError>,
    mut protocol: P,
) -> Result<(), Gone> {
    let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = async {
            protocol.ready().await;
            events.next().await
        };
        tokio::select! {
            next = next => match next {
                Ok(Some(event)) => {
                    let (event, ended) = match event {
                        Event::End(end) => (explain(end, &mut events).await, true),
                        other => (other, false),
                    };
                    for message in protocol.encode(event) {
                        outbox.send(&message).await?;
                    }
                    if ended {
                        return Ok(());
                    }
                }
                Ok(None) => {
                    let text = "the output stream of the process ended unexpectedly";
                    let error = ApiError::new(Code::AgentError, text);
                    return outbox.send(&P::failure(Failure::new(error, true))).await;
                }
                Err(error) => {
                    let failure = Failure::new(error.into(), true);
                    return outbox.send(&P::failure(failure)).await;
                }
            },
            Some(error) = complaints.recv() => {
                outbox.send(&P::failure(Failure::new(error, false))).await?;
            }
            _ = pings.tick() => {
                if let Some(ping) = P::ping() {
                    outbox.send(&ping).await?;
                }
                outbox.ping().await?;
            }
        }
    }
}
