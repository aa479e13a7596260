//! The terminal's raw mode, in which every key goes to the sandbox, and the way back from it.

use std::{
    io,
    sync::{Mutex, Once, PoisonError},
};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Size of a terminal that does not know its own.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// How the terminal was before; there while it is raw, for the panic hook.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// While this lives, the terminal of standard input is raw. Its end, also by a panic, restores what was before.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Switches to raw mode.
    pub(super) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                // First the terminal, so that the message can be read.
                restore();
                next(panic);
            }));
        });
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let terminal = Self(());
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(terminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        // If the terminal is gone there is nothing to restore.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Whether standard input is a terminal, and output goes to one.
pub(super) fn is_terminal() -> bool {
    isatty(io::stdin()) && isatty(io::stdout())
}

/// Columns and rows.
pub(super) fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
        _ => USUAL_SIZE,
    }
}
