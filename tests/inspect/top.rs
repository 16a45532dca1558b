//! The command `bowline-top`.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use crate::support::eventually;
use crate::{Program, not_run};

/// The command, built if it is not there yet: `cargo test` of everything builds it, that
/// of one test does not.
fn bowline_top() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("bowline-top");
    if !path.exists() {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--package", "bowline-top"])
            .status();
        assert!(built.unwrap().success());
    }
    path
}

#[test]
fn it_prints_one_look_of_a_program() {
    let program = Program::start();
    let _client = program.connect();
    let output = Command::new(bowline_top())
        .args(["--once", "--every", "0.1"])
        .arg(&program.socket)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(
        text.contains(&format!("process {}", std::process::id())),
        "{text}"
    );
    let is_echo = |line: &str| line.starts_with("UNIX") && line.contains("Echo");
    assert!(text.lines().any(is_echo), "{text}");
    assert!(
        text.lines().any(|line| line.starts_with("listener")),
        "{text}"
    );
}

#[test]
fn what_makes_no_sense_is_said() {
    for arguments in [&["--every", "0"][..], &["a", "b"], &[], &["--flag"]] {
        let output = Command::new(bowline_top())
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn it_shows_a_program_in_a_terminal_until_it_is_told_to_quit() {
    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("tmux");
    let tmux = |arguments: &[&str]| -> Option<Output> {
        let mut command = Command::new("tmux");
        command.args(["-f", "/dev/null", "-S"]).arg(&socket);
        command.args(arguments).output().ok()
    };
    let program = Program::start();
    let _client = program.connect();
    let top = format!(
        "{} --every 0.1 {}",
        bowline_top().display(),
        program.socket.display()
    );
    let started = tmux(&["new-session", "-d", "-x", "120", "-y", "30", &top]);
    let Some(started) = started else {
        return not_run("tmux is missing");
    };
    assert!(started.status.success(), "{started:?}");
    let screen = || {
        let shown = tmux(&["capture-pane", "-p"]).unwrap();
        String::from_utf8_lossy(&shown.stdout).into_owned()
    };
    eventually(Duration::from_secs(20), || {
        let shown = screen();
        match shown.contains("Echo") && shown.contains("KIND") {
            true => Ok(()),
            false => Err(shown),
        }
    });
    // The guide shows such a terminal, with the same columns.
    let shown = screen();
    if let Some(folder) = std::env::var_os("BOWLINE_PICTURES") {
        std::fs::write(PathBuf::from(folder).join("top.txt"), &shown).unwrap();
    }
    let guide = concat!(env!("CARGO_MANIFEST_DIR"), "/src/guide/inspect.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    let columns = |text: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with("KIND "))
            .map(str::to_owned);
        line.unwrap_or_else(|| panic!("no columns in {text}"))
    };
    assert_eq!(columns(&guide).trim_end(), columns(&shown).trim_end());
    tmux(&["send-keys", "q"]);
    eventually(Duration::from_secs(20), || {
        // With its only program the session ends, and the server with it.
        match tmux(&["has-session"]).is_some_and(|it| it.status.success()) {
            false => Ok(()),
            true => Err("it goes on"),
        }
    });
}
