//! The page and the metrics, over HTTP.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use bowline::Reactor;
use bowline::inspect::Inspector;
use bowline::testing::ManualClock;
use serde_json::Value;

use crate::browser::Server;
use crate::support::{DescriptorLedger, run_until};
use crate::{Program, fact, not_run, say};

/// The host and the path of the page.
pub(crate) fn place(page: &str) -> (&str, &str) {
    let rest = page.strip_prefix("http://").unwrap();
    rest.split_at(rest.find('/').unwrap())
}

pub(crate) fn open(page: &str) -> TcpStream {
    let stream = TcpStream::connect(place(page).0).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
}

pub(crate) fn get(page: &str, path: &str) -> String {
    let mut stream = open(page);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: it\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The next event of a page.
pub(crate) fn event(stream: &mut TcpStream, read: &mut String) -> Value {
    loop {
        if let Some(start) = read.find("data: ")
            && let Some(length) = read[start..].find("\n\n")
        {
            let event = serde_json::from_str(&read[start + 6..start + length]).unwrap();
            read.drain(..start + length + 2);
            return event;
        }
        let mut piece = [0; 65_536];
        let count = stream.read(&mut piece).unwrap();
        assert!(count > 0, "the events ended: {read}");
        read.push_str(std::str::from_utf8(&piece[..count]).unwrap());
    }
}

#[test]
fn the_page_is_whole_and_is_told_of_a_connection_and_its_bytes() {
    let ledger = DescriptorLedger::open();
    let program = Program::start();
    let (_, path) = place(&program.page);
    let page = get(&program.page, path);
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page:.100}");
    assert!(page.trim_end().ends_with("</html>"));
    // Nothing of it comes from elsewhere.
    let body = page.split_once("\r\n\r\n").unwrap().1;
    for word in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!body.contains(word), "{word}");
    }
    let mut client = program.connect();
    let (mut stream, mut read) = (open(&program.page), String::new());
    write!(stream, "GET {path}events HTTP/1.1\r\n\r\n").unwrap();
    let received = |event: &Value| {
        let all = event["descriptors"].as_array().unwrap();
        let echo = all.iter().find(|it| fact(it, "protocol") == "Echo");
        fact(echo.expect("it is listed"), "received_bytes").as_u64()
    };
    let first = event(&mut stream, &mut read);
    assert_eq!(received(&first), Some(5));
    assert!(first["turns"].is_array() && first["summary"]["turns"].is_number());
    say(&mut client, b"more");
    let second = event(&mut stream, &mut read);
    assert_eq!(received(&second), Some(9));
    drop((client, stream, program));
    ledger.assert_balanced();
}

#[test]
fn a_port_alone_is_one_of_the_loopback_interface() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let url = Inspector::at(&mut reactor, "0").unwrap();
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    assert!(!url.contains(":0/"), "{url}");
    for place in ["65536", "-1", "localhost", "127.0.0.1", ""] {
        assert!(Inspector::at(&mut reactor, place).is_err(), "{place}");
    }
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn without_the_secret_there_is_nothing() {
    let program = Program::start();
    let (_, path) = place(&program.page);
    let mut wrong = path.to_owned().into_bytes();
    wrong[5] = if wrong[5] == b'0' { b'1' } else { b'0' };
    let wrong = String::from_utf8(wrong).unwrap();
    for path in [
        "/",
        "/metrics",
        "//",
        &wrong,
        &path[..10],
        "/é",
        &format!("{path}other"),
    ] {
        let answer = get(&program.page, path);
        let is_refused = ["HTTP/1.1 404", "HTTP/1.1 400"]
            .iter()
            .any(|it| answer.starts_with(it));
        assert!(is_refused, "{path}: {answer}");
        assert!(
            answer.ends_with("\r\n\r\n"),
            "{path}: it says something: {answer}"
        );
    }
}

#[test]
fn what_is_no_request_is_refused_and_a_head_without_end_cut_off() {
    let program = Program::start();
    let ask = |request: &[u8]| {
        let mut stream = open(&program.page);
        // It may be refused before all is written.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error}"),
        }
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(ask(b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(ask(b"\x16\x03\x01\0\xa5\x01").starts_with("HTTP/1.1 400"));
    let endless = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'a'; 9_000]].concat();
    assert!(ask(&endless).starts_with("HTTP/1.1 431"));
    let many = [
        b"GET / HTTP/1.1\r\n".as_slice(),
        &b"A: b\r\n".repeat(100),
        b"\r\n",
    ]
    .concat();
    assert!(ask(&many).starts_with("HTTP/1.1 400"));
    // A byte at a time is as good as all at once.
    let (_, path) = place(&program.page);
    let mut stream = open(&program.page);
    for byte in format!("GET {path} HTTP/1.1\r\n\r\n").bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_crowd_and_one_who_does_not_read_cost_the_program_nothing() {
    let program = Program::start();
    let (_, path) = place(&program.page);
    let mut idle = Vec::new();
    for _ in 0..200 {
        let mut stream = open(&program.page);
        let _ = write!(stream, "GET {path}events HTTP/1.1\r\n\r\n");
        idle.push(stream);
    }
    let mut client = program.connect();
    for _ in 0..100 {
        say(&mut client, b"served as ever");
    }
    let mut asker = crate::Asker::new(&program.socket);
    let (all, _) = asker.descriptors();
    let browsers = all.iter().filter(|it| fact(it, "protocol") == "Browser");
    assert!(browsers.count() <= 16);
}

/// Opens a connection, says something, and reads to the end: what was answered.
fn ask(host: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(host).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    // It may be cut off before all is written or read.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn ten_thousand_requests_of_hostile_clients_cost_the_program_nothing() {
    const EACH: usize = 2_500;
    let ledger = DescriptorLedger::open();
    let program = Program::start();
    let (host, path) = place(&program.page);
    // Who never ends its head, and who asks for events and never reads them.
    let mut stuck = Vec::new();
    for request in [
        "GET / HTTP/1.1\r\nX: ",
        &format!("GET {path}events HTTP/1.1\r\n\r\n"),
    ] {
        for _ in 0..4 {
            let mut stream = open(&program.page);
            stream.write_all(request.as_bytes()).unwrap();
            stuck.push(stream);
        }
    }
    let wrong = b"GET /0123456789abcdef0123456789abcdef/ HTTP/1.1\r\n\r\n".to_vec();
    let endless = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'a'; 9_000]].concat();
    // All of them in one go, of which the first is answered.
    let many = wrong.repeat(20);
    let requests = [wrong, endless, many, b"\x16\x03\x01\0\r\n\r\n".to_vec()];
    let hostile = requests.map(|request| {
        let host = host.to_owned();
        std::thread::spawn(move || {
            let answers = (0..EACH).map(|_| ask(&host, &request));
            let statuses = answers.map(|it| it.get(..12).unwrap_or_default().to_owned());
            let mut counts = std::collections::BTreeMap::new();
            statuses.for_each(|it| *counts.entry(it).or_insert(0) += 1);
            counts
        })
    });
    let (mut client, mut pings) = (program.connect(), 0);
    let mut asker = crate::Asker::new(&program.socket);
    while !hostile.iter().all(std::thread::JoinHandle::is_finished) {
        for _ in 0..50 {
            say(&mut client, b"served as ever");
            pings += 1;
        }
        let (all, _) = asker.descriptors();
        let browsers = all.iter().filter(|it| fact(it, "protocol") == "Browser");
        let held = |it: &Value| fact(it, "buffered_bytes").as_u64().unwrap_or(0);
        let held: Vec<_> = browsers.map(held).collect();
        assert!(held.len() <= 16, "{} are served at once", held.len());
        assert!(held.iter().sum::<u64>() < 1_000_000, "{held:?}");
    }
    assert!(pings >= 50, "{pings}");
    let answers = hostile.map(|it| it.join().unwrap());
    for (counts, status) in answers.iter().zip(["404", "431", "404", "400"]) {
        // Those that come while sixteen are served are turned away; a reset may have
        // destroyed an answer.
        let allowed = ["", &format!("HTTP/1.1 {status}")];
        let is_allowed = |it: &String| allowed.contains(&it.as_str());
        assert!(counts.keys().all(is_allowed), "{status}: {counts:?}");
        assert_eq!(counts.values().sum::<usize>(), EACH);
    }
    let summary = asker.ask(serde_json::json!({"get": "summary"}));
    assert_eq!(summary["panics"], 0);
    drop(stuck);
    // Whoever has the secret is served as before.
    crate::support::eventually(Duration::from_secs(20), || {
        match ask(host, format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()) {
            answer if answer.starts_with("HTTP/1.1 200") => Ok(()),
            answer => Err(format!("{answer:.50}")),
        }
    });
    drop((client, asker, program));
    ledger.assert_balanced();
}

/// Of two clients of which one does not end its head and one does not read, neither has
/// anything of the program's for longer than it may.
#[test]
fn one_who_takes_its_time_is_cut_off_and_one_who_does_not_read_is_told_no_more() {
    let ledger = DescriptorLedger::open();
    let clock = ManualClock::new();
    let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
    let page = Inspector::on_address(&mut reactor, ([127, 0, 0, 1], 0).into()).unwrap();
    let url = page.url();
    let (_, path) = place(&url);
    let mut slow = open(&url);
    slow.write_all(b"GET / HTTP/1.1\r\nX: a").unwrap();
    let mut deaf = open(&url);
    // A window of theirs takes so much; more of it stays here.
    rustix::net::sockopt::set_socket_recv_buffer_size(&deaf, 4_096).unwrap();
    write!(deaf, "GET {path}events HTTP/1.1\r\n\r\n").unwrap();
    let held = |reactor: &Reactor| {
        let all = reactor.descriptors().filter_map(|it| it.describe());
        let held = all.filter_map(|it| match it.get("buffered_bytes") {
            Some(bowline::descriptor::Fact::Count(count)) => Some(*count),
            _ => None,
        });
        held.collect::<Vec<_>>()
    };
    run_until(&mut reactor, |reactor| held(reactor).len() == 2);
    // What nobody reads is soon too much for the sockets; then no more is said.
    let mut most = 0_u64;
    for _ in 0..9 {
        for _ in 0..5 {
            reactor.turn(Some(Duration::ZERO));
        }
        clock.advance(Duration::from_secs(1));
        most = most.max(held(&reactor).iter().sum());
    }
    assert_eq!(held(&reactor).len(), 2, "they have some time");
    clock.advance(Duration::from_secs(2));
    run_until(&mut reactor, |reactor| held(reactor).len() == 1);
    slow.set_nonblocking(false).unwrap();
    let mut end = Vec::new();
    // It is closed; its bytes that nobody read make that a reset.
    let _ = slow.read_to_end(&mut end);
    assert_eq!(end, b"");
    for _ in 0..2_000 {
        clock.advance(Duration::from_secs(1));
        reactor.turn(Some(Duration::ZERO));
        most = most.max(held(&reactor).iter().sum());
    }
    assert!(
        most < 100_000,
        "{most} bytes wait for one who does not read"
    );
    drop((reactor, slow, deaf));
    ledger.assert_balanced();
}

/// What the page tells, and Prometheus is told, of a pool and a restart.
#[test]
fn pools_and_restarts_are_in_the_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (control, socket) = (at("control"), at("socket"));
    let pool = Server::start("prefork", &["--serve", "--workers", "3"]);
    let restart = Server::start(
        "hot_restart",
        &["--serve", "--directory", &control, "--unix", &socket],
    );
    for _ in 0..10 {
        let mut client = TcpStream::connect(&pool.address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(client.read(&mut [0; 100]).unwrap() > 0);
    }
    let expected = [
        (
            &pool,
            &[
                ("bowline_pool_workers{pool=\"0\"}", 3.0),
                ("bowline_pool_waiting{pool=\"0\"}", 0.0),
                ("bowline_pool_in_flight{pool=\"0\"}", 0.0),
                ("bowline_pool_paused{pool=\"0\"}", 0.0),
                (
                    "bowline_pool_connections_total{pool=\"0\",outcome=\"acknowledged\"}",
                    10.0,
                ),
                (
                    "bowline_pool_worker_events_total{pool=\"0\",event=\"started\"}",
                    3.0,
                ),
                (
                    "bowline_pool_worker_events_total{pool=\"0\",event=\"deaths\"}",
                    0.0,
                ),
            ][..],
        ),
        (
            &restart,
            &[
                ("bowline_restart_serving", 1.0),
                ("bowline_restart_took_over", 0.0),
                ("bowline_restart_movable_connections", 0.0),
                ("bowline_restart_moved_total{way=\"here\"}", 0.0),
                ("bowline_restart_moved_total{way=\"away\"}", 0.0),
            ],
        ),
    ];
    for (server, expected) in expected {
        let (_, path) = place(&server.page);
        let body = crate::support::eventually(Duration::from_secs(20), || {
            let answer = get(&server.page, &format!("{path}metrics"));
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            for (name, value) in expected {
                if sample(body, name) != Some(*value) {
                    return Err(format!("no {name} of {value} in {body}"));
                }
            }
            Ok(body.to_owned())
        });
        check_by_promtool(&body);
    }
}

/// The value of a sample.
pub(crate) fn sample(body: &str, name: &str) -> Option<f64> {
    let mut lines = body.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

#[test]
fn prometheus_accepts_the_metrics_and_they_count() {
    let program = Program::start();
    let mut client = program.connect();
    say(&mut client, b"0123456789");
    let (_, path) = place(&program.page);
    let answer = get(&program.page, &format!("{path}metrics"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let value = |name: &str| sample(body, name).unwrap_or_else(|| panic!("no {name} in {body}"));
    assert_eq!(value("bowline_received_bytes_total{kind=\"UNIX\"}"), 15.0);
    assert_eq!(value("bowline_sent_bytes_total{kind=\"UNIX\"}"), 15.0);
    assert_eq!(value("bowline_connections{kind=\"UNIX\"}"), 1.0);
    assert!(value("bowline_turns_total") >= 2.0);
    let open = "bowline_connections_by_state{kind=\"UNIX\",state=\"open\"}";
    assert_eq!(value(open), 1.0);
    let accepted = format!(
        "bowline_accepted_total{{factory=\"Echo\",local=\"{}\"}}",
        program.echo.display()
    );
    assert_eq!(value(&accepted), 1.0);
    assert_eq!(value("bowline_paused_connections"), 0.0);
    assert_eq!(value("bowline_held_connections"), 0.0);
    assert_eq!(value("bowline_timers_late"), 0.0);
    say(&mut client, b"pause");
    let answer = get(&program.page, &format!("{path}metrics"));
    assert_eq!(sample(&answer, "bowline_paused_connections"), Some(1.0));
    let all = value("bowline_turn_seconds_count");
    assert_eq!(value("bowline_turn_seconds_bucket{le=\"+Inf\"}"), all);
    check_by_promtool(body);
}

/// Has Prometheus' own tool look at what an endpoint says.
fn check_by_promtool(body: &str) {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = match promtool {
        Ok(promtool) => promtool,
        Err(error) => {
            return not_run(&format!("promtool: {error}"));
        }
    };
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(body.as_bytes())
        .unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        output.stderr,
        b"",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
