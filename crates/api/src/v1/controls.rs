//! Delivery of a client's messages to a process: input, terminal size, signals.
//!
//! Reading the socket never waits for a call to the guest. Input goes through a queue, which is
//! drained in order, in calls of up to 64 KiB. Size and signals bypass the queue, so that a process
//! that reads no input can still be killed. Only the newest size counts. Nothing is dropped: when
//! 1 MiB of input waits for the process, reading the socket stops until the process has taken some
//! of it. Later messages of the client wait, too.
//!
//! When the client disconnects, messages that it has already sent are delivered within
//! [`DELIVER_TIMEOUT`].

use std::{sync::Arc, time::Duration};

use connectrpc::ErrorCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use wrenn_control::{agent_client::AgentError, guest::Guest};
use wrenn_proto::rpc::process::{ProcessInput, Signal, process_input};

use super::process::Selector;

/// Maximum queued input, in bytes.
const MAX_WAITING_BYTES: usize = 1024 * 1024;

/// Accounted overhead of a queued message, in bytes.
const MESSAGE_WEIGHT_BYTES: usize = 64;

/// Maximum input per call to the guest, in bytes.
const MAX_CALL_BYTES: usize = 64 * 1024;

/// Maximum time to deliver queued messages after the client has disconnected.
const DELIVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time between SIGTERM and SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// Maximum number of attempts to send a signal. Only lost connections are retried.
const SIGNAL_ATTEMPTS: usize = 3;

/// Way in which a client ends a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kill {
    /// SIGTERM, then SIGKILL after 5 s or at the client's second request.
    Politely,
    /// SIGKILL at once.
    AtOnce,
}

/// Kind of input that a process takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InputKind {
    Stdin,
    Pty,
}

/// Process that a session controls.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) guest: Guest,
    pub(super) process: Selector,
    pub(super) input: InputKind,
    pub(super) kill: Kill,
}

enum Waiting {
    Bytes(Vec<u8>, OwnedSemaphorePermit),
    Close,
}

/// Sending half, used by the reader of the socket.
pub(super) struct Controls {
    room: Arc<Semaphore>,
    input: mpsc::UnboundedSender<Waiting>,
    size: watch::Sender<Option<(u32, u32)>>,
    kills: watch::Sender<u32>,
}

/// Receiving half, which calls the guest.
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
    /// Queues input. Waits while too much input is queued.
    pub(super) async fn input(&self, bytes: Vec<u8>) {
        let weight = (bytes.len() + MESSAGE_WEIGHT_BYTES).min(MAX_WAITING_BYTES);
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        // Fails only when the process has ended, and then the input is not needed.
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
    /// Delivers messages while the reader runs, then the remaining ones within a deadline. Failures
    /// are passed to `complain`.
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
                // The process has ended. The output stream reports that.
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
            // Only after the reader has ended.
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
                complain(target.guest.close_stdin(target.process.to_rpc()).await);
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
                complain(target.send(bytes).await);
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
        let process = target.process.to_rpc();
        complain(target.guest.resize(process, cols, rows).await);
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
            complain(target.signal(Signal::SIGNAL_SIGTERM).await);
            // A second request cuts the grace period short. A disconnect of the client does not.
            let demanded = async {
                if kills.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let _ = tokio::time::timeout(TERM_GRACE, demanded).await;
        }
        complain(target.signal(Signal::SIGNAL_SIGKILL).await);
    }
}

impl Target {
    async fn send(&self, bytes: Vec<u8>) -> Result<(), AgentError> {
        let input = match self.input {
            InputKind::Stdin => process_input::Input::Stdin(bytes),
            InputKind::Pty => process_input::Input::Pty(bytes),
        };
        let input = ProcessInput {
            input: Some(input),
            ..Default::default()
        };
        self.guest.send_input(self.process.to_rpc(), input).await
    }

    async fn signal(&self, number: Signal) -> Result<(), AgentError> {
        let mut result = Ok(());
        for _ in 0..SIGNAL_ATTEMPTS {
            result = self.guest.signal(self.process.to_rpc(), number).await;
            match &result {
                Err(error) if error.code == ErrorCode::Unavailable => {}
                _ => return result,
            }
        }
        result
    }
}
