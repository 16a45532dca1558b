//! The socket of the inspector.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{DescriptorLedger, eventually};
use crate::{Asker, Program, connect, fact, say};

#[test]
fn a_connection_that_was_just_made_is_listed_and_its_bytes_grow() {
    let ledger = DescriptorLedger::open();
    let program = Program::start();
    let mut asker = Asker::new(&program.socket);
    assert!(asker.connections().is_empty());
    let mut client = program.connect();
    let before = asker.connections();
    assert_eq!(before.len(), 1, "{before:?}");
    assert_eq!(fact(&before[0], "received_bytes"), 5);
    say(&mut client, b"and more");
    let after = asker.connections();
    assert_eq!(fact(&after[0], "received_bytes"), 13);
    assert_eq!(fact(&after[0], "sent_bytes"), 13);
    assert_eq!(after[0]["token"], before[0]["token"]);
    drop((client, asker, program));
    ledger.assert_balanced();
}

#[test]
fn a_summary_counts_and_names_the_slowest_callback() {
    let program = Program::start();
    let mut client = program.connect();
    say(&mut client, b"slow");
    let summary = Asker::new(&program.socket).ask(json!({"get": "summary"}));
    assert_eq!(summary["pid"], std::process::id());
    assert_eq!(summary["kinds"]["UNIX"]["open"], 2, "{summary:#}");
    let slow = &summary["slowest"][0];
    assert!(slow["took"].as_f64().unwrap() >= 0.03, "{slow}");
    assert!(
        slow["name"].as_str().unwrap().starts_with("Echo,UNIX"),
        "{slow}"
    );
    let turns = Asker::new(&program.socket).ask(json!({"get": "turns"}));
    let took = |turn: &serde_json::Value| turn["took"].as_f64().unwrap();
    let longest = turns["turns"].as_array().unwrap().iter().map(took);
    assert!(longest.fold(0.0, f64::max) >= 0.03, "{turns}");
}

#[test]
fn an_operator_closes_a_connection_and_stops_and_pauses_a_listener() {
    let program = Program::start();
    let mut client = program.connect();
    let mut asker = Asker::new(&program.socket);
    let token = asker.connections()[0]["token"].clone();
    assert_eq!(asker.ask(json!({"close": token}))["done"], true);
    assert_eq!(client.read(&mut [0; 9]).unwrap(), 0, "it was closed");
    eventually(Duration::from_secs(10), || {
        let answer = asker.ask(json!({"close": token}));
        let gone = answer["error"] == "the descriptor is gone";
        if gone { Ok(()) } else { Err(answer) }
    });
    let (all, _) = asker.descriptors();
    let is_echo = |it: &&serde_json::Value| fact(it, "factory") == "Echo";
    let listener = all.iter().find(is_echo).expect("it listens")["token"].clone();
    assert_eq!(
        asker.ask(json!({"log": listener}))["error"],
        "the descriptor cannot do that"
    );
    assert_eq!(asker.ask(json!({"pause": listener}))["done"], true);
    // It is in the accept queue, and nobody takes it.
    let mut late = connect(&program.echo);
    late.write_all(b"hello").unwrap();
    assert!(asker.connections().is_empty());
    assert_eq!(asker.ask(json!({"resume": listener}))["done"], true);
    let mut answer = [0; 5];
    late.read_exact(&mut answer).unwrap();
}

#[test]
fn a_paused_connection_is_shown_as_paused() {
    let program = Program::start();
    let mut client = program.connect();
    say(&mut client, b"pause");
    let connections = Asker::new(&program.socket).connections();
    assert_eq!(fact(&connections[0], "reading"), "paused");
}

#[test]
fn the_socket_is_its_owners_alone() {
    let program = Program::start();
    let mode = std::fs::metadata(&program.socket).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

#[test]
fn other_users_are_refused() {
    if !rustix::process::geteuid().is_root() {
        return println!("NOT RUN: it takes a second user");
    }
    let program = Program::start();
    // Whoever may open the file is asked who they are.
    std::fs::set_permissions(&program.socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    let folder = program.socket.parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.settimeout(10)\n\
                  s.connect(sys.argv[1])\n\
                  try:\n  s.sendall(b'{\"get\":\"summary\"}\\n'); print(len(s.recv(9)))\n\
                  except OSError as e: print(0)";
    let mut python = std::process::Command::new("python3");
    std::os::unix::process::CommandExt::uid(&mut python, 65_534);
    let output = python
        .args(["-c", script])
        .arg(&program.socket)
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "0",
        "{output:?}"
    );
    let summary = Asker::new(&program.socket).ask(json!({"get": "summary"}));
    assert!(summary["pid"].is_number(), "its own user is served");
}

#[test]
fn nonsense_is_answered_and_a_line_without_end_closes_the_connection() {
    let program = Program::start();
    let mut asker = Asker::new(&program.socket);
    for request in ["", "{", "[1]", "{\"get\":\"secrets\"}", "{\"close\":\"x\"}"] {
        asker.send(request);
        assert!(asker.line()["error"].is_string(), "{request}");
    }
    let mut client = connect(&program.socket);
    // It may be closed before all is written.
    let _ = client.write_all(&[b'x'; 5_000]);
    let mut answer = String::new();
    let _ = client.read_to_string(&mut answer);
    assert!(answer.contains("error"), "{answer}");
    assert!(asker.ask(json!({"get": "summary"}))["pid"].is_number());
}

/// A list is sent as it is read, so the program holds a portion of it and no more.
#[test]
fn one_who_asks_for_lists_and_reads_none_costs_a_portion() {
    let program = Program::start();
    let _clients: Vec<_> = (0..300).map(|_| program.connect()).collect();
    let mut hostile = connect(&program.socket);
    let request = b"{\"get\":\"descriptors\"}\n".repeat(2_000);
    hostile.set_nonblocking(true).unwrap();
    // What is not taken waits here.
    let _ = hostile.write(&request);
    let mut asker = Asker::new(&program.socket);
    let (all, _) = asker.descriptors();
    let held = |it: &serde_json::Value| fact(it, "buffered_bytes").as_u64().unwrap_or(0);
    let most = all.iter().map(held).max().unwrap();
    assert!(
        most < 1_000_000,
        "{most} bytes are held for one who does not read"
    );
    let mut client = program.connect();
    say(&mut client, b"served as ever");
}

#[test]
fn a_list_of_thousands_is_taken_in_portions_and_holds_each_once() {
    let program = Program::start();
    let clients: Vec<_> = (0..1_500).map(|_| program.connect()).collect();
    let started = Instant::now();
    let mut asker = Asker::new(&program.socket);
    asker.send(&json!({"get": "descriptors"}).to_string());
    // Registered after the list began: it does not belong to it.
    let first = asker.line();
    let _later = program.connect();
    let mut tokens = vec![first["token"].as_u64().unwrap()];
    let end = loop {
        let line = asker.line();
        match line["token"].as_u64() {
            Some(token) => tokens.push(token),
            None => break line["end"].clone(),
        }
    };
    let count = tokens.len();
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), count, "one was listed twice");
    assert!(count >= clients.len(), "{count}");
    let turns = end["last_turn"].as_u64().unwrap() - end["first_turn"].as_u64().unwrap();
    assert!(
        turns >= 5,
        "{count} in {turns} turns, {:?}",
        started.elapsed()
    );
}
