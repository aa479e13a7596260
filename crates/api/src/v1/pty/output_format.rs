//! Form of a terminal's output: binary frames, or JSON messages with base64.
//!
//! The query of the request decides, if it names a form. Otherwise the client's input does: a
//! binary frame asks for binary frames, an `input` message for base64. Clients of both kinds send
//! the same first message, so output is held back for [`DECISION_TIME`] after `started`. A client
//! that sends no input in that time gets binary frames, until it sends an `input` message.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use utoipa::ToSchema;

/// Maximum time that output waits for the client's first input.
const DECISION_TIME: Duration = Duration::from_millis(250);

/// Form of a terminal's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::v1) enum OutputFormat {
    /// Binary frames.
    Binary,
    /// Messages `output` with base64.
    Base64,
}

/// Form that a client has chosen. Clones share the choice.
#[derive(Debug, Clone)]
pub(super) struct FormatChoice {
    chosen: Arc<watch::Sender<Option<OutputFormat>>>,
    is_fixed: bool,
    /// Time until which output waits for the choice; `None` before there can be output.
    decide_by: Option<Instant>,
}

impl FormatChoice {
    /// Creates the choice of a client. `requested` is the form that its request names.
    pub(super) fn new(requested: Option<OutputFormat>) -> Self {
        Self {
            chosen: Arc::new(watch::Sender::new(requested)),
            is_fixed: requested.is_some(),
            decide_by: None,
        }
    }

    /// Records that the client has sent input in a form.
    pub(super) fn note_input(&self, format: OutputFormat) {
        if !self.is_fixed {
            self.chosen.send_replace(Some(format));
        }
    }

    /// Records that the client knows that the terminal runs.
    pub(super) fn begin(&mut self) {
        self.decide_by = Some(Instant::now() + DECISION_TIME);
    }

    /// Waits until the form is known. Cancel-safe.
    pub(super) async fn decided(&self) {
        let Some(decide_by) = self.decide_by else {
            return;
        };
        let mut chosen = self.chosen.subscribe();
        let choice = chosen.wait_for(Option::is_some);
        // After the time, the default applies.
        drop(tokio::time::timeout_at(decide_by, choice).await);
    }

    /// Returns the form of output from now on.
    pub(super) fn get(&self) -> OutputFormat {
        let chosen = *self.chosen.borrow();
        chosen.unwrap_or(OutputFormat::Binary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn output_waits_for_the_first_input_and_no_longer_than_the_limit() {
        let mut choice = FormatChoice::new(None);
        let began = Instant::now();
        choice.decided().await;
        choice.begin();
        choice.decided().await;
        assert_eq!(began.elapsed().as_millis(), DECISION_TIME.as_millis());
        assert_eq!(choice.get(), OutputFormat::Binary);
        choice.begin();
        let listener = choice.clone();
        listener.note_input(OutputFormat::Base64);
        let began = Instant::now();
        choice.decided().await;
        assert!(began.elapsed().is_zero());
        assert_eq!(choice.get(), OutputFormat::Base64);
        listener.note_input(OutputFormat::Binary);
        assert_eq!(choice.get(), OutputFormat::Binary);
    }

    #[tokio::test(start_paused = true)]
    async fn form_that_the_request_names_is_kept() {
        let mut choice = FormatChoice::new(Some(OutputFormat::Base64));
        choice.begin();
        choice.note_input(OutputFormat::Binary);
        let began = Instant::now();
        choice.decided().await;
        assert!(began.elapsed().is_zero());
        assert_eq!(choice.get(), OutputFormat::Base64);
    }
}
