//! Table of the results.

use std::fmt;

/// Results by measurement and candidate.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    columns: Vec<&'static str>,
}

#[derive(Debug)]
struct Row {
    what: &'static str,
    cells: Vec<(&'static str, Cell)>,
}

#[derive(Debug)]
enum Cell {
    /// Value of each round.
    Values(Vec<f64>),
    Text(String),
}

impl Table {
    /// Adds the value of one round.
    pub(crate) fn add(&mut self, what: &'static str, column: &'static str, value: f64) {
        let empty = Cell::Values(Vec::new());
        if let Cell::Values(values) = self.cell(what, column, empty) {
            values.push(value);
        }
    }

    /// Sets a text.
    pub(crate) fn note(&mut self, what: &'static str, column: &'static str, text: String) {
        *self.cell(what, column, Cell::Text(String::new())) = Cell::Text(text);
    }

    fn cell(&mut self, what: &'static str, column: &'static str, empty: Cell) -> &mut Cell {
        if !self.columns.contains(&column) {
            self.columns.push(column);
        }
        let row = match self.rows.iter().position(|row| row.what == what) {
            Some(row) => row,
            None => {
                let cells = Vec::new();
                self.rows.push(Row { what, cells });
                self.rows.len() - 1
            }
        };
        let cells = &mut self.rows[row].cells;
        let cell = match cells.iter().position(|(name, _)| *name == column) {
            Some(cell) => cell,
            None => {
                cells.push((column, empty));
                cells.len() - 1
            }
        };
        &mut cells[cell].1
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Values(values) => {
                let mut values = values.clone();
                values.sort_by(f64::total_cmp);
                let median = values[values.len() / 2];
                let digits = if median < 100.0 { 2 } else { 0 };
                write!(f, "{median:.digits$}")
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| | {} |", self.columns.join(" | "))?;
        writeln!(f, "|---|{}", "---:|".repeat(self.columns.len()))?;
        for row in &self.rows {
            write!(f, "| {} |", row.what)?;
            for column in &self.columns {
                match row.cells.iter().find(|(name, _)| name == column) {
                    Some((_, cell)) => write!(f, " {cell} |")?,
                    None => write!(f, " – |")?,
                }
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
