//! The examples, with the programs that they are for.

use std::path::{Path, PathBuf};
use std::process::Command;

use bowline::Reactor;

use crate::imsg::tmux;
use crate::programs::{Program, has};

fn example(name: &str) -> Command {
    let mut path = std::env::current_exe().expect("Linux knows");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.extend([Path::new("examples"), &PathBuf::from(name)]);
    assert!(
        path.exists(),
        "{} is missing: cargo build --examples",
        path.display()
    );
    Command::new(path)
}

#[test]
fn tmux_command_runs_what_tmux_would() {
    if !has("tmux", "tmux") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let socket = directory.path().join("socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut server = Program::start(&mut tmux(&socket, &["-D"]));
    server.wait_for_listener(&mut reactor, &socket);
    let mut run = |words: &[&str]| {
        let mut command = example("tmux_command");
        command.arg("--socket").arg(&socket).arg("--").args(words);
        Program::start(&mut command).end(&mut reactor)
    };
    let (is_well, said) = run(&["new-session", "-d", "-s", "ours", "sleep 1000"]);
    assert!(is_well, "{said}");
    let (is_well, said) = run(&["list-sessions", "-F", "#{session_name}"]);
    assert!(is_well, "{said}");
    assert_eq!(said, "ours\n");
    let (is_well, said) = run(&["kill-session", "-t", "nobody"]);
    assert!(!is_well, "tmux says so with its exit code");
    assert!(said.contains("can't find session"), "{said}");
    assert!(run(&["kill-session", "-t", "ours"]).0);
}
