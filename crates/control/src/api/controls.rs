//! From a client's messages to the process: input, size, signals.
//!
//! Reading the socket never waits for a call to the agent. Input goes through a queue that is emptied in order, in calls of
//! up to 64 KiB; size and signals go beside it, so that a process which takes no input can still be killed. Only the last size
//! counts. Nothing is dropped: when 1 MiB of input waits for the process, reading the socket stops until some of it is
//! taken (and with it whatever the client says after that).
//!
//! When the client goes away, what it has said is delivered, within [`DELIVER_TIMEOUT`].

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use wrenn_proto::{
    SandboxId,
    rpc::{
        hostagent::v1 as rpc,
        process::{self, process_input},
    },
};

use super::process::{Selector, signal};
use crate::agent_client::{AgentClient, AgentError};

/// Input that may wait, bytes.
const MAX_WAITING_BYTES: usize = 1024 * 1024;

/// What a waiting message weighs beside its bytes.
const MESSAGE_WEIGHT_BYTES: usize = 64;

/// Input of one call.
const MAX_CALL_BYTES: usize = 64 * 1024;

/// What is left to do when the client has gone.
const DELIVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Between the polite signal and the other one.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// How often a signal that could not be sent is sent again.
const SIGNAL_ATTEMPTS: usize = 3;

/// How a client ends a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kill {
    /// SIGTERM; SIGKILL after 5 s, or when asked a second time.
    Politely,
    /// SIGKILL.
    AtOnce,
}

/// Which kind of input it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputKind {
    Stdin,
    Pty,
}

/// The process that is controlled.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) agent: AgentClient,
    pub(super) id: SandboxId,
    pub(super) process: Selector,
    pub(super) input: InputKind,
    pub(super) kill: Kill,
}

enum Waiting {
    Bytes(Vec<u8>, OwnedSemaphorePermit),
    Close,
}

/// The reader's end.
pub(super) struct Controls {
    room: Arc<Semaphore>,
    input: mpsc::UnboundedSender<Waiting>,
    size: watch::Sender<Option<(u32, u32)>>,
    kills: watch::Sender<u32>,
}

/// The other end: what carries it out.
pub(super) struct Pumps {
    target: Target,
    input: mpsc::UnboundedReceiver<Waiting>,
    size: watch::Receiver<Option<(u32, u32)>>,
    kills: watch::Receiver<u32>,
}

pub(super) fn controls(target: Target) -> (Controls, Pumps) {
    let (input_to, input) = mpsc::unbounded_channel();
    let (size_to, size) = watch::channel(None);
    let (kills_to, kills) = watch::channel(0);
    let controls = Controls {
        room: Arc::new(Semaphore::new(MAX_WAITING_BYTES)),
        input: input_to,
        size: size_to,
        kills: kills_to,
    };
    let pumps = Pumps {
        target,
        input,
        size,
        kills,
    };
    (controls, pumps)
}

impl Controls {
    /// Queues input; waits while too much is queued.
    pub(super) async fn input(&self, bytes: Vec<u8>) {
        let weight = (bytes.len() + MESSAGE_WEIGHT_BYTES).min(MAX_WAITING_BYTES);
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        // Fails only when the process is gone, and then nobody wants it.
        if let Ok(room) = Arc::clone(&self.room).acquire_many_owned(weight).await {
            let _ = self.input.send(Waiting::Bytes(bytes, room));
        }
    }

    /// Queues the end of the input.
    pub(super) fn close_input(&self) {
        let _ = self.input.send(Waiting::Close);
    }

    /// Sets the size of the terminal.
    pub(super) fn resize(&self, cols: u32, rows: u32) {
        self.size.send_replace(Some((cols, rows)));
    }

    /// Ends the process.
    pub(super) fn kill(&self) {
        self.kills.send_modify(|n| *n += 1);
    }
}

impl Pumps {
    /// Carries out what the reader says, while it reads; then what is left, within bounds. Failures go to `complain`.
    pub(super) async fn run(
        self,
        reading: impl Future<Output = ()>,
        complain: impl Fn(AgentError),
    ) {
        let Self {
            target,
            input,
            size,
            kills,
        } = self;
        let complain = |result: Result<(), AgentError>| {
            if let Err(error) = result
                // It has ended, and its output says so.
                && !error.is_not_found()
            {
                complain(error);
            }
        };
        let pumping = async {
            tokio::join!(
                pump_input(&target, input, &complain),
                pump_size(&target, size, &complain),
                pump_kills(&target, kills, &complain),
            );
        };
        let mut pumping = std::pin::pin!(pumping);
        tokio::select! {
            () = reading => {}
            // Not before the reader has gone.
            () = &mut pumping => return,
        }
        let _ = tokio::time::timeout(DELIVER_TIMEOUT, pumping).await;
    }
}

async fn pump_input(
    target: &Target,
    mut waiting: mpsc::UnboundedReceiver<Waiting>,
    complain: &impl Fn(Result<(), AgentError>),
) {
    let mut next = waiting.recv().await;
    while let Some(first) = next.take() {
        match first {
            Waiting::Close => {
                let request = rpc::CloseStdinRequest {
                    id: target.id.to_string(),
                    process: target.process.to_rpc().into(),
                    ..Default::default()
                };
                complain(target.agent.close_stdin(request).await);
            }
            Waiting::Bytes(mut bytes, room) => {
                let mut rooms = vec![room];
                while bytes.len() < MAX_CALL_BYTES && next.is_none() {
                    match waiting.try_recv() {
                        Ok(Waiting::Bytes(more, room))
                            if bytes.len() + more.len() <= MAX_CALL_BYTES =>
                        {
                            bytes.extend_from_slice(&more);
                            rooms.push(room);
                        }
                        Ok(other) => next = Some(other),
                        Err(_) => break,
                    }
                }
                complain(target.agent.send_input(target.input_request(bytes)).await);
                drop(rooms);
            }
        }
        if next.is_none() {
            next = waiting.recv().await;
        }
    }
}

async fn pump_size(
    target: &Target,
    mut size: watch::Receiver<Option<(u32, u32)>>,
    complain: &impl Fn(Result<(), AgentError>),
) {
    while size.changed().await.is_ok() {
        let Some((cols, rows)) = *size.borrow_and_update() else {
            continue;
        };
        let request = rpc::ResizePtyRequest {
            id: target.id.to_string(),
            process: target.process.to_rpc().into(),
            cols,
            rows,
            ..Default::default()
        };
        complain(target.agent.resize(request).await);
    }
}

async fn pump_kills(
    target: &Target,
    mut kills: watch::Receiver<u32>,
    complain: &impl Fn(Result<(), AgentError>),
) {
    while kills.changed().await.is_ok() {
        kills.borrow_and_update();
        if target.kill == Kill::Politely {
            complain(target.signal(process::Signal::SIGNAL_SIGTERM).await);
            // A second demand ends the grace; the client's end does not.
            let demanded = async {
                if kills.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let _ = tokio::time::timeout(TERM_GRACE, demanded).await;
        }
        complain(target.signal(process::Signal::SIGNAL_SIGKILL).await);
    }
}

impl Target {
    fn input_request(&self, bytes: Vec<u8>) -> rpc::SendInputRequest {
        let input = match self.input {
            InputKind::Stdin => process_input::Input::Stdin(bytes),
            InputKind::Pty => process_input::Input::Pty(bytes),
        };
        rpc::SendInputRequest {
            id: self.id.to_string(),
            process: self.process.to_rpc().into(),
            input: process::ProcessInput {
                input: Some(input),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        }
    }

    async fn signal(&self, number: process::Signal) -> Result<(), AgentError> {
        let mut result = Ok(());
        for _ in 0..SIGNAL_ATTEMPTS {
            let request = signal(&self.id, &self.process, number);
            result = self.agent.signal(request).await;
            match &result {
                Err(error) if error.connection_lost => {}
                _ => return result,
            }
        }
        result
    }
}
