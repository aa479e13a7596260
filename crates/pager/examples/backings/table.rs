//! Table of the results.

use std::fmt;

/// Results by measurement and way, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<(&'static str, Vec<Cell>)>,
    columns: Vec<&'static str>,
    /// Shows the best round in place of the median.
    pub(crate) shows_best: bool,
}

#[derive(Debug)]
struct Cell {
    column: &'static str,
    /// Value of each round.
    values: Vec<f64>,
    text: String,
}

impl Table {
    /// Adds the value of one round.
    pub(crate) fn add(&mut self, what: &'static str, column: &'static str, value: f64) {
        self.cell(what, column).values.push(value);
    }

    /// Sets a text.
    pub(crate) fn note(&mut self, what: &'static str, column: &'static str, text: String) {
        self.cell(what, column).text = text;
    }

    fn cell(&mut self, what: &'static str, column: &'static str) -> &mut Cell {
        if !self.columns.contains(&column) {
            self.columns.push(column);
        }
        let found = self.rows.iter().position(|(name, _)| *name == what);
        let row = found.unwrap_or_else(|| {
            self.rows.push((what, Vec::new()));
            self.rows.len() - 1
        });
        let cells = &mut self.rows[row].1;
        let found = cells.iter().position(|cell| cell.column == column);
        let cell = found.unwrap_or_else(|| {
            cells.push(Cell {
                column,
                values: Vec::new(),
                text: String::new(),
            });
            cells.len() - 1
        });
        &mut cells[cell]
    }
}

impl Cell {
    fn show(&self, what: &str, shows_best: bool) -> String {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let index = match shows_best {
            false => values.len() / 2,
            true if what.ends_with("MiB/s") => values.len().saturating_sub(1),
            true => 0,
        };
        match values.get(index) {
            None => self.text.clone(),
            Some(value) if *value < 100.0 => format!("{value:.2}"),
            Some(value) => format!("{value:.0}"),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| | {} |", self.columns.join(" | "))?;
        writeln!(f, "|---|{}", "---:|".repeat(self.columns.len()))?;
        for (what, cells) in &self.rows {
            write!(f, "| {what} |")?;
            for column in &self.columns {
                match cells.iter().find(|cell| cell.column == *column) {
                    Some(cell) => write!(f, " {} |", cell.show(what, self.shows_best))?,
                    None => write!(f, " – |")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
