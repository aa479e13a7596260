//! Time as the database keeps it: milliseconds since 1970.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;

/// Now. A clock before 1970 reads as 1970.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// As the API shows it; what is out of range shows as 1970.
pub(crate) fn timestamp(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// As the API shows it, where 0 stands for "never".
pub(crate) fn optional_timestamp(ms: i64) -> Option<Timestamp> {
    (ms > 0).then(|| timestamp(ms))
}
