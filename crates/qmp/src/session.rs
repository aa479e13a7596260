//! Calls to the peer, and their deadline.

use std::{os::fd::BorrowedFd, time::Duration};

use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::{
    QmpError,
    connection::{Qmp, Subscriber},
};

/// Deadline for a command that only changes the peer's own state.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// Calls that together have one deadline. Made by [`Qmp::within`].
pub struct Session<'a, S> {
    qmp: &'a mut Qmp<S>,
    step: &'static str,
    deadline: Duration,
    end: Instant,
}

impl<S: Subscriber> Qmp<S> {
    /// Begins a sequence of calls. `step` names the sequence in the error of a passed `deadline`.
    pub fn within(&mut self, step: &'static str, deadline: Duration) -> Session<'_, S> {
        Session {
            qmp: self,
            step,
            deadline,
            end: Instant::now() + deadline,
        }
    }

    /// Sends a single command and waits for its reply for at most [`COMMAND_DEADLINE`].
    ///
    /// # Errors
    /// See [`Session::command`].
    pub async fn command(
        &mut self,
        name: &'static str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        self.within(name, COMMAND_DEADLINE)
            .command(name, arguments)
            .await
    }
}

impl<S: Subscriber> Session<'_, S> {
    /// Sends a command and waits for its reply. `arguments` is null if there are none.
    ///
    /// # Errors
    /// `Command` with the peer's error; `Deadline`, in which case the peer may still execute the
    /// command; another error if the connection is lost.
    pub async fn command(
        &mut self,
        name: &'static str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let call = self.qmp.call(name, arguments, None);
        let answered = timeout_at(self.end, call).await;
        answered.unwrap_or(Err(self.passed()))
    }

    /// Sends a command together with a descriptor and waits for its reply.
    ///
    /// # Errors
    /// See [`Session::command`].
    pub async fn command_with_fd(
        &mut self,
        name: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let call = self.qmp.call(name, arguments, Some(fd));
        let answered = timeout_at(self.end, call).await;
        answered.unwrap_or(Err(self.passed()))
    }

    /// Passes events to the subscriber until `found` returns a value. `found` is called before the
    /// first event too.
    ///
    /// # Errors
    /// `Deadline`; another error if the connection is lost.
    pub async fn wait_for<T>(
        &mut self,
        mut found: impl FnMut(&S) -> Option<T>,
    ) -> Result<T, QmpError> {
        let found = async {
            loop {
                if let Some(value) = found(self.qmp.subscriber()) {
                    return Ok(value);
                }
                self.qmp.next_event().await?;
            }
        };
        let found = timeout_at(self.end, found).await;
        found.unwrap_or(Err(self.passed()))
    }

    /// Subscriber of the connection.
    pub fn subscriber_mut(&mut self) -> &mut S {
        self.qmp.subscriber_mut()
    }

    fn passed(&self) -> QmpError {
        QmpError::Deadline {
            step: self.step,
            deadline: self.deadline,
        }
    }
}
