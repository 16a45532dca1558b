//! The socket of the inspector.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::descriptor::{Description, Descriptor, Next, Readiness};
use bowline::inspect::Inspector;
use bowline::testing::ManualClock;
use bowline::{Reactor, Transports, Unix};
use serde_json::{Value, json};

use crate::support::{DescriptorLedger, eventually, run_until, socketpair};
use crate::{Asker, Echo, Program, capture, connect, fact, say};

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
    let took = |turn: &Value| turn["took"].as_f64().unwrap();
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
    let is_echo = |it: &&Value| fact(it, "factory") == "Echo";
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
    let held = |it: &Value| fact(it, "buffered_bytes").as_u64().unwrap_or(0);
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

/// The program answers as many as are read, and some.
#[test]
fn ten_thousand_requests_of_one_who_does_not_read_wait_with_the_client() {
    let program = Program::start();
    let mut hostile = connect(&program.socket);
    let requests = b"{\"get\":\"all\"}\n".repeat(10_000);
    hostile.set_nonblocking(true).unwrap();
    let mut written = 0;
    let mut asker = Asker::new(&program.socket);
    let started = Instant::now();
    loop {
        match hostile.write(&requests[written..]) {
            Ok(count) => written += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        let (all, _) = asker.descriptors();
        let asks = |it: &&Value| fact(it, "protocol") == "Operator";
        let held = |it: &Value| fact(it, "buffered_bytes").as_u64().unwrap_or(0);
        let most = all.iter().filter(asks).map(held).max().unwrap();
        assert!(most < 1_000_000, "{most} bytes are held for it");
        let is_stopped = all.iter().any(|it| fact(it, "reading") == "paused");
        if is_stopped {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "it goes on");
    }
    // It is told everything all the same, once it reads.
    hostile.set_nonblocking(false).unwrap();
    let mut writes = hostile.try_clone().unwrap();
    let rest = requests[written..].to_vec();
    let writer = std::thread::spawn(move || writes.write_all(&rest).unwrap());
    let mut answers = std::io::BufReader::new(hostile);
    let mut answer = String::new();
    for number in 0..10_000 {
        answer.clear();
        std::io::BufRead::read_line(&mut answers, &mut answer).unwrap();
        assert!(
            answer.contains("summary, descriptors or turns"),
            "answer {number}: {answer}"
        );
    }
    writer.join().unwrap();
}

/// Takes note of the turn in which it is asked what it is.
struct Counted {
    turn: Rc<Cell<u64>>,
    asked: Rc<RefCell<Vec<u64>>>,
}

impl Descriptor for Counted {
    fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
        Next::Keep
    }

    fn facet(&mut self) -> &mut dyn Any {
        self
    }

    fn describe(&self, description: &mut Description) {
        self.asked.borrow_mut().push(self.turn.get());
        description.section("counted");
    }
}

/// Has somebody ask a program with ten thousand descriptors, and answers with the answer
/// and the turns in which they were asked what they are.
fn asked_of_ten_thousand<S: Read + Write>(
    reactor: &mut Reactor,
    mut client: S,
    request: &str,
    is_all: impl Fn(&[u8]) -> bool,
) -> (String, Vec<u64>) {
    let (turn, asked) = (
        Rc::<Cell<u64>>::default(),
        Rc::<RefCell<Vec<u64>>>::default(),
    );
    for _ in 0..10_000 {
        let (turn, asked) = (Rc::clone(&turn), Rc::clone(&asked));
        let vacancy = reactor.vacancy().unwrap();
        vacancy.install(Box::new(Counted { turn, asked }));
    }
    client.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    run_until(reactor, |_| {
        turn.set(turn.get() + 1);
        // Nothing comes while there is nothing to read.
        let _ = client.read_to_end(&mut answer);
        is_all(&answer)
    });
    let asked = asked.borrow();
    assert_eq!(asked.len(), 10_000, "each was asked once");
    let most = asked.chunk_by(|a, b| a == b).map(<[u64]>::len).max();
    assert!(most <= Some(256), "{most:?} of them in one turn");
    (String::from_utf8(answer).unwrap(), asked.clone())
}

/// For the page and for Prometheus it is taken as for the socket.
#[test]
fn a_page_and_metrics_of_ten_thousand_are_taken_over_many_turns() {
    for (name, end) in [("events", "\n\n"), ("metrics", "\n")] {
        let ledger = DescriptorLedger::open();
        // A page is told again after a second, which does not come.
        let mut reactor = Reactor::with_clock(ManualClock::new()).unwrap();
        let page = Inspector::on_address(&mut reactor, ([127, 0, 0, 1], 0).into()).unwrap();
        let url = page.url();
        let path = &url[url.len() - 34..];
        let client = std::net::TcpStream::connect(page.address()).unwrap();
        client.set_nonblocking(true).unwrap();
        let request = format!("GET {path}{name} HTTP/1.1\r\n\r\n");
        let is_all = |answer: &[u8]| {
            let text = String::from_utf8_lossy(answer);
            let body = text.split_once("\r\n\r\n").map(|(_, body)| body);
            let body = body
                .unwrap_or_default()
                .trim_start_matches("retry: 500\n\n");
            let is_whole = name == "events" || body.contains("bowline_truncations_total");
            is_whole && body.len() > 100 && body.ends_with(end)
        };
        let (answer, asked) = asked_of_ten_thousand(&mut reactor, client, &request, is_all);
        let turns = asked.last().unwrap() - asked[0];
        assert!(turns >= 39, "{name} in {turns} turns");
        let listed = answer.matches("\"counted\"").count();
        assert!(listed <= 2_000, "{name} lists {listed}");
        drop(reactor);
        ledger.assert_balanced();
    }
}

/// Of ten thousand each is asked once, and no more than a portion of them in any turn.
#[test]
fn a_list_of_ten_thousand_is_taken_over_many_turns() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inspect");
    let mut reactor = Reactor::new().unwrap();
    Inspector::on_socket(&mut reactor, &path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    client.set_nonblocking(true).unwrap();
    let request = "{\"get\":\"descriptors\"}\n";
    let is_all = |answer: &[u8]| answer.ends_with(b"}}\n");
    let (answer, _) = asked_of_ten_thousand(&mut reactor, client, request, is_all);
    assert_eq!(
        answer.matches("\"counted\"").count(),
        2 * 10_000,
        "each has a line"
    );
    let end: Value = serde_json::from_str(answer.lines().last().unwrap()).unwrap();
    let (first, last) = (&end["end"]["first_turn"], &end["end"]["last_turn"]);
    assert!(
        last.as_u64() >= first.as_u64().map(|first| first + 39),
        "{end}"
    );
    // Each says of which moment it is.
    for line in answer.lines().filter(|line| line.contains("counted")) {
        let line: Value = serde_json::from_str(line).unwrap();
        let turn = line["turn"].as_u64();
        assert!(turn >= first.as_u64() && turn <= last.as_u64(), "{line}");
    }
}

#[test]
fn the_traffic_of_one_connection_is_logged_for_a_minute() {
    capture::start();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inspect");
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    Inspector::on_socket(&mut reactor, &path).unwrap();
    let (ours, theirs) = socketpair();
    let echo = reactor.adopt(Unix, ours.into(), Echo).unwrap();
    let (ours, others) = socketpair();
    reactor.adopt(Unix, ours.into(), Echo).unwrap();
    theirs.set_nonblocking(true).unwrap();
    others.set_nonblocking(true).unwrap();
    let says = |reactor: &mut Reactor, mut end: &UnixStream, word: &[u8]| {
        end.write_all(word).unwrap();
        let mut answer = Vec::new();
        run_until(reactor, |_| {
            let _ = end.read_to_end(&mut answer);
            answer == word
        });
    };
    says(&mut reactor, &theirs, b"before");
    let mut client = UnixStream::connect(&path).unwrap();
    let token = echo.token().to_bits();
    writeln!(client, "{}", json!({"log": token})).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut answer = Vec::new();
    run_until(&mut reactor, |_| {
        let _ = client.read_to_end(&mut answer);
        answer.ends_with(b"\n")
    });
    assert_eq!(answer, b"{\"done\":true}\n");
    clock.advance(Duration::from_secs(59));
    says(&mut reactor, &theirs, b"this\x00one");
    says(&mut reactor, &others, b"another");
    let name = format!("{}", echo.token());
    let logged = capture::lines("INFO");
    let wanted = [
        format!("INFO: {name} received 8 bytes: this\\x00one"),
        format!("INFO: {name} sends 8 bytes: this\\x00one"),
    ];
    assert_eq!(logged, wanted, "of one connection, both ways");
    clock.advance(Duration::from_secs(2));
    reactor.turn(Some(Duration::ZERO));
    says(&mut reactor, &theirs, b"after a minute");
    assert_eq!(capture::lines("INFO"), wanted, "the minute is over");
}
