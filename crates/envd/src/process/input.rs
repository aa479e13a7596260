//! What goes into a process: its standard input, or its terminal. Pieces go in the order of the calls.

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

/// Where input goes.
#[derive(Debug)]
pub enum InputSink {
    /// Nowhere: the process reads the end of file.
    Null,
    /// A pipe; `None` once it is closed.
    Pipe(Mutex<Option<pipe::Sender>>),
    /// A terminal's master side. The lock keeps pieces whole.
    Terminal(Terminal),
}

/// A terminal's master side.
#[derive(Debug)]
pub struct Terminal {
    master: std::sync::Arc<AsyncFd<OwnedFd>>,
    order: Mutex<()>,
}

impl Terminal {
    /// A terminal whose output is read elsewhere.
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
    /// Writes to standard input; waits while the process does not read.
    ///
    /// # Errors
    /// `internal` if there is none, it is closed, or the process does not read any more.
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
    /// `internal` if there is none, or the process is gone.
    pub async fn write_terminal(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        let Self::Terminal(terminal) = self else {
            return Err(ConnectError::internal("tty not assigned to process"));
        };
        terminal
            .write_all(bytes)
            .await
            .map_err(|e| ConnectError::internal(format!("error writing to tty: {e}")))
    }

    /// Closes standard input. Doing it twice is fine.
    ///
    /// # Errors
    /// `unknown` for a terminal, which has none.
    pub async fn close(&self) -> Result<(), ConnectError> {
        match self {
            Self::Null => Ok(()),
            Self::Pipe(pipe) => {
                pipe.lock().await.take();
                Ok(())
            }
            Self::Terminal(_) => Err(ConnectError::unknown(
                "cannot close the input of a terminal: send it Ctrl-D (0x04)",
            )),
        }
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// `internal` if there is no terminal; `invalid_argument` for a size that no terminal has.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), ConnectError> {
        let Self::Terminal(terminal) = self else {
            return Err(ConnectError::internal("tty not assigned to process"));
        };
        let size = window_size(columns, rows)?;
        tcsetwinsize(terminal.master.get_ref().as_fd(), size)
            .map_err(|e| ConnectError::internal(format!("error resizing tty: {e}")))
    }
}

/// A terminal's size.
///
/// # Errors
/// `invalid_argument` for more than 65535 columns or rows.
pub fn window_size(columns: u32, rows: u32) -> Result<Winsize, ConnectError> {
    let number = |name: &str, value: u32| {
        u16::try_from(value).map_err(|_| {
            ConnectError::invalid_argument(format!("pty.size.{name}: {value} is more than 65535"))
        })
    };
    Ok(Winsize {
        ws_col: number("cols", columns)?,
        ws_row: number("rows", rows)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}
