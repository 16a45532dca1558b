//! The servers with TLS on them, asked by programs that nobody here wrote.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use rustix::process::{Signal, kill_process};

use crate::http;
use crate::support::peers::has_program;
use crate::{Example, is_running, row_of, run_to_end, wait_until};

/// Whether this program is there; see [`has_program`].
#[track_caller]
fn has(program: &str, argument: &str) -> bool {
    // Their packages have the same names.
    has_program(program, argument, program)
}

/// A certificate for localhost that certifies itself, and its key.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a folder");
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]);
        let certified = certified.expect("made");
        let this = Self { directory };
        fs::write(this.path("cert"), certified.cert.pem()).expect("written");
        let key = certified.signing_key.serialize_pem();
        fs::write(this.path("key"), key).expect("written");
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("text").to_owned()
    }

    fn tls(&self) -> [String; 3] {
        ["--tls".into(), self.text("cert"), self.text("key")]
    }
}

fn start(name: &str, arguments: &[&str], tls: &[String]) -> Example {
    let tls = tls.iter().map(String::as_str);
    let arguments: Vec<_> = arguments.iter().copied().chain(tls).collect();
    Example::start(name, &arguments)
}

/// What s_client says to a line.
fn s_client(address: &str, files: &Files, arguments: &[&str], line: &str) -> String {
    let mut command = Command::new("openssl");
    command.args([
        "s_client",
        "-servername",
        "localhost",
        "-verify_return_error",
    ]);
    command.arg("-CAfile").arg(files.path("cert"));
    command.args(["-connect", address]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(line.as_bytes()).expect("written");
    // It ends when its server does, or at the end of its input.
    drop(stdin);
    let Output { stdout, stderr, .. } = child.wait_with_output().expect("ends");
    String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned()
}

/// What an echo server says to a line.
fn echoed(address: &str, files: &Files, line: &str) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-quiet", "-verify_return_error"]);
    command.arg("-CAfile").arg(files.path("cert"));
    command.args(["-connect", address]).stdin(Stdio::piped());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(line.as_bytes()).expect("written");
    let mut said = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut said).expect("text");
    let _ = child.kill();
    let _ = child.wait();
    said
}

#[test]
fn echo_is_secured_by_a_string_or_by_its_files() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    let (cert, key) = (files.text("cert"), files.text("key"));
    let string = format!("tls:127.0.0.1:0:cert={cert}:key={key}");
    let by_string = start("echo", &["--listen", &string], &[]);
    let by_files = start("echo", &["--listen", "tcp:127.0.0.1:0"], &files.tls());
    for echo in [&by_string, &by_files] {
        let said = echoed(&echo.address, &files, "hello there\n");
        assert_eq!(said, "hello there\n");
    }
    by_string.stop();
    by_files.stop();
}

#[test]
fn what_is_wrong_with_a_string_or_its_files_is_said() {
    let files = Files::new();
    let cert = files.text("cert");
    for (listen, tls, wanted) in [
        (
            "tls:0:key=x".to_owned(),
            vec![],
            "cert is missing, at column",
        ),
        (format!("tls:0:cert={cert}"), vec![], "key is missing"),
        (
            format!("tls:0:cert={cert}:key=/nowhere"),
            vec![],
            "cannot load /nowhere",
        ),
        (
            format!("tls:x:cert={cert}:key={cert}"),
            vec![],
            "\"x\" is no port",
        ),
        (
            "tcp:0".into(),
            vec!["--tls", &cert],
            "--tls needs CERT and KEY",
        ),
        (
            "tcp:0".into(),
            vec!["--tls", "/nowhere", &cert],
            "cannot load /nowhere",
        ),
    ] {
        let arguments = [&["--listen", &listen], &tls[..]].concat();
        let output = Command::new(crate::path_of("echo"))
            .args(arguments)
            .output();
        let output = output.expect("starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(wanted),
            "{listen}: {text}"
        );
    }
}

/// Any worker goes on with a session that another has begun: their tickets have one key.
#[test]
fn sessions_go_on_at_whichever_worker_of_a_pool() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    let arguments = ["--serve", "--workers", "3", "--listen", "tcp:127.0.0.1:0"];
    let prefork = start("prefork", &arguments, &files.tls());
    let request = "GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
    let session = files.text("session");
    let arguments = ["-quiet", "-ign_eof", "-sess_out", &session];
    let said = s_client(&prefork.address, &files, &arguments, request);
    assert!(said.contains("200 OK"), "{said}");
    let mut workers = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let arguments = ["-ign_eof", "-sess_in", &session];
        let said = s_client(&prefork.address, &files, &arguments, request);
        assert!(said.contains("Reused, TLSv1.3"), "{said}");
        let worker = said.lines().find(|line| line.starts_with("process "));
        workers.insert(worker.expect("an answer").to_owned());
    }
    assert!(workers.len() > 1, "{workers:?}");
    prefork.stop();
}

fn curl(files: &Files, address: &str, count: usize) -> String {
    let mut command = curl_command(files, address, count, "/dev/null");
    let output = command.output().expect("starts");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Fetches the page so often into there, and says of each how it went, on standard error.
fn curl_command(files: &Files, address: &str, count: usize, output: &str) -> Command {
    let port = address.rsplit(':').next().expect("a port");
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        "--max-time",
        "20",
    ]);
    command.args(["--resolve", &format!("localhost:{port}:127.0.0.1")]);
    command.args([
        "--write-out",
        "%{stderr}%{http_code} %{size_download} %{num_connects}\n",
    ]);
    command.arg("--cacert").arg(files.path("cert"));
    for _ in 0..count {
        command.args(["--output", output]);
        command.arg(format!("https://localhost:{port}/page"));
    }
    command
}

/// And its successor serves at the same port.
#[test]
fn curl_fetches_pages_from_http_before_and_after_a_restart() {
    if !has("curl", "--version") {
        return;
    }
    let files = Files::new();
    let page = vec![b'p'; 300_000];
    let tls = files.tls();
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let http = http::Server::start_with(&[("page", &page)], "2", &tls);
    let wanted = "200 300000 1\n200 300000 0\n200 300000 0\n";
    assert_eq!(curl(&files, &http.example.address, 3), wanted);
    let first = http.process();
    kill_process(http::pid(first), Signal::HUP).expect("it runs");
    wait_until("another process serves", || http.process() != first);
    assert_eq!(curl(&files, &http.example.address, 3), wanted);
    kill_process(http::pid(http.process()), Signal::TERM).expect("it runs");
}

/// Its connection is kept from page to page, and told to end where its process does.
#[test]
fn curl_gets_every_page_while_http_restarts() {
    if !has("curl", "--version") {
        return;
    }
    let files = Files::new();
    let (size, pages, restarts) = (100_000, 200, 3);
    let page = vec![b'p'; size];
    let tls = files.tls();
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let http = http::Server::start_with(&[("page", &page)], "2", &tls);
    let mut command = curl_command(&files, &http.example.address, pages, "/dev/null");
    // So that it is still at it after the last restart.
    command.args(["--limit-rate", "5M"]);
    let mut client = command.stderr(Stdio::piped()).spawn().expect("starts");
    for _ in 0..restarts {
        let process = http.process();
        kill_process(http::pid(process), Signal::HUP).expect("it runs");
        wait_until("another process serves", || http.process() != process);
    }
    let was_at_it = client.try_wait().expect("a child").is_none();
    let output = client.wait_with_output().expect("a child");
    let said = String::from_utf8(output.stderr).expect("text");
    let whole = format!("200 {size} ");
    let fetched = said.lines().filter(|line| line.starts_with(&whole)).count();
    assert_eq!(fetched, pages, "{said}");
    let connections = said.lines().filter(|line| line.ends_with(" 1")).count();
    assert!(connections <= 1 + restarts, "{connections} connections");
    assert!(was_at_it, "no page was fetched after a restart");
    kill_process(http::pid(http.process()), Signal::TERM).expect("it runs");
}

/// One connection, of whose moves its client learns nothing. It is idle at each of them:
/// curl has asked for a page and got it, and cannot write all of it to its full pipe.
#[test]
fn curl_keeps_its_connection_while_http_restarts() {
    if !has("curl", "--version") {
        return;
    }
    let files = Files::new();
    let (size, restarts) = (100_000, 3);
    let page = vec![b'p'; size];
    let tls = files.tls();
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let http = http::Server::start_with(&[("page", &page)], "2", &tls);
    let mut command = curl_command(&files, &http.example.address, restarts + 1, "-");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = command.spawn().expect("starts");
    let mut pages = client.stdout.take().expect("a pipe");
    let mut read = vec![0; size];
    for _ in 0..restarts {
        pages.read_exact(&mut read[..1]).expect("it has begun");
        let process = http.process();
        kill_process(http::pid(process), Signal::HUP).expect("it runs");
        wait_until("another process serves", || http.process() != process);
        wait_until("it is gone", || {
            !is_running(u32::try_from(process).expect("a process"))
        });
        pages.read_exact(&mut read[1..]).expect("all of it");
        assert!(read == page, "another page");
    }
    pages.read_exact(&mut read).expect("the last");
    let output = client.wait_with_output().expect("a child");
    let said = String::from_utf8(output.stderr).expect("text");
    let later = format!("200 {size} 0\n").repeat(restarts);
    assert_eq!(said, format!("200 {size} 1\n{later}"));
    kill_process(http::pid(http.process()), Signal::TERM).expect("it runs");
}

/// A connection with TLS that is open for longer.
struct Held {
    client: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Held {
    fn open(files: &Files, address: &str) -> Self {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-verify_return_error"]);
        command.args(["-servername", "localhost", "-connect", address]);
        command.arg("-CAfile").arg(files.path("cert"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = command.stderr(Stdio::null()).spawn().expect("starts");
        let input = client.stdin.take().expect("a pipe");
        let output = client.stdout.take().expect("a pipe");
        Self {
            client,
            input,
            output: BufReader::new(output),
        }
    }

    fn write(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).expect("written");
    }

    /// An answer whose body is one line; nothing if the connection has ended.
    fn answer(&mut self) -> String {
        let (mut answer, mut is_in_body) = (String::new(), false);
        loop {
            let begin = answer.len();
            if self.output.read_line(&mut answer).expect("text") == 0 || is_in_body {
                return answer;
            }
            is_in_body = &answer[begin..] == "\r\n";
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// Pools, restarts and moves together, with TLS: its process ends, and the connection goes
/// on, in the middle of a request.
#[test]
fn http_moves_secured_connections_when_it_is_restarted() {
    if !has("openssl", "version") {
        return;
    }
    let files = Files::new();
    let tls = files.tls();
    let tls: Vec<_> = tls.iter().map(String::as_str).collect();
    let http = http::Server::start_with(&[("file", b"content\n")], "2", &tls);
    let mut clients: Vec<Held> = (0..6)
        .map(|_| Held::open(&files, &http.example.address))
        .collect();
    let rest = "le HTTP/1.1\r\nHost: here\r\n\r\n";
    for client in &mut clients {
        client.write(&format!("GET /fi{rest}"));
        assert!(client.answer().ends_with("\r\n\r\ncontent\n"));
        // The rest of it comes when another process is there.
        client.write("GET /fi");
    }
    let before = http.process();
    kill_process(http::pid(before), Signal::HUP).expect("it runs");
    wait_until("another process serves", || http.process() != before);
    let number = u32::try_from(before).expect("a process");
    // It would wait for those that it still has.
    wait_until("the one before ends", || !is_running(number));
    for (number, client) in clients.iter_mut().enumerate() {
        client.write(rest);
        let answer = client.answer();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n"),
            "connection {number} was lost"
        );
        assert!(answer.ends_with("\r\n\r\ncontent\n"), "{number}: {answer}");
        assert!(!answer.contains("Connection: close"), "{number}: {answer}");
    }
    kill_process(http::pid(http.process()), Signal::TERM).expect("it runs");
}

/// Reliability T-31: with TLS, which this example makes a certificate for.
#[test]
fn hot_restart_moves_secured_connections_of_its_own_load() {
    let size = ["--restarts", "3", "--connections", "500", "--move", "--tls"];
    let output = run_to_end("hot_restart", &size);
    let said = String::from_utf8(output.stdout).expect("text");
    let count = |name: &str| row_of(&said, name) as usize;
    assert_eq!(count("failures"), 0, "{said}");
    assert_eq!(count("restarts"), 3, "{said}");
    assert!(count("connections moved") > 0, "{said}");
}
