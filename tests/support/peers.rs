//! Programs that nobody here wrote, which a test may lack.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// Whether `program` is there, which says its version when it is given `argument`. If not,
/// that is said with the Debian package that has it; under `CI` or
/// `BOWLINE_INTEROP=require` it is a failure.
#[track_caller]
pub(crate) fn has_program(program: &str, argument: &str, package: &str) -> bool {
    let run = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .output();
    if run.is_ok_and(|output| output.status.success()) {
        return true;
    }
    let is_required = std::env::var_os("CI").is_some()
        || std::env::var("BOWLINE_INTEROP").is_ok_and(|it| it == "require");
    assert!(
        !is_required,
        "CANNOT RUN without {program}: apt-get install {package}"
    );
    // Not by a macro, whose output is kept back of a test that passes.
    let said = format!("NOT RUN: {program} is missing (apt-get install {package})\n");
    let _ = io::stderr().write_all(said.as_bytes());
    false
}
