//! Processes that run, and those that ended a moment ago.

use std::{
    collections::HashMap,
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
use wrenn_proto::rpc::process::{
    __buffa::oneof::process_selector::Selector, ProcessConfig, ProcessInfo,
};

use super::{input::InputSink, output::Output};

/// How long the end of a process can still be asked for.
const KEEP_ENDED: Duration = Duration::from_secs(30);

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
    pub output: Output,
    /// A signal was asked for: whoever holds its pipes open is not waited for any more.
    pub signalled: Notify,
    /// It was waited for: its id may belong to another process now.
    pub reaped: AtomicBool,
}

impl Running {
    /// Sends a signal to the process and all that it started in its session's group.
    ///
    /// # Errors
    /// `internal` if the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), ConnectError> {
        // Waited for and signalled on one thread, so the id cannot change hands in between.
        if self.reaped.load(Ordering::SeqCst) {
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
}

/// All processes that can be found.
#[derive(Debug, Default)]
pub struct Registry(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    running: HashMap<u32, Arc<Running>>,
    ended: Vec<(Instant, Arc<Running>)>,
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
        tables.ended.push((Instant::now(), process.clone()));
        tables.ended.retain(|(at, _)| at.elapsed() < KEEP_ENDED);
    }

    /// The process of a pid or tag, if it runs.
    ///
    /// # Errors
    /// `not_found`, also for one that has ended.
    pub fn find_running(&self, selector: &Selector) -> Result<Arc<Running>, ConnectError> {
        let process = self.find(selector)?;
        let tables = self.lock();
        let runs = tables.running.get(&process.pid);
        match runs.is_some_and(|p| Arc::ptr_eq(p, &process)) {
            true => Ok(process),
            false => Err(not_found(selector)),
        }
    }

    /// The process of a pid or tag: one that runs, else the last that ended a moment ago, whose output can still be read.
    ///
    /// # Errors
    /// `not_found`.
    pub fn find(&self, selector: &Selector) -> Result<Arc<Running>, ConnectError> {
        let wanted = |process: &Running| match selector {
            Selector::Pid(pid) => process.pid == *pid,
            Selector::Tag(tag) => process.tag.as_ref() == Some(tag),
        };
        let tables = self.lock();
        let ended = tables
            .ended
            .iter()
            .rev()
            .filter(|(at, _)| at.elapsed() < KEEP_ENDED);
        let mut all = tables
            .running
            .values()
            .chain(ended.map(|(_, process)| process));
        all.find(|process| wanted(process))
            .cloned()
            .ok_or_else(|| not_found(selector))
    }

    /// Processes that run, by id.
    #[must_use]
    pub fn list(&self) -> Vec<ProcessInfo> {
        let mut list: Vec<_> = self
            .lock()
            .running
            .values()
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

fn not_found(selector: &Selector) -> ConnectError {
    ConnectError::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag {tag} not found"),
    })
}
