//! The page and the metrics, over HTTP.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::support::DescriptorLedger;
use crate::{Program, fact, not_run, say};

/// The host and the path of the page.
fn place(page: &str) -> (&str, &str) {
    let rest = page.strip_prefix("http://").unwrap();
    rest.split_at(rest.find('/').unwrap())
}

fn open(page: &str) -> TcpStream {
    let stream = TcpStream::connect(place(page).0).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
}

fn get(page: &str, path: &str) -> String {
    let mut stream = open(page);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: it\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The next event of a page.
fn event(stream: &mut TcpStream, read: &mut String) -> Value {
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

#[test]
fn prometheus_accepts_the_metrics_and_they_count() {
    let program = Program::start();
    let mut client = program.connect();
    say(&mut client, b"0123456789");
    let (_, path) = place(&program.page);
    let answer = get(&program.page, &format!("{path}metrics"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let value = |name: &str| {
        let mut lines = body.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {body}"))
            .parse::<f64>()
            .unwrap()
    };
    assert_eq!(value("bowline_received_bytes_total{kind=\"UNIX\"}"), 15.0);
    assert_eq!(value("bowline_sent_bytes_total{kind=\"UNIX\"}"), 15.0);
    assert_eq!(value("bowline_connections{kind=\"UNIX\"}"), 1.0);
    assert!(value("bowline_turns_total") >= 2.0);
    let all = value("bowline_turn_seconds_count");
    assert_eq!(value("bowline_turn_seconds_bucket{le=\"+Inf\"}"), all);
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
