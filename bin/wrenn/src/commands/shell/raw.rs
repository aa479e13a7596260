//! Raw mode of the terminal, in which every key goes to the sandbox, and its restoration.

use std::{io, sync::Once};

use parking_lot::Mutex;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Size assumed for a terminal that does not report one: columns and rows.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Terminal settings to restore; set while the terminal is raw, so that the panic hook can restore
/// them.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Guard that keeps the terminal of standard input in raw mode. Dropping it, and also a panic,
/// restores the previous settings.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Switches to raw mode.
    pub(super) fn enter() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                // Restore the terminal first, so that the message is readable.
                restore();
                next(panic);
            }));
        });
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock() = Some(before);
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
    let before = BEFORE.lock().take();
    if let Some(before) = before {
        // If the terminal is gone, there is nothing to restore.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// True if standard input and standard output are terminals.
pub(super) fn is_terminal() -> bool {
    isatty(io::stdin()) && isatty(io::stdout())
}

/// Returns the terminal's columns and rows.
pub(super) fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col, size.ws_row),
        _ => USUAL_SIZE,
    }
}
