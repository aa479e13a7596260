//! Helpers of the fuzz targets.
//!
//! Inputs with several fields are lines of text instead of `Arbitrary` tuples, so that seeds can be
//! written by hand and one mutation changes one field.

/// Returns the first `N` lines of the input. Missing lines are empty; the last element contains the
/// rest of the input, including its line feeds.
#[must_use]
pub fn fields<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut lines = input.splitn(N, |byte| *byte == b'\n');
    std::array::from_fn(|_| lines.next().unwrap_or_default())
}

/// Returns the first `N` lines of the input as text, like [`fields`]. `None` if a line is not
/// UTF-8.
#[must_use]
pub fn texts<const N: usize>(input: &[u8]) -> Option<[&str; N]> {
    let input = std::str::from_utf8(input).ok()?;
    let mut lines = input.splitn(N, '\n');
    Some(std::array::from_fn(|_| lines.next().unwrap_or_default()))
}
