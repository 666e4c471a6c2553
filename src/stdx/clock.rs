//! Wall clock in the unit all records and wire messages use.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch; 0 before it.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
