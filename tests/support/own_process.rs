//! Tests that need a process of their own: for limits, users, and what cannot
//! be taken back.

#![allow(clippy::print_stdout, reason = "figures are printed to be read")]

use std::process::Command;

use super::DescriptorLedger;

/// Set in the process that runs only one test.
const IS_CHILD: &str = "BOWLINE_TEST_CHILD";

/// Runs `test` in a process of its own, which is the test binary told to run
/// only the test `name` of the module `module` (`module_path!()`).
#[track_caller]
pub(crate) fn in_own_process(module: &str, name: &str, test: impl FnOnce()) {
    in_own_process_with(module, name, |_| (), test);
}

/// As [`in_own_process`]; `prepare` adds to the command that starts it, and
/// answers what is to be kept until it has ended.
#[track_caller]
pub(crate) fn in_own_process_with<K>(
    module: &str,
    name: &str,
    prepare: impl FnOnce(&mut Command) -> K,
    test: impl FnOnce(),
) {
    if std::env::var_os(IS_CHILD).is_some() {
        return test();
    }
    let ledger = DescriptorLedger::open();
    let module = module.split_once("::").expect("a module").1;
    let mut command = Command::new(std::env::current_exe().expect("it runs"));
    command
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .arg("--test-threads=1")
        .env(IS_CHILD, "1");
    let kept = prepare(&mut command);
    let output = command.output().expect("it starts");
    drop(kept);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // Its figures are ours.
    for line in out.lines().filter(|line| line.starts_with("T-")) {
        println!("\n{line}");
    }
    assert!(output.status.success(), "{out}{err}");
    assert!(out.contains("1 passed"), "it ran: {out}{err}");
    ledger.assert_balanced();
}
