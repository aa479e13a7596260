//! Fake processes. The name of the program determines the behaviour.
//!
//! | program | behaviour |
//! |---|---|
//! | `echo A…` | prints its arguments and a line feed, exits 0 |
//! | `fail N` | exits N |
//! | `raw HEX…` | prints the bytes of each argument as one piece, exits 0 |
//! | `flood N` | prints N bytes in pieces of 64 KiB, as fast as they are read, exits 0 |
//! | `hang` | waits for a signal |
//! | `break` | prints `half`, then the stream fails |
//! | `cat` | prints its input, exits 0 when the input is closed |
//! | `deaf` | never reads input; waits for a signal |

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use connectrpc::{ConnectError, ErrorCode, ServiceStream};
use futures::{SinkExt, StreamExt, channel::mpsc};
use tokio::sync::watch;
use wrenn_proto::rpc::{
    hostagent::v1 as rpc,
    process::{self, ProcessEvent, process_event, process_input, process_selector},
};

type Event = Result<rpc::ExecStreamResponse, ConnectError>;

/// Fake process.
struct Process {
    sandbox: String,
    pid: u32,
    tag: Option<String>,
    config: process::ProcessConfig,
    pty: bool,
    /// Number of the signal that ended the process.
    killed: watch::Sender<Option<i32>>,
    input: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    listeners: Mutex<Vec<mpsc::Sender<Event>>>,
    sizes: Mutex<Vec<(u32, u32)>>,
}

/// All processes of all sandboxes.
#[derive(Default)]
pub(crate) struct Processes {
    next_pid: AtomicU32,
    table: Arc<Mutex<HashMap<u32, Arc<Process>>>>,
    /// Number of bytes that `flood` has printed.
    pub(crate) flooded: Arc<AtomicUsize>,
}

fn wrap(event: impl Into<process_event::Event>) -> rpc::ExecStreamResponse {
    let event = ProcessEvent {
        event: Some(event.into()),
        ..Default::default()
    };
    rpc::ExecStreamResponse {
        event: event.into(),
        ..Default::default()
    }
}

fn start_event(pid: u32) -> rpc::ExecStreamResponse {
    wrap(process_event::StartEvent {
        pid,
        ..Default::default()
    })
}

fn data_event(pty: bool, bytes: Vec<u8>) -> rpc::ExecStreamResponse {
    use process_event::data_event::Output;
    let output = if pty {
        Output::Pty(bytes)
    } else {
        Output::Stdout(bytes)
    };
    wrap(process_event::DataEvent {
        output: Some(output),
        ..Default::default()
    })
}

fn end_event(exit_code: i32, error: Option<&str>) -> rpc::ExecStreamResponse {
    wrap(process_event::EndEvent {
        exit_code,
        exited: error.is_none(),
        error: error.map(str::to_owned),
        ..Default::default()
    })
}

/// Runs a command and collects its output.
pub(crate) async fn collect(request: rpc::ExecRequest) -> Result<rpc::ExecResponse, ConnectError> {
    let config = request.process.into_option().unwrap_or_default();
    let mut done = rpc::ExecResponse::default();
    match config.cmd.as_str() {
        "echo" => done.stdout = format!("{}\n", config.args.join(" ")).into_bytes(),
        "fail" => done.exit_code = config.args[0].parse().unwrap(),
        "raw" => {
            done.stdout = config
                .args
                .iter()
                .flat_map(|a| hex::decode(a).unwrap())
                .collect()
        }
        "env" => {
            let mut envs: Vec<_> = config
                .envs
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            envs.sort();
            let cwd = config.cwd.unwrap_or_default();
            done.stdout = format!(
                "{}|{cwd}|{}|{}",
                envs.join(","),
                request.user,
                request.timeout_sec
            )
            .into_bytes();
        }
        "hang" => std::future::pending().await,
        other => {
            return Err(ConnectError::new(
                ErrorCode::InvalidArgument,
                format!("there is no program `{other}`"),
            ));
        }
    }
    Ok(done)
}

impl Processes {
    pub(crate) fn start(
        &self,
        request: rpc::ExecStreamRequest,
    ) -> Result<ServiceStream<rpc::ExecStreamResponse>, ConnectError> {
        let start = request.start.into_option().unwrap_or_default();
        let config = start.process.into_option().unwrap_or_default();
        if config.cmd == "nonesuch" {
            return Err(ConnectError::new(
                ErrorCode::InvalidArgument,
                "there is no program `nonesuch`",
            ));
        }
        let (listener, events) = mpsc::channel(0);
        let (input, fed) = mpsc::channel(0);
        let pid = self.next_pid.fetch_add(1, Ordering::SeqCst) + 100;
        let pty = start.pty.into_option();
        let process = Arc::new(Process {
            sandbox: request.id,
            pid,
            tag: start.tag,
            pty: pty.is_some(),
            config,
            killed: watch::Sender::new(None),
            input: Mutex::new(Some(input)),
            listeners: Mutex::new(vec![listener]),
            sizes: Mutex::default(),
        });
        if let Some(size) = pty.and_then(|pty| pty.size.into_option()) {
            process.sizes.lock().unwrap().push((size.cols, size.rows));
        }
        self.table.lock().unwrap().insert(pid, Arc::clone(&process));
        let table = Arc::clone(&self.table);
        let flooded = Arc::clone(&self.flooded);
        tokio::spawn(async move {
            process.tell(Ok(start_event(pid))).await;
            let mut killed = process.killed.subscribe();
            let signalled = async { killed.wait_for(Option::is_some).await.map(|s| *s).unwrap() };
            let signal = tokio::select! {
                code = process.run(fed, &flooded) => {
                    table.lock().unwrap().remove(&pid);
                    match code {
                        Ok(code) => process.tell(Ok(end_event(code, None))).await,
                        Err(error) => process.tell(Err(error)).await,
                    }
                    return;
                }
                signal = signalled => signal,
            };
            table.lock().unwrap().remove(&pid);
            let error = format!("signal: {}", signal.unwrap_or_default());
            process.tell(Ok(end_event(-1, Some(&error)))).await;
        });
        Ok(Box::pin(events))
    }

    pub(crate) fn connect(
        &self,
        request: &rpc::ConnectProcessRequest,
    ) -> Result<ServiceStream<rpc::ExecStreamResponse>, ConnectError> {
        let process = self.find(&request.id, request.process.as_option())?;
        let (listener, events) = mpsc::channel(0);
        process.listeners.lock().unwrap().push(listener);
        let first = futures::stream::iter([Ok(start_event(process.pid))]);
        Ok(Box::pin(first.chain(events)))
    }

    pub(crate) fn list(&self, sandbox: &str) -> Vec<process::ProcessInfo> {
        let table = self.table.lock().unwrap();
        let mut found: Vec<_> = table
            .values()
            .filter(|p| p.sandbox == sandbox)
            .map(|p| process::ProcessInfo {
                config: p.config.clone().into(),
                pid: p.pid,
                tag: p.tag.clone(),
                ..Default::default()
            })
            .collect();
        found.sort_by_key(|p| p.pid);
        found
    }

    /// Passes on input. Waits as long as the process takes to read it.
    pub(crate) async fn input(&self, request: rpc::SendInputRequest) -> Result<(), ConnectError> {
        let process = self.find(&request.id, request.process.as_option())?;
        let bytes = match request.input.into_option().and_then(|i| i.input) {
            Some(process_input::Input::Stdin(bytes) | process_input::Input::Pty(bytes)) => bytes,
            None => return Err(ConnectError::invalid_argument("no input")),
        };
        let input = process.input.lock().unwrap().clone();
        let Some(mut input) = input else {
            return Err(ConnectError::new(
                ErrorCode::FailedPrecondition,
                "the input of the process is closed",
            ));
        };
        let mut killed = process.killed.subscribe();
        let killed = async { killed.wait_for(Option::is_some).await.map(|_| ()) };
        tokio::select! {
            sent = input.send(bytes) => sent.map_err(|_| ConnectError::new(ErrorCode::NotFound, "the process has ended")),
            _ = killed => Err(ConnectError::new(ErrorCode::NotFound, "the process has ended")),
        }
    }

    pub(crate) fn close_stdin(&self, request: &rpc::CloseStdinRequest) -> Result<(), ConnectError> {
        let process = self.find(&request.id, request.process.as_option())?;
        process.input.lock().unwrap().take();
        Ok(())
    }

    pub(crate) fn resize(&self, request: &rpc::ResizePtyRequest) -> Result<(), ConnectError> {
        let process = self.find(&request.id, request.process.as_option())?;
        process
            .sizes
            .lock()
            .unwrap()
            .push((request.cols, request.rows));
        Ok(())
    }

    pub(crate) fn signal(&self, request: &rpc::SignalProcessRequest) -> Result<(), ConnectError> {
        let process = self.find(&request.id, request.process.as_option())?;
        process.killed.send_replace(Some(request.signal.to_i32()));
        Ok(())
    }

    /// Returns the sizes that the terminal of a process was set to, in order.
    pub(crate) fn sizes(&self, tag: &str) -> Vec<(u32, u32)> {
        let table = self.table.lock().unwrap();
        let found = table.values().find(|p| p.tag.as_deref() == Some(tag));
        found.map_or_else(Vec::new, |p| p.sizes.lock().unwrap().clone())
    }

    /// True if a process with this tag runs.
    pub(crate) fn runs(&self, tag: &str) -> bool {
        let table = self.table.lock().unwrap();
        table.values().any(|p| p.tag.as_deref() == Some(tag))
    }

    fn find(
        &self,
        sandbox: &str,
        selector: Option<&process::ProcessSelector>,
    ) -> Result<Arc<Process>, ConnectError> {
        use process_selector::Selector;
        let table = self.table.lock().unwrap();
        let selector = selector.and_then(|s| s.selector.clone());
        let found = table.values().find(|p| {
            p.sandbox == sandbox
                && match &selector {
                    Some(Selector::Pid(pid)) => p.pid == *pid,
                    Some(Selector::Tag(tag)) => p.tag.as_ref() == Some(tag),
                    None => false,
                }
        });
        found
            .cloned()
            .ok_or_else(|| ConnectError::new(ErrorCode::NotFound, "there is no such process"))
    }
}

impl Process {
    /// Sends an event to all subscribers, at the pace of the slowest. Disconnected subscribers are
    /// removed.
    async fn tell(&self, event: Event) {
        let listeners = std::mem::take(&mut *self.listeners.lock().unwrap());
        for mut listener in listeners {
            if listener.send(event.clone()).await.is_ok() {
                self.listeners.lock().unwrap().push(listener);
            }
        }
    }

    async fn print(&self, bytes: Vec<u8>) {
        self.tell(Ok(data_event(self.pty, bytes))).await;
    }

    async fn run(
        &self,
        mut input: mpsc::Receiver<Vec<u8>>,
        flooded: &AtomicUsize,
    ) -> Result<i32, ConnectError> {
        let args = &self.config.args;
        match self.config.cmd.as_str() {
            "echo" => {
                self.print(format!("{}\n", args.join(" ")).into_bytes())
                    .await
            }
            "fail" => return Ok(args[0].parse().unwrap()),
            "raw" => {
                for piece in args {
                    self.print(hex::decode(piece).unwrap()).await;
                }
            }
            "flood" => {
                let mut left: usize = args[0].parse().unwrap();
                while left > 0 {
                    let piece = left.min(64 * 1024);
                    self.print(vec![b'x'; piece]).await;
                    flooded.fetch_add(piece, Ordering::SeqCst);
                    left -= piece;
                }
            }
            "break" => {
                self.print(b"half".to_vec()).await;
                return Err(ConnectError::new(
                    ErrorCode::Unavailable,
                    "the machine is gone",
                ));
            }
            "cat" | "/bin/bash" => {
                while let Some(bytes) = input.next().await {
                    self.print(bytes).await;
                }
            }
            // `hang`, `deaf`, and any other program.
            _ => std::future::pending().await,
        }
        Ok(0)
    }
}
