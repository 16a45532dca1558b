//! `http`, asked for files, for what it should not give, and while it is restarted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};

use crate::{DEADLINE, Example, is_running, wait_until};

/// A running server, with a folder that it serves.
pub(crate) struct Server {
    pub(crate) example: Example,
    metrics: String,
    folder: tempfile::TempDir,
}

impl Server {
    #[track_caller]
    fn start(files: &[(&str, &[u8])], workers: &str) -> Self {
        Self::start_with(files, workers, &[])
    }

    /// With more arguments.
    #[track_caller]
    pub(crate) fn start_with(files: &[(&str, &[u8])], workers: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("root");
        fs::create_dir(&root).expect("made");
        for (name, content) in files {
            fs::write(root.join(name), content).expect("written");
        }
        fs::write(folder.path().join("secret"), "secret").expect("written");
        let text = |path: &Path| path.to_str().expect("text").to_owned();
        let (root, state) = (text(&root), text(&folder.path().join("state")));
        let anywhere = "tcp:127.0.0.1:0";
        let arguments = [
            ["--root", &root],
            ["--state", &state],
            ["--listen", anywhere],
            ["--metrics", anywhere],
            ["--workers", workers],
        ];
        let arguments = [arguments.as_flattened(), more].concat();
        let mut example = Example::start("http", &arguments);
        let mut line = String::new();
        example.lines.read_line(&mut line).expect("text");
        let metrics = line.trim_end().strip_prefix("metrics on ");
        Self {
            metrics: metrics.expect("says where").to_owned(),
            example,
            folder,
        }
    }

    /// Sends SIGTERM, and expects an orderly end.
    #[track_caller]
    fn stop(mut self) {
        kill_process(self.example.pid(), Signal::TERM).expect("it runs");
        let status = self.example.child.wait().expect("ours");
        assert!(status.success(), "{status}");
    }

    fn client(&self) -> Client {
        Client::connect(&self.example.address)
    }

    /// Which process accepts.
    pub(crate) fn process(&self) -> u64 {
        self.metric("http_process_id")
    }

    /// A count, by its name.
    fn metric(&self, name: &str) -> u64 {
        let answer = Client::connect(&self.metrics)
            .ask("/metrics")
            .expect("answered");
        let text = String::from_utf8(answer.body).expect("text");
        let row = text.lines().find_map(|line| line.strip_prefix(name));
        let row = row.and_then(|value| value.trim().parse().ok());
        row.unwrap_or_else(|| panic!("no {name} in {text}"))
    }
}

struct Answer {
    status: String,
    headers: Vec<String>,
    body: Vec<u8>,
}

impl Answer {
    fn is_last(&self) -> bool {
        self.headers.iter().any(|line| line == "Connection: close")
    }
}

struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    #[track_caller]
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        let stream = BufReader::new(stream);
        Self { stream }
    }

    fn write(&mut self, text: &str) {
        self.stream
            .get_mut()
            .write_all(text.as_bytes())
            .expect("written");
    }

    fn ask(&mut self, target: &str) -> Option<Answer> {
        let request = format!("GET {target} HTTP/1.1\r\nHost: here\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).ok()?;
        self.answer(true)
    }

    /// The next answer, if it comes whole.
    fn answer(&mut self, has_body: bool) -> Option<Answer> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).ok()?;
            match line.strip_suffix("\r\n")? {
                "" => break,
                line => lines.push(line.to_owned()),
            }
        }
        let mut lines = lines.into_iter();
        let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.to_owned();
        let headers: Vec<String> = lines.collect();
        let length = headers
            .iter()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length?.parse().ok()?;
        let mut body = vec![0; if has_body { length } else { 0 }];
        self.stream.read_exact(&mut body).ok()?;
        Some(Answer {
            status,
            headers,
            body,
        })
    }
}

/// Processes that have taken over are nobody's children here: a failure would leave them.
impl Drop for Server {
    fn drop(&mut self) {
        let state = self.folder.path().join("state");
        let state = state.to_str().expect("text");
        for entry in fs::read_dir("/proc").expect("Linux has it").flatten() {
            let command = fs::read_to_string(entry.path().join("cmdline"));
            if command.is_ok_and(|command| command.contains(state))
                && let Ok(number) = entry.file_name().to_string_lossy().parse()
            {
                let _ = kill_process(pid(number), Signal::KILL);
            }
        }
    }
}

/// Has clients end when it goes, in a failure too.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// More than the buffers of a connection hold.
fn long() -> Vec<u8> {
    (0..3_000_000_u32)
        .map(|number| number.to_le_bytes()[0])
        .collect()
}

#[test]
fn http_answers_in_order_and_keeps_the_connection() {
    let files: [(&str, &[u8]); 3] = [
        ("index.html", b"<p>index"),
        ("a b.txt", b"text"),
        ("long", &long()),
    ];
    let server = Server::start(&files, "1");
    let mut client = server.client();
    let targets = ["/long", "/a%20b.txt", "/none", "/?query", "/long"];
    // All at once, and the last cut in the middle.
    let mut requests: String = targets
        .iter()
        .map(|target| format!("GET {target} HTTP/1.1\r\nHost: here\r\n\r\n"))
        .collect();
    let rest = requests.split_off(requests.len() - 10);
    client.write(&requests);
    client.write(&rest);
    let expected: [(&str, &[u8]); 5] = [
        ("200 OK", &long()),
        ("200 OK", b"text"),
        ("404 Not Found", b"404 Not Found\n"),
        ("200 OK", b"<p>index"),
        ("200 OK", &long()),
    ];
    for (target, (status, body)) in targets.iter().zip(expected) {
        let answer = client.answer(true).expect(target);
        assert_eq!(answer.status, status, "{target}");
        assert!(answer.body == body, "{target}: {} bytes", answer.body.len());
        assert!(!answer.is_last(), "{target}");
    }
    client.write("HEAD /long HTTP/1.1\r\nHost: here\r\n\r\n");
    assert_eq!(client.answer(false).expect("the head").status, "200 OK");
    client.write("GET / HTTP/1.1\r\nHost: here\r\nConnection: x, Close\r\n\r\n");
    assert!(client.answer(true).expect("the last").is_last());
    assert!(client.answer(true).is_none(), "it was closed");
    wait_until("the requests are counted", || {
        server.metric("http_requests_total") == 7
    });
    assert_eq!(server.metric("http_connections_total"), 1);
    server.stop();
}

#[test]
fn http_refuses_what_it_should_not_serve() {
    let server = Server::start(&[("index.html", b"index")], "1");
    let dots = "/..".repeat(3);
    let long = "x".repeat(20_000);
    let many = "X: y\r\n".repeat(65);
    let host = "Host: here\r\n";
    for (request, status) in [
        (format!("GET /../secret HTTP/1.1\r\n{host}\r\n"), "404"),
        (format!("GET /%2e%2e/secret HTTP/1.1\r\n{host}\r\n"), "404"),
        (format!("GET /%2e.%2Fsecret HTTP/1.1\r\n{host}\r\n"), "404"),
        (
            format!("GET {dots}/etc/passwd HTTP/1.1\r\n{host}\r\n"),
            "404",
        ),
        (format!("GET /%+1 HTTP/1.1\r\n{host}\r\n"), "404"),
        (format!("GET /%0 HTTP/1.1\r\n{host}\r\n"), "404"),
        ("GET / HTTP/1.1\r\n\r\n".into(), "400"),
        (format!("GET / HTTP/1.1\r\n{host}{host}\r\n"), "400"),
        ("nonsense\r\n\r\n".into(), "400"),
        (
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 0\r\n\r\n"),
            "405",
        ),
        (
            format!("GET / HTTP/1.1\r\n{host}Content-Length: 5\r\n\r\nhello"),
            "413",
        ),
        (
            format!("GET / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n"),
            "413",
        ),
        (format!("GET /{long} HTTP/1.1\r\n{host}\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{host}{many}\r\n"), "431"),
    ] {
        let mut client = server.client();
        client.write(&request);
        let answer = client.answer(true).expect(&request);
        let head = request.lines().next().expect("one");
        assert_eq!(answer.status.split(' ').next(), Some(status), "{head}");
        assert!(
            !String::from_utf8_lossy(&answer.body).contains("secret"),
            "{head}"
        );
        // Who is refused for more than its target is not asked again.
        assert_eq!(answer.is_last(), status != "404", "{head}");
    }
    server.stop();
}

#[test]
fn http_cuts_the_connection_where_a_file_became_shorter() {
    let server = Server::start(&[("long", &vec![7; 32 << 20])], "1");
    let mut client = server.client();
    client.write("GET /long HTTP/1.1\r\nHost: here\r\n\r\n");
    // It is being sent, and nobody reads.
    assert!(client.stream.fill_buf().is_ok_and(|some| !some.is_empty()));
    let file = File::options()
        .write(true)
        .open(server.folder.path().join("root/long"));
    file.and_then(|file| file.set_len(1)).expect("cut");
    let mut read = Vec::new();
    // The end, or a reset.
    let _ = client.stream.read_to_end(&mut read);
    assert!(read.len() < 32 << 20, "{} bytes", read.len());
    server.stop();
}

#[test]
fn http_loses_no_request_when_it_is_restarted_under_load() {
    const RESTARTS: usize = 3;
    let content = vec![b'x'; 100_000];
    let mut server = Server::start(&[("file", &content)], "2");
    let address = server.example.address.clone();
    let (ended, answers, lost) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let process = |server: &Server| server.process();
    thread::scope(|scope| {
        let ending = Ending(&ended);
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = Client::connect(&address);
                while !ended.load(Ordering::Relaxed) {
                    let answer = client.ask("/file").filter(|answer| answer.body == content);
                    match &answer {
                        Some(_) => answers.fetch_add(1, Ordering::Relaxed),
                        None => lost.fetch_add(1, Ordering::Relaxed),
                    };
                    if answer.is_none_or(|answer| answer.is_last()) {
                        client = Client::connect(&address);
                    }
                }
            });
        }
        for _ in 0..RESTARTS {
            let before = process(&server);
            kill_process(pid(before), Signal::HUP).expect("it runs");
            wait_until("another process serves", || process(&server) != before);
            // With the last client gone to the next, which was told to go there.
            let before = u32::try_from(before).expect("a process");
            wait_until("the one before ends", || !is_running(before));
        }
        drop(ending);
    });
    assert_eq!(lost.into_inner(), 0, "of {}", answers.into_inner());
    let last = process(&server);
    kill_process(pid(last), Signal::TERM).expect("it runs");
    let first = server.example.child.wait().expect("ours");
    assert!(first.success(), "{first}");
    let last = u32::try_from(last).expect("a process");
    wait_until("the last one ends", || !is_running(last));
}

#[test]
fn http_moves_connections_that_wait_when_it_is_restarted() {
    const CONNECTIONS: usize = 20;
    let mut server = Server::start(&[("file", b"content")], "2");
    let mut clients: Vec<Client> = (0..CONNECTIONS).map(|_| server.client()).collect();
    for client in &mut clients {
        assert!(!client.ask("/file").expect("answered").is_last());
        // The rest of it comes when another process is there.
        client.write("GET /fi");
    }
    let before = server.process();
    kill_process(pid(before), Signal::HUP).expect("it runs");
    wait_until("another process serves", || server.process() != before);
    let number = u32::try_from(before).expect("a process");
    // It would wait for those that it still has.
    wait_until("the one before ends", || !is_running(number));
    for (number, client) in clients.iter_mut().enumerate() {
        client.write("le HTTP/1.1\r\nHost: here\r\n\r\n");
        let answer = client.answer(true);
        let answer = answer.unwrap_or_else(|| panic!("connection {number} was lost"));
        assert_eq!(answer.status, "200 OK", "connection {number}");
        assert_eq!(answer.body, b"content", "connection {number}");
        assert!(!answer.is_last(), "connection {number} was told to go");
    }
    let last = server.process();
    kill_process(pid(last), Signal::TERM).expect("it runs");
    let first = server.example.child.wait().expect("ours");
    assert!(first.success(), "{first}");
    let last = u32::try_from(last).expect("a process");
    wait_until("the last one ends", || !is_running(last));
}

pub(crate) fn pid(number: u64) -> Pid {
    let number = i32::try_from(number).expect("a process");
    Pid::from_raw(number).expect("a process")
}
