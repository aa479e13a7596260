//! Progress of an image build, on standard error: a spinner on a terminal, one line per step
//! elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use wrenn_image::Progress;

use crate::output;

/// Number of characters of a tool's output line shown next to the spinner.
const SHOWN_CHARS: usize = 60;

/// Progress display with a spinner for the current step and a line for each completed step.
#[derive(Debug)]
pub(super) struct TerminalProgress {
    verbose: bool,
    spinner: Mutex<Option<ProgressBar>>,
}

impl TerminalProgress {
    pub(super) fn new(verbose: bool) -> Self {
        Self {
            verbose,
            spinner: Mutex::new(None),
        }
    }

    fn swap(&self, next: Option<ProgressBar>) -> Option<ProgressBar> {
        let mut spinner = self.spinner.lock();
        std::mem::replace(&mut spinner, next)
    }
}

impl Progress for TerminalProgress {
    fn step(&self, name: &str) {
        let style = ProgressStyle::with_template("{spinner} {prefix:10} {elapsed:>4} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let spinner = ProgressBar::new_spinner()
            .with_style(style)
            .with_prefix(name.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(100));
        if let Some(before) = self.swap(Some(spinner)) {
            before.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        let spinner = self.spinner.lock();
        if let Some(spinner) = &*spinner {
            let text = output::printable(text);
            if self.verbose {
                spinner.println(text);
            } else {
                spinner.set_message(text.chars().take(SHOWN_CHARS).collect::<String>());
            }
        }
    }

    fn done(&self, name: &str, elapsed: Duration) {
        if let Some(spinner) = self.swap(None) {
            spinner.finish_and_clear();
        }
        output::error(format_args!("✓ {name:10} {:.1} s", elapsed.as_secs_f64()));
    }
}

impl Drop for TerminalProgress {
    /// Removes the spinner that a failed build leaves.
    fn drop(&mut self) {
        if let Some(spinner) = self.swap(None) {
            spinner.finish_and_clear();
        }
    }
}

/// Progress display with lines only.
#[derive(Debug)]
pub(super) struct PlainProgress {
    verbose: bool,
}

impl PlainProgress {
    pub(super) fn new(verbose: bool) -> Self {
        Self { verbose }
    }
}

impl Progress for PlainProgress {
    fn step(&self, name: &str) {
        output::error(format_args!("{name} …"));
    }

    fn line(&self, text: &str) {
        if self.verbose {
            output::error(format_args!("  {}", output::printable(text)));
        }
    }

    fn done(&self, name: &str, elapsed: Duration) {
        output::error(format_args!("{name}: {:.1} s", elapsed.as_secs_f64()));
    }
}
