//! Benchmarks. Each result is reported with its limit or with a reference measured in the same run.

mod boot;
mod cpu;
mod freed;
mod host;
mod probe;
mod resume;
mod sdk;
mod series;
mod spawn;
mod throughput;
mod vmm;

pub use boot::boot;
pub use cpu::cpu;
pub use host::{idle, memory};
pub use resume::{pause_and_resume, restore};
pub use sdk::sdk;
pub use spawn::spawn;
pub use throughput::{exec, files};
pub use vmm::vmm;

use series::Series;

/// Returns the median.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// Rounds to three decimal places. Further digits are noise.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_count_is_the_mean_of_the_middle_two() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }
}
