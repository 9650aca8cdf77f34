//! The `olol` command.

use std::ffi::{c_int, c_long};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of `mimalloc.h`.
const PURGE_DELAY: c_int = 15;

/// Gives memory that was freed back to the system after 20 ms. By itself mimalloc waits a second, and by then another
/// thousand streams have come and taken other memory: 64 to 74 MB where 55 will do. Tokens cost the same.
#[expect(unsafe_code, reason = "mimalloc takes its options as a C function")]
fn give_memory_back_soon() {
    unsafe extern "C" {
        // What an option is if its environment variable does not say it. The crate of mimalloc has it for a feature only.
        fn mi_option_set_default(option: c_int, value: c_long);
    }
    // SAFETY: it stores a number in a table that is there from the start, and no other thread is there yet.
    unsafe { mi_option_set_default(PURGE_DELAY, 20) }
}

fn main() -> ExitCode {
    give_memory_back_soon();
    match olol::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut out = std::io::stderr().lock();
            let _ = std::io::Write::write_fmt(&mut out, format_args!("olol: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}
