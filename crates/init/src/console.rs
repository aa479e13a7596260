//! What the host reads on the serial console.

use std::io::Write as _;

/// Prints a line. Nobody is left to tell if that fails.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
}

/// Tells of a step that failed, and goes on.
pub(crate) fn report<E: std::fmt::Display>(step: &str, outcome: Result<(), E>) {
    if let Err(error) = outcome {
        say(&format!("wrenn: could not {step}: {error}"));
    }
}
