//! Version of Firecracker, and the features that depend on it.

/// Oldest supported version.
pub(super) const MINIMUM: &str = "1.10";

/// Memory above which guest memory consists of two regions on x86-64, MiB.
const ONE_REGION_MIB: u32 = 3072;

/// Version of a Firecracker process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Major, minor and patch number.
    numbers: (u32, u32, u32),
    /// The version as reported, such as `1.16.1` or `1.17.0-dev`.
    text: String,
}

impl Version {
    /// Parses a version as the API reports it. Returns `None` if it is not a version, or if it is
    /// older than 1.10.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || ".-+".contains(c);
        if text.len() > 64 || !text.chars().all(is_plain) {
            return None;
        }
        let release = text.split(['-', '+']).next()?;
        let mut numbers = release.split('.').map(str::parse::<u32>);
        let mut number = || numbers.next().and_then(Result::ok);
        let numbers = (number()?, number()?, number().unwrap_or(0));
        (numbers >= (1, 10, 0)).then(|| Self {
            numbers,
            text: text.to_owned(),
        })
    }

    /// Returns the version as Firecracker reports it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// True if the balloon can report free pages on its own (since 1.14).
    #[must_use]
    pub fn has_free_page_reporting(&self) -> bool {
        self.numbers >= (1, 14, 0)
    }

    /// True if the field of `PUT /snapshot/load` is `track_dirty_pages` (since 1.13), not
    /// `enable_diff_snapshots`.
    #[must_use]
    pub fn tracks_dirty_pages_by_name(&self) -> bool {
        self.numbers >= (1, 13, 0)
    }

    /// True if diff snapshots of a guest with this memory are correct. Versions 1.14.0 and 1.14.1
    /// write pages of the second region of memory to wrong places.
    #[must_use]
    pub fn writes_correct_diffs(&self, memory_mib: u32) -> bool {
        let is_affected = (1, 14, 0) <= self.numbers && self.numbers < (1, 14, 2);
        !is_affected || memory_mib <= ONE_REGION_MIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).expect(text)
    }

    #[test]
    fn versions_since_1_10_are_supported() {
        for text in [
            "1.10.0",
            "1.16.1",
            "1.17.0-dev",
            "1.16.0+fuzzing",
            "2.0.0",
            "1.10",
        ] {
            assert_eq!(version(text).as_str(), text);
        }
        for text in [
            "1.9.1", "0.25.0", "1", "", "one", "1.x", "1.16.1\n", "1.16.1 ",
        ] {
            assert_eq!(Version::parse(text), None, "{text:?}");
        }
        assert_eq!(Version::parse(&format!("1.16.{}", "1".repeat(70))), None);
    }

    #[test]
    fn features_begin_with_a_version() {
        let features = |text| {
            let version = version(text);
            (
                version.tracks_dirty_pages_by_name(),
                version.has_free_page_reporting(),
            )
        };
        assert_eq!(features("1.10.1"), (false, false));
        assert_eq!(features("1.12.9"), (false, false));
        assert_eq!(features("1.13.0"), (true, false));
        assert_eq!(features("1.14.0"), (true, true));
        assert_eq!(features("2.0.0"), (true, true));
    }

    #[test]
    fn diffs_of_two_regions_are_wrong_in_two_versions() {
        for (text, memory_mib, expected) in [
            ("1.13.2", 8192, true),
            ("1.14.0", 3072, true),
            ("1.14.0", 3073, false),
            ("1.14.1", 8192, false),
            ("1.14.2", 8192, true),
            ("1.16.1", 8192, true),
        ] {
            let correct = version(text).writes_correct_diffs(memory_mib);
            assert_eq!(correct, expected, "{text} {memory_mib}");
        }
    }
}
