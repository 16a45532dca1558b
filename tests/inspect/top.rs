//! The command `bowline-top`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::browser::{Client, Last, example};
use crate::support::eventually;
use crate::{Program, not_run, say};

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
    let is_echo = |line: &&str| line.starts_with("UNIX") && line.contains("Echo");
    assert!(text.lines().any(|line| is_echo(&line)), "{text}");
    // The listener has what its connections did, and how many there are.
    let is_listener = |line: &&str| line.starts_with("listener") && line.contains(" Echo ");
    let listener = text.lines().find(is_listener);
    let listener = listener.unwrap_or_else(|| panic!("{text}"));
    assert_eq!(listener.split_whitespace().nth(6), Some("5"), "{text}");
    assert!(listener.ends_with(" 1 open"), "{text}");
}

#[test]
fn it_prints_what_has_passed_to_the_workers_of_a_pool() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("inspect").display().to_string();
    let mut pool = Command::new(example("prefork"))
        .args(["--serve", "--workers", "1", "--inspect", &place])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(pool.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    let address = line.trim_end().strip_prefix("listening on ").unwrap();
    for _ in 0..3 {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(client.read(&mut [0; 100]).unwrap() > 0);
    }
    let output = Command::new(bowline_top())
        .args(["--once", "--every", "0.1", &place])
        .output()
        .unwrap();
    let _ = pool.kill();
    let _ = pool.wait();
    let text = String::from_utf8_lossy(&output.stdout);
    let channels = text.lines().find(|it| it.starts_with("Pool channels:"));
    let channels = channels.unwrap_or_else(|| panic!("{text}"));
    assert!(channels.ends_with(" 1 open, 3 descriptors out"), "{text}");
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
    let mut client = program.connect();
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
    // What a connection does is seen, and the list can be ordered.
    let until = |what: &str, is_there: &dyn Fn(&str) -> bool| {
        eventually(Duration::from_secs(20), || match screen() {
            shown if is_there(&shown) => Ok(()),
            shown => Err(format!("no {what} in {shown}")),
        })
    };
    let echo = |shown: &str, column: usize| {
        let mut rows = shown.lines().filter(|line| line.starts_with("UNIX"));
        let row = rows.find(|line| line.contains(" Echo "));
        row.and_then(|row| row.split_whitespace().nth(column).map(str::to_owned))
    };
    until("five bytes", &|shown| {
        echo(shown, 6).as_deref() == Some("5")
    });
    say(&mut client, b"and more");
    until("bytes that grow", &|shown| {
        echo(shown, 6).as_deref() == Some("13")
    });
    say(&mut client, b"slow");
    until("slow callback", &|shown| {
        let slowest = shown.lines().find(|line| line.starts_with("slowest: "));
        slowest.is_some_and(|line| line.contains(" in ready of Echo,UNIX"))
    });
    for (key, first) in [("k", "UNIX"), ("a", "listener")] {
        tmux(&["send-keys", key]);
        until(key, &|shown| {
            let mut lines = shown.lines().skip_while(|line| !line.starts_with("KIND "));
            lines.nth(1).is_some_and(|line| line.starts_with(first))
        });
    }
    say(&mut client, b"pause");
    until("pause", &|shown| {
        echo(shown, 2).as_deref() == Some("paused")
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

#[test]
fn it_shows_a_restart_whose_connections_move_and_goes_on_with_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (terminal, socket, place) = (at("tmux"), at("socket"), at("inspect"));
    let tmux = |arguments: &[&str]| -> Option<Output> {
        let mut command = Command::new("tmux");
        command.args(["-f", "/dev/null", "-S", &terminal]);
        command.args(arguments).output().ok()
    };
    let mut server = Command::new(example("hot_restart"))
        .args(["--serve", "--move", "--directory", &at("control")])
        .args(["--unix", &socket, "--inspect", &place])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut clients: Vec<_> = (0..40).map(|_| Client::connect(socket.as_ref())).collect();
    let first = clients.iter_mut().map(|it| it.say("one")).max().unwrap();
    let mut last = Last(None);
    let top = format!("{} --every 0.1 {place}", bowline_top().display());
    let started = tmux(&["new-session", "-d", "-x", "160", "-y", "30", &top]);
    let Some(started) = started else {
        let _ = server.kill();
        let _ = server.wait();
        return not_run("tmux is missing");
    };
    assert!(started.status.success(), "{started:?}");
    let until = |words: &[&str]| {
        eventually(Duration::from_secs(60), || {
            let shown = tmux(&["capture-pane", "-p"]).unwrap();
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            match words.iter().all(|word| shown.contains(word)) {
                true => Ok(()),
                false => Err(format!("no {words:?} in {shown}")),
            }
        });
    };
    until(&[&format!("process {first} "), "movable 40"]);
    let pid = rustix::process::Pid::from_raw(first).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let after = eventually(Duration::from_secs(60), || match clients[0].say("two") {
        pid if pid == first => Err("the first process answers"),
        pid => Ok(pid),
    });
    last.0 = rustix::process::Pid::from_raw(after);
    until(&[
        &format!("process {after} "),
        &format!("predecessor {first}"),
        "moved_here 40",
    ]);
    tmux(&["kill-server"]);
    drop(clients);
    let _ = server.kill();
    let _ = server.wait();
}
