//! Messages on the serial console, which the host reads.

use std::io::Write as _;

/// Prints a line. Write errors are ignored, because there is no other place to report them.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
}

/// Prints a failed step. The caller continues with the next step.
pub(crate) fn report<E: std::fmt::Display>(step: &str, outcome: Result<(), E>) {
    if let Err(error) = outcome {
        say(&format!("wrenn: failed to {step}: {error}"));
    }
}
