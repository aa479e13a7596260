//! Connect calls through the generated clients.

use std::time::Duration;

use connectrpc::{
    ConnectError, Protocol,
    client::{CallOptions, ClientConfig, ClientTransport, HttpClient, ServerStream},
};
use wrenn_proto::rpc::{
    filesystem::FilesystemClient,
    process::{
        __buffa::oneof::{
            process_event::{Event, data_event::Output},
            process_input::Input,
            process_selector::Selector,
        },
        CloseStdinRequest, ConnectRequest, ConnectResponseView, ListRequest, ProcessClient,
        ProcessConfig, ProcessEvent, ProcessInfo, ProcessInput, ProcessSelector, SendInputRequest,
        SendSignalRequest, Signal, StartRequest, StartResponseView,
        process_event::EndEvent,
    },
};

use crate::world::World;

pub(crate) type Body = <HttpClient as ClientTransport>::ResponseBody;

/// Wire encoding of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Json,
    Binary,
    /// Binary, in gRPC frames over HTTP/2.
    Grpc,
}

/// All encodings.
pub(crate) const CODECS: [Codec; 3] = [Codec::Json, Codec::Binary, Codec::Grpc];

fn config(world: &World, codec: Codec) -> ClientConfig {
    let config = ClientConfig::new(world.url("").parse().expect("a URI"))
        .with_default_max_message_size(64 << 20);
    match codec {
        Codec::Json => config.json(),
        Codec::Binary => config.proto(),
        Codec::Grpc => config.proto().with_protocol(Protocol::Grpc),
    }
}

/// Clients for both services.
pub(crate) struct Clients {
    pub(crate) process: ProcessClient<HttpClient>,
    pub(crate) files: FilesystemClient<HttpClient>,
}

/// Creates clients that use binary protobuf.
pub(crate) fn clients(world: &World) -> Clients {
    clients_by(world, Codec::Binary)
}

pub(crate) fn clients_by(world: &World, codec: Codec) -> Clients {
    let config = config(world, codec);
    let transport = match codec {
        Codec::Grpc => HttpClient::plaintext_http2_only(),
        Codec::Json | Codec::Binary => HttpClient::plaintext(),
    };
    Clients {
        process: ProcessClient::new(transport.clone(), config.clone()),
        files: FilesystemClient::new(transport, config),
    }
}

/// Call options that run a call as a guest user.
pub(crate) fn as_user(name: &str) -> CallOptions {
    use base64::Engine as _;
    let word = base64::prelude::BASE64_STANDARD.encode(format!("{name}:"));
    header("authorization", &format!("Basic {word}"))
}

/// Call options with one additional header.
pub(crate) fn header(name: &'static str, value: &str) -> CallOptions {
    CallOptions::default()
        .try_with_header(name, value)
        .expect("a header")
}

/// Request to run a program with arguments, without standard input.
pub(crate) fn program(words: &[&str]) -> StartRequest {
    StartRequest {
        process: ProcessConfig {
            cmd: words[0].to_owned(),
            args: words[1..].iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        }
        .into(),
        stdin: Some(false),
        ..Default::default()
    }
}

/// Request to run a shell script.
pub(crate) fn script(text: &str) -> StartRequest {
    program(&["/bin/sh", "-c", text])
}

/// Request to run a shell script with a pipe as standard input.
pub(crate) fn script_with_input(text: &str) -> StartRequest {
    StartRequest {
        stdin: Some(true),
        ..script(text)
    }
}

pub(crate) fn by_pid(pid: u32) -> ProcessSelector {
    ProcessSelector {
        selector: Some(Selector::Pid(pid)),
        ..Default::default()
    }
}

pub(crate) fn by_tag(tag: &str) -> ProcessSelector {
    ProcessSelector {
        selector: Some(Selector::Tag(tag.to_owned())),
        ..Default::default()
    }
}

/// Event stream of `Start` or `Connect`.
pub(crate) enum Events {
    Started(ServerStream<Body, StartResponseView<'static>>),
    Connected(ServerStream<Body, ConnectResponseView<'static>>),
}

impl Events {
    /// Returns the next event that is not a keep-alive, or `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, ConnectError> {
        loop {
            match self.any().await? {
                Some(Event::Keepalive(_)) => {}
                event => return Ok(event),
            }
        }
    }

    /// Returns the next event of any kind, or `None` at the end of the stream.
    pub(crate) async fn any(&mut self) -> Result<Option<Event>, ConnectError> {
        let event = |event: Option<&ProcessEvent>| event.cloned().expect("an event").event;
        Ok(match self {
            Self::Started(stream) => match stream.message().await? {
                Some(message) => event(message.to_owned_message().event.as_option()),
                None => None,
            },
            Self::Connected(stream) => match stream.message().await? {
                Some(message) => event(message.to_owned_message().event.as_option()),
                None => None,
            },
        })
    }

    /// Returns the PID in the first event.
    pub(crate) async fn pid(&mut self) -> u32 {
        match self.next().await.expect("started") {
            Some(Event::Start(start)) => start.pid,
            other => panic!("the first event is {other:?}"),
        }
    }

    /// Collects output until it contains `text`.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            let event = self.next().await.expect("goes on");
            let Some(Event::Data(data)) = event else {
                panic!(
                    "{event:?} instead of {text:?}, after {:?}",
                    String::from_utf8_lossy(&seen)
                );
            };
            let (Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes)) =
                data.output.expect("output");
            seen.extend(bytes);
        }
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Collects everything until the end of the stream.
    pub(crate) async fn rest(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            match self.next().await {
                Ok(Some(Event::Start(start))) => outcome.pid = start.pid,
                Ok(Some(Event::Data(data))) => {
                    assert_eq!(outcome.ends, 0, "output after the end event");
                    match data.output.expect("output") {
                        Output::Stdout(bytes) => outcome.stdout.extend(bytes),
                        Output::Stderr(bytes) => outcome.stderr.extend(bytes),
                        Output::Pty(bytes) => outcome.terminal.extend(bytes),
                    }
                }
                Ok(Some(Event::Lost(lost))) => outcome.lost_bytes += lost.bytes,
                Ok(Some(Event::End(end))) => {
                    outcome.ends += 1;
                    outcome.end = *end;
                }
                Ok(Some(Event::Keepalive(_))) => {}
                Ok(None) => return outcome,
                Err(error) => {
                    outcome.error = Some(error);
                    return outcome;
                }
            }
        }
    }
}

/// Output and end of a process.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) terminal: Vec<u8>,
    /// Lost output that was reported as events.
    pub(crate) lost_bytes: u64,
    pub(crate) end: EndEvent,
    pub(crate) ends: u32,
    /// Error of the stream, if it failed.
    pub(crate) error: Option<ConnectError>,
}

impl Outcome {
    /// Returns the standard output of a process that exited successfully.
    pub(crate) fn text(self) -> String {
        assert_eq!((self.ends, self.end.exit_code), (1, 0), "{self:?}");
        String::from_utf8(self.stdout).expect("UTF-8")
    }
}

impl Clients {
    pub(crate) async fn start(&self, request: StartRequest) -> Result<Events, ConnectError> {
        self.start_with(request, CallOptions::default()).await
    }

    pub(crate) async fn start_with(
        &self,
        request: StartRequest,
        options: CallOptions,
    ) -> Result<Events, ConnectError> {
        let stream = self.process.start_with_options(request, options).await?;
        Ok(Events::Started(stream))
    }

    /// Runs a process to its end.
    pub(crate) async fn run(&self, request: StartRequest) -> Outcome {
        self.start(request).await.expect("started").rest().await
    }

    /// Runs a script that must exit successfully.
    pub(crate) async fn sh(&self, text: &str) -> String {
        self.run(script(text)).await.text()
    }

    pub(crate) async fn connect(&self, selector: ProcessSelector) -> Result<Events, ConnectError> {
        self.connect_with(selector, CallOptions::default()).await
    }

    pub(crate) async fn connect_with(
        &self,
        selector: ProcessSelector,
        options: CallOptions,
    ) -> Result<Events, ConnectError> {
        let request = ConnectRequest {
            process: selector.into(),
            ..Default::default()
        };
        let stream = self.process.connect_with_options(request, options).await?;
        Ok(Events::Connected(stream))
    }

    pub(crate) async fn list(&self) -> Vec<ProcessInfo> {
        let answer = self.process.list(ListRequest::default()).await;
        answer.expect("listed").into_owned().processes
    }

    pub(crate) async fn signal(&self, pid: u32, signal: Signal) -> Result<(), ConnectError> {
        let request = SendSignalRequest {
            process: by_pid(pid).into(),
            signal: signal.into(),
            ..Default::default()
        };
        self.process.send_signal(request).await.map(drop)
    }

    pub(crate) async fn send(&self, to: ProcessSelector, input: Input) -> Result<(), ConnectError> {
        let request = SendInputRequest {
            process: to.into(),
            input: ProcessInput {
                input: Some(input),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        };
        self.process.send_input(request).await.map(drop)
    }

    pub(crate) async fn close_stdin(&self, pid: u32) -> Result<(), ConnectError> {
        let request = CloseStdinRequest {
            process: by_pid(pid).into(),
            ..Default::default()
        };
        self.process.close_stdin(request).await.map(drop)
    }
}

/// Returns the error of a stream that fails at the call or as its first message.
pub(crate) async fn refusal(events: Result<Events, ConnectError>) -> ConnectError {
    match events {
        Err(error) => error,
        Ok(mut events) => events.next().await.expect_err("refused"),
    }
}

/// Call options that limit the lifetime of a process.
pub(crate) fn limit(limit: Duration) -> CallOptions {
    header("connect-timeout-ms", &limit.as_millis().to_string())
}
