//! `wrenn sandbox logs`: the logs of a sandbox on its host.

use std::io::Write as _;

use clap::Args;
use wrenn_model::SandboxId;

use crate::{client::Client, output};

/// Arguments of `wrenn sandbox logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Sandbox id
    id: SandboxId,
    /// Show the serial console of the guest instead of the log of the supervisor
    #[arg(long)]
    console: bool,
    /// Show only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
}

pub(super) async fn run(client: &Client, args: LogsArgs) -> anyhow::Result<i32> {
    let source = if args.console {
        "console"
    } else {
        "supervisor"
    };
    let log = client.log(&args.id, source).await?;
    let shown = last_lines(&log, args.tail);
    if output::stdout_is_terminal() {
        // A guest must not control the terminal.
        for line in String::from_utf8_lossy(shown).lines() {
            output::line(output::printable(line))?;
        }
    } else {
        std::io::stdout().lock().write_all(shown)?;
    }
    Ok(0)
}

/// Returns the last lines of a text, or all of them.
fn last_lines(text: &[u8], count: Option<usize>) -> &[u8] {
    let Some(count) = count else {
        return text;
    };
    let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
    let skipped = lines.len().saturating_sub(count);
    let skipped: usize = lines[..skipped].iter().map(|line| line.len()).sum();
    &text[skipped..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_lines_are_counted_with_or_without_a_line_feed_at_the_end() {
        for (text, count, shown) in [
            ("a\nb\nc\n", Some(2), "b\nc\n"),
            ("a\nb\nc", Some(2), "b\nc"),
            ("a\n", Some(2), "a\n"),
            ("a\n", Some(0), ""),
            ("", Some(1), ""),
            ("a\nb", None, "a\nb"),
        ] {
            let shown_lines = last_lines(text.as_bytes(), count);
            assert_eq!(shown_lines, shown.as_bytes(), "{text:?} {count:?}");
        }
    }
}
