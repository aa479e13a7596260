//! Running processes, and processes that ended recently.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
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
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_selector::Selector, ProcessConfig, ProcessInfo,
};

use super::{descendants, input::InputSink, output::Output};
use crate::cgroups::CommandGroup;

/// Time for which an ended process can be found.
const KEEP_ENDED: Duration = Duration::from_secs(30);

/// Maximum number of ended processes that are kept. Each may hold undelivered output.
const MAX_ENDED: usize = 256;

/// Process that was started by envd.
#[derive(Debug)]
pub struct Running {
    /// Process id, which is also the id of the process's group and session.
    pub pid: u32,
    /// Tag from the client.
    pub tag: Option<String>,
    /// Configuration with which the process was started.
    pub config: ProcessConfig,
    /// Destination of input.
    pub input: InputSink,
    /// Source of output.
    pub output: Arc<Output>,
    /// Group of the process and its descendants. `None` if there are no cgroups.
    pub group: Option<CommandGroup>,
    /// Cancelled after the process was waited for. The id may belong to another process from then
    /// on.
    pub reaped: CancellationToken,
    /// True if SIGKILL was requested.
    pub killed: AtomicBool,
    /// True if the process was killed because its time limit expired.
    pub expired: AtomicBool,
}

impl Running {
    /// Sends a signal: SIGKILL to the process and all its descendants, any other signal to the
    /// members of its process group.
    ///
    /// # Errors
    /// `internal` if the kernel rejects the signal.
    pub fn signal(&self, signal: Signal) -> Result<(), ConnectError> {
        if signal == Signal::SIGKILL {
            self.killed.store(true, Ordering::SeqCst);
            self.kill_descendants();
        }
        // Waiting and signalling happen on one thread, so the id cannot be reused in between.
        if self.reaped.is_cancelled() {
            return Ok(());
        }
        match killpg(Pid::from_raw(self.raw_pid()), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(ConnectError::internal(format!(
                "error sending signal: {error}"
            ))),
        }
    }

    /// Kills all descendants, including those that have sessions of their own.
    fn kill_descendants(&self) {
        let killed = self.group.as_ref().map(CommandGroup::kill);
        if let Some(Err(error)) = &killed {
            tracing::warn!(%error, pid = self.pid, "failed to kill a cgroup");
        }
        if !matches!(killed, Some(Ok(()))) && !self.reaped.is_cancelled() {
            descendants::kill_tree(self.raw_pid());
        }
    }

    fn raw_pid(&self) -> i32 {
        i32::try_from(self.pid).unwrap_or(i32::MAX)
    }

    /// True if the process was killed and is dead, so clients need not see it any more. Its last
    /// output may still be read.
    fn is_gone(&self) -> bool {
        self.killed.load(Ordering::SeqCst) && self.reaped.is_cancelled()
    }
}

/// Running and recently ended processes.
#[derive(Debug, Default)]
pub struct Registry(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    running: HashMap<u32, Arc<Running>>,
    ended: VecDeque<Ended>,
}

/// Remains of an ended process, without the input, which holds descriptors.
#[derive(Debug)]
struct Ended {
    at: Instant,
    tag: Option<String>,
    found: Found,
}

/// Output of a process that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Process id.
    pub pid: u32,
    /// Source of output.
    pub output: Arc<Output>,
    /// True if the process has a terminal.
    pub is_terminal: bool,
}

impl Found {
    fn of(process: &Running) -> Self {
        Self {
            pid: process.pid,
            output: process.output.clone(),
            is_terminal: process.input.is_terminal(),
        }
    }
}

impl Registry {
    /// Adds a process that was started.
    pub fn add(&self, process: Arc<Running>) {
        self.lock().running.insert(process.pid, process);
    }

    /// Moves a process to the ended processes.
    pub fn end(&self, process: &Arc<Running>) {
        let mut tables = self.lock();
        // Another process may have this id by now.
        if tables
            .running
            .get(&process.pid)
            .is_some_and(|p| Arc::ptr_eq(p, process))
        {
            tables.running.remove(&process.pid);
        }
        tables.ended.push_back(Ended {
            at: Instant::now(),
            tag: process.tag.clone(),
            found: Found::of(process),
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

    /// Returns the running process with a pid or tag.
    ///
    /// # Errors
    /// `not_found`, also if the process has ended.
    pub fn find_running(&self, selector: &Selector) -> Result<Arc<Running>, ConnectError> {
        let tables = self.lock();
        let found = tables.find(selector).filter(|process| !process.is_gone());
        found.cloned().ok_or_else(|| not_found(selector))
    }

    /// Returns the output of the process with a pid or tag: a running process, else the process
    /// that ended last, if that was recently.
    ///
    /// # Errors
    /// `not_found`.
    pub fn find_output(&self, selector: &Selector) -> Result<Found, ConnectError> {
        let tables = self.lock();
        if let Some(process) = tables.find(selector) {
            return Ok(Found::of(process));
        }
        let mut ended = tables.ended.iter().rev();
        ended
            .find(|e| e.at.elapsed() < KEEP_ENDED && is(selector, e.found.pid, e.tag.as_deref()))
            .map(|e| e.found.clone())
            .ok_or_else(|| not_found(selector))
    }

    /// Returns the running processes, sorted by id.
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
        // Each change is one step, so a panic in between leaves a consistent state.
        self.0.lock()
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
