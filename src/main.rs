//! The `olol` command.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match olol::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut out = std::io::stderr().lock();
            let _ = std::io::Write::write_fmt(&mut out, format_args!("olol: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}
