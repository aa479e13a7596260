//! Named series of measurements.

use serde_json::{Map, Value, json};

use super::{median, rounded};

/// Named series of measurements.
#[derive(Default)]
pub(super) struct Series(Map<String, Value>, Vec<(String, Vec<f64>)>);

impl Series {
    pub(super) fn add(&mut self, name: &str, value: f64) {
        match self.1.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.1.push((name.to_owned(), vec![value])),
        }
    }

    pub(super) fn median(&self, name: &str) -> f64 {
        let values = self.1.iter().find(|(known, _)| known == name);
        values.map_or(f64::NAN, |(_, values)| median(values.clone()))
    }

    pub(super) fn report(mut self) -> Value {
        for (name, values) in self.1 {
            self.0.insert(name, json!(rounded(median(values))));
        }
        Value::Object(self.0)
    }
}
