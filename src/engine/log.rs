//! What llama.cpp logs: into our log, and its last complaint into our errors.
//!
//! llama.cpp returns null where something failed, and tells the reason to its log only.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

/// Levels of `enum ggml_log_level` in `ggml.h`.
const WARN: u32 = 3;
const ERROR: u32 = 4;
const CONTINUED: u32 = 5;

/// What it complained of since it was last asked, bounded in lines.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Complaints that are kept.
const KEEP: usize = 4;

/// Sends llama.cpp's log here, for the rest of the process.
#[expect(unsafe_code, reason = "llama.cpp takes its log callback as a C function")]
pub(super) fn start() {
    // SAFETY: `receive` is a plain function that lives as long as the process, has the signature that llama.cpp asks for,
    // takes any thread's calls, and does not look at the user data.
    unsafe { llama_cpp_4::log_set(Some(receive), std::ptr::null_mut()) }
}

/// The reasons that were logged since the last time, joined; or what stands in for them.
pub(super) fn take_complaints(otherwise: &str) -> String {
    let complaints = std::mem::take(&mut *COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner));
    if complaints.is_empty() { otherwise.to_owned() } else { complaints.join("; ") }
}

#[expect(unsafe_code, reason = "the text comes as a C string")]
unsafe extern "C" fn receive(level: u32, text: *const c_char, _user_data: *mut c_void) {
    if text.is_null() || level == CONTINUED {
        return;
    }
    // SAFETY: llama.cpp passes a string that ends with a zero byte and lives until this returns.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim();
    match level {
        ERROR => {
            tracing::debug!(target: "llama", "{text}");
            let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
            if complaints.len() < KEEP {
                complaints.push(text.to_owned());
            }
        }
        WARN => tracing::debug!(target: "llama", "{text}"),
        _ => tracing::trace!(target: "llama", "{text}"),
    }
}
