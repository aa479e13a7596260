//! Input of a process: its standard input or its terminal. Data is written in the order of the
//! calls.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use connectrpc::ConnectError;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::{
    io::{AsyncWriteExt as _, Interest, unix::AsyncFd},
    net::unix::pipe,
    sync::Mutex,
};

/// Destination of a process's input.
#[derive(Debug)]
pub enum InputSink {
    /// No input. The process reads the end of file.
    Null,
    /// Pipe; `None` after it was closed.
    Pipe(Mutex<Option<pipe::Sender>>),
    /// Terminal.
    Terminal(Terminal),
}

/// Master side of a terminal. The lock keeps concurrent writes from mixing.
#[derive(Debug)]
pub struct Terminal {
    master: std::sync::Arc<AsyncFd<OwnedFd>>,
    order: Mutex<()>,
}

impl Terminal {
    /// Creates the input side of a terminal. The output is read elsewhere.
    #[must_use]
    pub fn new(master: std::sync::Arc<AsyncFd<OwnedFd>>) -> Self {
        Self {
            master,
            order: Mutex::new(()),
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let _in_order = self.order.lock().await;
        while !bytes.is_empty() {
            let written = self
                .master
                .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, bytes)?))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

impl InputSink {
    /// True if the process has a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// Writes to standard input. Waits while the process does not read.
    ///
    /// # Errors
    /// `internal` if there is no standard input, it is closed, or the process no longer reads it.
    pub async fn write_stdin(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        let Self::Pipe(pipe) = self else {
            return Err(ConnectError::internal("the process has no standard input"));
        };
        let mut pipe = pipe.lock().await;
        let stdin = pipe
            .as_mut()
            .ok_or_else(|| ConnectError::internal("standard input is closed"))?;
        stdin
            .write_all(bytes)
            .await
            .map_err(|e| ConnectError::internal(format!("error writing to stdin: {e}")))
    }

    /// Writes to the terminal.
    ///
    /// # Errors
    /// `internal` if there is no terminal or the process is gone.
    pub async fn write_terminal(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        let Self::Terminal(terminal) = self else {
            return Err(ConnectError::internal("tty not assigned to process"));
        };
        terminal
            .write_all(bytes)
            .await
            .map_err(|e| ConnectError::internal(format!("error writing to tty: {e}")))
    }

    /// Closes standard input. May be called twice.
    ///
    /// # Errors
    /// `unknown` for a terminal, which has no standard input to close.
    pub async fn close(&self) -> Result<(), ConnectError> {
        match self {
            Self::Null => Ok(()),
            Self::Pipe(pipe) => {
                pipe.lock().await.take();
                Ok(())
            }
            Self::Terminal(_) => Err(ConnectError::unknown(
                "cannot close the input of a terminal: send Ctrl-D (0x04) instead",
            )),
        }
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    /// `internal` if there is no terminal, `invalid_argument` if the size is out of range.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), ConnectError> {
        let Self::Terminal(terminal) = self else {
            return Err(ConnectError::internal("tty not assigned to process"));
        };
        let size = window_size(columns, rows)?;
        tcsetwinsize(terminal.master.get_ref().as_fd(), size)
            .map_err(|e| ConnectError::internal(format!("error resizing tty: {e}")))
    }
}

/// Converts a terminal size.
///
/// # Errors
/// `invalid_argument` for more than 65535 columns or rows.
pub fn window_size(columns: u32, rows: u32) -> Result<Winsize, ConnectError> {
    let number = |name: &str, value: u32| {
        u16::try_from(value).map_err(|_| {
            ConnectError::invalid_argument(format!(
                "`pty.size.{name}` is {value}, the maximum is 65535"
            ))
        })
    };
    Ok(Winsize {
        ws_col: number("cols", columns)?,
        ws_row: number("rows", rows)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}
