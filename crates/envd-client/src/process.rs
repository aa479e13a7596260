//! Processes in the guest: start, events, input, signals.

use std::time::Duration;

use connectrpc::{
    ConnectError,
    client::{CallOptions, ServerStream},
};
use wrenn_proto::{
    headers,
    rpc::process::{
        CloseStdinRequest, ConnectRequest, ConnectResponseView, ListRequest, PTY, ProcessEvent,
        ProcessInfo, ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest, Signal,
        StartRequest, StartResponseView, UpdateRequest, pty::Size,
    },
};

use crate::{
    EnvdClient,
    broken::{Broken, ResponseBody},
    client::{as_user, unknown_user},
    deadline::{CALL_DEADLINE, within},
};

/// Events of a process. Events are fetched only as fast as the caller takes them, so a slow reader
/// slows the process down and nothing accumulates here.
#[derive(Debug)]
pub struct ProcessEvents {
    source: Source,
    broken: Broken,
    /// User that the call names; empty if it names none.
    user: String,
}

#[derive(Debug)]
enum Source {
    Started(ServerStream<ResponseBody, StartResponseView<'static>>),
    Connected(ServerStream<ResponseBody, ConnectResponseView<'static>>),
}

impl ProcessEvents {
    /// Returns the next event, or `None` at the end of the stream.
    ///
    /// # Errors
    /// If the stream breaks, or if the guest agent ended it with an error: `deadline_exceeded`
    /// after the end event means that the process was killed by its time limit. Later calls return
    /// the same error.
    pub async fn next(&mut self) -> Result<Option<ProcessEvent>, ConnectError> {
        let broken = self.broken.clone();
        let event = broken.watch(self.source.next()).await;
        // The guest agent rejects a start within the stream, after the response has begun.
        event.map_err(unknown_user(&self.user))
    }
}

impl Source {
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
            // A message without an event is of a kind that this client does not know yet.
            if let Some(event) = event.into_option() {
                return Ok(Some(event));
            }
        }
    }
}

/// Maximum size of an event, in bytes. The guest agent sends at most some 64 KiB of output in one.
/// Each open stream may hold one event in memory.
const MAX_EVENT_BYTES: usize = 1024 * 1024;

fn event_options() -> Result<CallOptions, ConnectError> {
    CallOptions::default()
        .with_max_message_size(MAX_EVENT_BYTES)
        .try_with_header(headers::LOST_OUTPUT, "1")
}

/// Returns the exit code that a shell reports for a command that was not started: 127 if its program
/// does not exist, 126 if the program cannot be executed. `None` for other errors.
#[must_use]
pub fn exit_code(error: &ConnectError) -> Option<i32> {
    let code = error.trailers().get(headers::EXIT_CODE)?;
    let code = code.to_str().ok()?.parse().ok()?;
    // The guest is untrusted.
    matches!(code, 126 | 127).then_some(code)
}

impl EnvdClient {
    /// Starts a process. `time_limit` limits the process, not the call. The output of a `detached`
    /// process is not streamed. The process keeps running if the caller drops the events.
    ///
    /// # Errors
    /// As listed in the crate's documentation, like every call below.
    pub async fn start(
        &self,
        request: StartRequest,
        user: &str,
        time_limit: Option<Duration>,
        detached: bool,
    ) -> Result<ProcessEvents, ConnectError> {
        let mut options = as_user(event_options()?, user)?;
        if detached {
            options = options.try_with_header(headers::DETACHED, "1")?;
        }
        if let Some(limit) = time_limit {
            // Sent as a header, so that only the guest enforces it and the exit event still
            // arrives.
            options =
                options.try_with_header("connect-timeout-ms", limit.as_millis().to_string())?;
        }
        let (process, broken) = self.process();
        let call = process.start_with_options(request, options);
        let stream = within(CALL_DEADLINE, call)
            .await
            .map_err(unknown_user(user))?;
        Ok(ProcessEvents {
            source: Source::Started(stream),
            broken,
            user: user.to_owned(),
        })
    }

    /// Streams the events of a running process from now on.
    ///
    /// # Errors
    /// If there is no such process, or the call fails.
    pub async fn connect(&self, process: ProcessSelector) -> Result<ProcessEvents, ConnectError> {
        let request = ConnectRequest {
            process: process.into(),
            ..Default::default()
        };
        let (process, broken) = self.process();
        let stream = within(
            CALL_DEADLINE,
            process.connect_with_options(request, event_options()?),
        )
        .await?;
        Ok(ProcessEvents {
            source: Source::Connected(stream),
            broken,
            user: String::new(),
        })
    }

    /// Returns the running processes that were started through the guest agent.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, ConnectError> {
        let (process, broken) = self.process();
        let call = broken.watch(process.list(ListRequest::default()));
        let answer = within(CALL_DEADLINE, call).await?;
        Ok(answer.into_owned().processes)
    }

    /// Sends input to a process. Waits as long as the process does not read.
    ///
    /// # Errors
    /// If there is no such process, or it takes no input.
    pub async fn send_input(
        &self,
        process: ProcessSelector,
        input: ProcessInput,
    ) -> Result<(), ConnectError> {
        let request = SendInputRequest {
            process: process.into(),
            input: input.into(),
            ..Default::default()
        };
        let (process, broken) = self.process();
        broken.watch(process.send_input(request)).await.map(drop)
    }

    /// Ends the input of a process.
    ///
    /// # Errors
    /// If there is no such process, or the call fails.
    pub async fn close_stdin(&self, process: ProcessSelector) -> Result<(), ConnectError> {
        let request = CloseStdinRequest {
            process: process.into(),
            ..Default::default()
        };
        let (process, broken) = self.process();
        let call = broken.watch(process.close_stdin(request));
        within(CALL_DEADLINE, call).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// If there is no such process, or it has no terminal.
    pub async fn resize(
        &self,
        process: ProcessSelector,
        cols: u32,
        rows: u32,
    ) -> Result<(), ConnectError> {
        let size = Size {
            cols,
            rows,
            ..Default::default()
        };
        let request = UpdateRequest {
            process: process.into(),
            pty: PTY {
                size: size.into(),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        };
        let (process, broken) = self.process();
        let call = broken.watch(process.update(request));
        within(CALL_DEADLINE, call).await.map(drop)
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// If there is no such process, or the call fails.
    pub async fn signal(
        &self,
        process: ProcessSelector,
        signal: Signal,
    ) -> Result<(), ConnectError> {
        let request = SendSignalRequest {
            process: process.into(),
            signal: signal.into(),
            ..Default::default()
        };
        let (process, broken) = self.process();
        let call = broken.watch(process.send_signal(request));
        within(CALL_DEADLINE, call).await.map(drop)
    }
}
