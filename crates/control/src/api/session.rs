//! A client and a process, connected by a WebSocket.
//!
//! Three things run side by side in one task: the process's events go out, the client's messages come in, and what they ask
//! for is carried out (`controls`). The session ends with the process, with the client, or with the server. A process
//! lives on without its client.

use std::time::Duration;

use connectrpc::ErrorCode;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at},
};
use wrenn_proto::rpc::process::{
    ProcessEvent,
    process_event::{EndEvent, Event},
};

use super::{
    AppState,
    controls::{Controls, Target, controls},
    error::ApiError,
    socket::{Gone, Inbox, Outbox, PING_EVERY},
};
use crate::agent_client::{AgentError, ProcessStream};

/// Complaints to the client that may wait. They are about its own messages; more than this are not worth a wait.
const MAX_COMPLAINTS: usize = 16;

/// Until the stream of a process that has ended is at its end.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How a kind of session talks.
pub(super) trait Dialect: Send {
    /// A client's message.
    type Said: DeserializeOwned + Send;
    /// A message to the client.
    type Out: Serialize + Send + Sync;

    /// Does what the client says. The error is for the client, which may go on.
    fn hear(
        said: Self::Said,
        controls: &Controls,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// What to tell of an event.
    fn tell(&mut self, event: Event) -> Vec<Self::Out>;

    /// Something went wrong; `fatal` if the session ends with it.
    fn error(text: String, fatal: bool) -> Self::Out;

    /// A sign of life in the session's own language, if it has one.
    fn ping() -> Option<Self::Out>;
}

/// How a process ended, if not by exit. The guest agent has words for that too.
pub(super) fn other_end(end: &EndEvent) -> Option<String> {
    end.error
        .clone()
        .filter(|text| !end.exited && !text.is_empty())
}

/// Finds out whether a process was killed because its time was up: the guest agent says so after its end.
async fn explain(mut end: Box<EndEvent>, events: &mut ProcessStream) -> Event {
    let after = tokio::time::timeout(EXPLAIN_TIMEOUT, events.message()).await;
    if let Ok(Err(after)) = after
        && after.code == ErrorCode::DeadlineExceeded
    {
        let how = end.error.take().unwrap_or_default();
        end.error = Some(format!("its time was over: {how}"));
    }
    Event::End(end)
}

/// Runs a session to its end, and closes the connection.
pub(super) async fn run<D: Dialect>(
    app: &AppState,
    mut outbox: Outbox,
    mut inbox: Inbox,
    events: ProcessStream,
    target: Target,
    dialect: D,
) {
    let (controls, pumps) = controls(target);
    let (complain, complaints) = mpsc::channel(MAX_COMPLAINTS);
    {
        let reading = read::<D>(&mut inbox, controls, complain.clone());
        let hearing = pumps.run(reading, |error| {
            let _ = complain.try_send(ApiError::from(error).message);
        });
        let telling = tell(&mut outbox, events, complaints, dialect);
        tokio::select! {
            () = telling => {}
            () = hearing => {}
            () = app.shutdown.cancelled() => {}
        }
    }
    outbox.close(inbox, app).await;
}

/// Refuses a session, and closes the connection.
pub(super) async fn refuse<D: Dialect>(
    app: &AppState,
    mut outbox: Outbox,
    inbox: Inbox,
    text: String,
) {
    if outbox.say(&D::error(text, true)).await.is_ok() {
        outbox.close(inbox, app).await;
    }
}

/// Reads until the client is gone.
async fn read<D: Dialect>(inbox: &mut Inbox, controls: Controls, complain: mpsc::Sender<String>) {
    while let Ok(said) = inbox.next::<D::Said>().await {
        let heard = match said {
            Ok(said) => D::hear(said, &controls).await,
            Err(why) => Err(format!("a message is not understood: {why}")),
        };
        if let Err(text) = heard {
            let _ = complain.try_send(text);
        }
    }
}

/// Tells the client of the process until that ends. If the client is gone first, waits for the reader to find out, so that
/// what the client had said is still delivered.
async fn tell<D: Dialect>(
    outbox: &mut Outbox,
    events: ProcessStream,
    complaints: mpsc::Receiver<String>,
    dialect: D,
) {
    if tell_all(outbox, events, complaints, dialect).await == Err(Gone) {
        std::future::pending::<()>().await;
    }
}

async fn tell_all<D: Dialect>(
    outbox: &mut Outbox,
    mut events: ProcessStream,
    mut complaints: mpsc::Receiver<String>,
    mut dialect: D,
) -> Result<(), Gone> {
    let mut pings = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = events.message() => match message {
                Ok(Some(message)) => {
                    let event: Option<ProcessEvent> = message.to_owned_message().event.into_option();
                    let Some(event) = event.and_then(|event| event.event) else { continue };
                    let (event, ended) = match event {
                        Event::End(end) => (explain(end, &mut events).await, true),
                        other => (other, false),
                    };
                    for out in dialect.tell(event) {
                        outbox.say(&out).await?;
                    }
                    if ended {
                        return Ok(());
                    }
                }
                Ok(None) => {
                    let text = "the process's output broke off".to_owned();
                    return outbox.say(&D::error(text, true)).await;
                }
                Err(error) => {
                    let error = ApiError::from(AgentError::from(error));
                    return outbox.say(&D::error(error.message, true)).await;
                }
            },
            Some(text) = complaints.recv() => outbox.say(&D::error(text, false)).await?,
            _ = pings.tick() => {
                if let Some(ping) = D::ping() {
                    outbox.say(&ping).await?;
                }
                outbox.ping().await?;
            }
        }
    }
}
