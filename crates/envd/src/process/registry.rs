//! Processes that run, and those that ended a moment ago.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use connectrpc::ConnectError;
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_selector::Selector, ProcessConfig, ProcessInfo,
};

use super::{input::InputSink, output::Output};

/// How long the end of a process can still be asked for.
const KEEP_ENDED: Duration = Duration::from_secs(30);

/// How many of those that ended are remembered: each may hold output that nobody heard.
const MAX_ENDED: usize = 256;

/// A process that was started here.
#[derive(Debug)]
pub struct Running {
    /// Its process id, which is that of its group and session as well.
    pub pid: u32,
    /// The name that it was given.
    pub tag: Option<String>,
    /// What was started.
    pub config: ProcessConfig,
    /// Where input goes.
    pub input: InputSink,
    /// Where output comes from.
    pub output: Arc<Output>,
    /// A signal was asked for: whoever holds its pipes open is not waited for any more.
    pub signalled: Notify,
    /// Cancelled once it was waited for: its id may belong to another process now.
    pub reaped: CancellationToken,
    /// It was asked to be killed.
    pub killed: AtomicBool,
    /// It was killed because its time was up.
    pub expired: AtomicBool,
}

impl Running {
    /// Sends a signal to the process and all that it started in its session's group.
    ///
    /// # Errors
    /// `internal` if the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), ConnectError> {
        // Waited for and signalled on one thread, so the id cannot change hands in between.
        if signal == Signal::SIGKILL {
            self.killed.store(true, Ordering::SeqCst);
        }
        if self.reaped.is_cancelled() {
            // What it left behind holds its output open, and is let go.
            self.signalled.notify_one();
            return Ok(());
        }
        let group = Pid::from_raw(i32::try_from(self.pid).unwrap_or(i32::MAX));
        match killpg(group, signal) {
            Ok(()) | Err(Errno::ESRCH) => {
                self.signalled.notify_one();
                Ok(())
            }
            Err(error) => Err(ConnectError::internal(format!(
                "error sending signal: {error}"
            ))),
        }
    }

    /// Whether nobody need be told of it any more, though its last output may still be read: it was killed, and is dead.
    fn is_gone(&self) -> bool {
        self.killed.load(Ordering::SeqCst) && self.reaped.is_cancelled()
    }
}

/// All processes that can be found.
#[derive(Debug, Default)]
pub struct Registry(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    running: HashMap<u32, Arc<Running>>,
    ended: VecDeque<Ended>,
}

/// What is left of a process: not its input, which holds descriptors.
#[derive(Debug)]
struct Ended {
    at: Instant,
    pid: u32,
    tag: Option<String>,
    output: Arc<Output>,
}

impl Registry {
    /// Adds a process that was started.
    pub fn add(&self, process: Arc<Running>) {
        self.lock().running.insert(process.pid, process);
    }

    /// Moves a process to those that ended.
    pub fn end(&self, process: &Arc<Running>) {
        let mut tables = self.lock();
        // Another process may have its id by now.
        if tables
            .running
            .get(&process.pid)
            .is_some_and(|p| Arc::ptr_eq(p, process))
        {
            tables.running.remove(&process.pid);
        }
        tables.ended.push_back(Ended {
            at: Instant::now(),
            pid: process.pid,
            tag: process.tag.clone(),
            output: process.output.clone(),
        });
        while tables.ended.len() > MAX_ENDED
            || tables
                .ended
                .front()
                .is_some_and(|oldest| oldest.at.elapsed() >= KEEP_ENDED)
        {
            tables.ended.pop_front();
        }
    }

    /// The process of a pid or tag, if it runs.
    ///
    /// # Errors
    /// `not_found`, also for one that has ended.
    pub fn find_running(&self, selector: &Selector) -> Result<Arc<Running>, ConnectError> {
        let tables = self.lock();
        let found = tables.find(selector).filter(|process| !process.is_gone());
        found.cloned().ok_or_else(|| not_found(selector))
    }

    /// Id and output of the process of a pid or tag: one that runs, else the last that ended a moment ago.
    ///
    /// # Errors
    /// `not_found`.
    pub fn find_output(&self, selector: &Selector) -> Result<(u32, Arc<Output>), ConnectError> {
        let tables = self.lock();
        if let Some(process) = tables.find(selector) {
            return Ok((process.pid, process.output.clone()));
        }
        let mut ended = tables.ended.iter().rev();
        ended
            .find(|e| e.at.elapsed() < KEEP_ENDED && is(selector, e.pid, e.tag.as_deref()))
            .map(|e| (e.pid, e.output.clone()))
            .ok_or_else(|| not_found(selector))
    }

    /// Processes that run, by id.
    #[must_use]
    pub fn list(&self) -> Vec<ProcessInfo> {
        let mut list: Vec<_> = self
            .lock()
            .running
            .values()
            .filter(|process| !process.is_gone())
            .map(|process| ProcessInfo {
                config: process.config.clone().into(),
                pid: process.pid,
                tag: process.tag.clone(),
                ..Default::default()
            })
            .collect();
        list.sort_by_key(|info| info.pid);
        list
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        // Each change is one step: a panic in between leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn find(&self, selector: &Selector) -> Option<&Arc<Running>> {
        let mut all = self.running.values();
        all.find(|process| is(selector, process.pid, process.tag.as_deref()))
    }
}

fn is(selector: &Selector, pid: u32, tag: Option<&str>) -> bool {
    match selector {
        Selector::Pid(wanted) => pid == *wanted,
        Selector::Tag(wanted) => tag == Some(wanted),
    }
}

fn not_found(selector: &Selector) -> ConnectError {
    ConnectError::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag {tag} not found"),
    })
}
