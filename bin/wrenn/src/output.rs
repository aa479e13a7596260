//! Standard output for people and scripts: tables, plain lines, JSON.
//!
//! Never panics when the reader closes the pipe: a broken pipe is an `io::Error` like any other, on
//! which `main` exits silently.

use std::{
    error::Error,
    io::{self, IsTerminal, Write},
};

use jiff::Timestamp;
use serde::Serialize;
use tabled::{builder::Builder, settings::Style};
use thiserror_ext::AsReport as _;

/// True if standard output is a terminal.
pub(crate) fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// True if standard error, where progress is shown, is a terminal.
pub(crate) fn stderr_is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Writes one line to standard output.
pub(crate) fn line(text: impl std::fmt::Display) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// Writes one line to standard error, ignoring failures.
pub(crate) fn error(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes a value as indented JSON.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> anyhow::Result<()> {
    // Serialized to a string first: the library's own error would hide a broken pipe.
    line(serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// Writes rows under their headings: framed on a terminal, aligned columns elsewhere.
pub(crate) fn table(headings: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
    let text = if stdout_is_terminal() {
        framed(headings, rows)
    } else {
        aligned(headings, &rows)
    };
    io::stdout().lock().write_all(text.as_bytes())
}

fn framed(headings: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut builder = Builder::default();
    builder.push_record(headings.iter().map(|h| h.to_uppercase()));
    for row in rows {
        builder.push_record(row);
    }
    let mut table = builder.build();
    format!("{}\n", table.with(Style::rounded()))
}

/// Formats aligned columns, two spaces apart and without trailing spaces. An empty cell is `-`, so
/// that `awk` can count columns.
fn aligned(headings: &[&str], rows: &[Vec<String>]) -> String {
    let headings: Vec<String> = headings.iter().map(|h| h.to_uppercase()).collect();
    let width = |column: usize| {
        rows.iter()
            .chain([&headings])
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    for row in [&headings].into_iter().chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let cell = if cell.is_empty() { "-" } else { cell };
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Formats the time since `since` in its largest unit: `3s`, `12m`, `4h`, `9d`.
pub(crate) fn age(since: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Formats bytes in binary units with one decimal: `1.5 GiB`.
#[expect(
    clippy::cast_precision_loss,
    reason = "one decimal is shown, so 52 bits are enough"
)]
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Makes text from a sandbox safe for a terminal: control characters are replaced.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Formats an error and its causes in one line. A cause that the text already ends with is not
/// repeated.
pub(crate) fn in_full(error: &(dyn Error + 'static)) -> String {
    let text = error.to_report_string();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(cells: &[&[&str]]) -> Vec<Vec<String>> {
        cells
            .iter()
            .map(|row| row.iter().map(|c| (*c).to_owned()).collect())
            .collect()
    }

    #[test]
    fn plain_columns_are_aligned_and_empty_cells_stay_countable() {
        let text = aligned(
            &["id", "status"],
            &rows(&[&["sb-1", "running"], &["sb-long", ""]]),
        );
        assert_eq!(text, "ID       STATUS\nsb-1     running\nsb-long  -\n");
    }

    #[test]
    fn a_table_without_rows_still_has_its_headings() {
        assert_eq!(aligned(&["id", "status"], &[]), "ID  STATUS\n");
        assert!(framed(&["id"], vec![]).contains("ID"));
    }

    #[test]
    fn a_framed_table_shows_every_cell() {
        let text = framed(&["id", "status"], rows(&[&["sb-1", "running"]]));
        for word in ["ID", "STATUS", "sb-1", "running", "╭"] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }

    #[test]
    fn ages_take_the_largest_unit() {
        let now: Timestamp = "2026-01-10T00:00:00Z".parse().expect("a time");
        for (since, expected) in [
            ("2026-01-10T00:00:00Z", "0s"),
            ("2026-01-09T23:59:01Z", "59s"),
            ("2026-01-09T23:59:00Z", "1m"),
            ("2026-01-09T22:30:00Z", "1h"),
            ("2026-01-08T00:00:00Z", "2d"),
            ("2026-01-10T00:05:00Z", "0s"),
        ] {
            assert_eq!(age(since.parse().expect("a time"), now), expected);
        }
    }

    #[test]
    fn bytes_have_binary_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Outer {
        text: &'static str,
        source: io::Error,
    }

    #[test]
    fn causes_are_printed_once_in_one_line() {
        let printed = |text| {
            in_full(&Outer {
                text,
                source: io::Error::other("disk\n  full"),
            })
        };
        assert_eq!(printed("cannot write"), "cannot write: disk full");
        assert_eq!(
            printed("cannot write: disk\n  full"),
            "cannot write: disk full"
        );
    }

    #[test]
    fn a_guest_cannot_send_escapes_to_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
