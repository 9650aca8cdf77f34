//! Times of day as others are told them.

use std::time::SystemTime;

/// Milliseconds since 1970; 0 for what was before.
pub fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The same of this moment.
pub fn unix_ms_now() -> u64 {
    unix_ms(SystemTime::now())
}
