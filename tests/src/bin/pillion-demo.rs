//! The program behind `cargo xtask demo`.
#![expect(clippy::print_stderr, reason = "a command line program")]

use std::process::ExitCode;

fn main() -> ExitCode {
    match pillion_tests::demo::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
