//! What is inside of the example servers: `--inspect`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::eventually;
use crate::{DEADLINE, path_of};

/// A server that is killed at the end of its test.
struct Server(Child);

impl Server {
    fn start(name: &str, arguments: &[&str], stderr: Stdio) -> Self {
        let child = Command::new(path_of(name))
            .args(arguments)
            .env("INSPECT_SECRET", "0123456789abcdef")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn();
        Self(child.expect("starts"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The counts of the program behind a socket.
fn summary(socket: &Path) -> Result<Value, String> {
    let mut stream = UnixStream::connect(socket).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream
        .write_all(b"{\"get\":\"summary\"}\n")
        .map_err(|error| error.to_string())?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .map_err(|error| error.to_string())?;
    serde_json::from_str(&line).map_err(|error| format!("{error}: {line:?}"))
}

/// Those that are missing need a peer before they serve: Node for `node_worker`, HAProxy for
/// `haproxy_takeover`. They are with the tests of these (`tests/peers/examples.rs`).
#[test]
fn every_server_shows_on_a_socket_what_is_inside() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("made");
    let (certificate, key, image) = (at("certificate"), at("key"), at("image"));
    fs::write(&certificate, certified.cert.pem()).expect("written");
    fs::write(&key, certified.signing_key.serialize_pem()).expect("written");
    fs::write(&image, [0; 512]).expect("written");
    let (socket, file, state) = (at("socket"), at("file"), at("state"));
    let (here, local) = ("tcp:127.0.0.1:0", "127.0.0.1:0");
    let servers: &[(&str, &[&str])] = &[
        ("echo", &["--listen", here]),
        ("chat", &["--listen", here]),
        ("pubsub", &["--listen", here]),
        ("proxy", &["--listen", here, "--to", "tcp:127.0.0.1:9"]),
        (
            "starttls",
            &[
                "--listen",
                local,
                "--certificate",
                &certificate,
                "--key",
                &key,
            ],
        ),
        ("supervise", &["--children", "1", "--", "sleep", "60"]),
        ("syslog", &["--file", &file, "--udp", local]),
        ("shell", &["--socket", &socket]),
        (
            "vhost_user_blk",
            &["--socket", &at("disk"), "--image", &image],
        ),
        ("wayland_shm", &["--display", &at("display")]),
        (
            "varlink_files",
            &["--socket", &at("files"), "--serve", &at("")],
        ),
        (
            "chat_nats",
            &["--listen", here, "--nats", "tcp:127.0.0.1:9"],
        ),
        ("fd_holder", &["--path", &at("holder"), "--serve"]),
        ("prefork", &["--serve", "--listen", here, "--workers", "1"]),
        (
            "http",
            &[
                "--root",
                &at(""),
                "--listen",
                here,
                "--workers",
                "1",
                "--state",
                &state,
            ],
        ),
        ("hot_restart", &["--serve", "--directory", &at("control")]),
    ];
    for (name, arguments) in servers {
        let place = folder.path().join(format!("{name}.inspect"));
        let path = place.display().to_string();
        let arguments = [*arguments, &["--inspect", &path]].concat();
        let server = Server::start(name, &arguments, Stdio::inherit());
        let summary = eventually(DEADLINE, || {
            summary(&place).map_err(|error| format!("{name}: {error}"))
        });
        assert_eq!(summary["pid"], server.0.id(), "{name}: {summary}");
        let has_part = |part: &str| {
            let parts = summary["parts"].as_array().into_iter().flatten();
            parts.into_iter().any(|it| it["name"] == part)
        };
        assert_eq!(
            has_part("Pool"),
            ["prefork", "http"].contains(name),
            "{name}: {summary}"
        );
        assert_eq!(
            has_part("Restart"),
            ["http", "hot_restart"].contains(name),
            "{name}"
        );
    }
}

#[test]
fn a_server_says_where_its_page_is_and_keeps_to_the_secret_of_its_environment() {
    for (name, arguments) in [
        ("echo", &["--listen", "tcp:127.0.0.1:0"][..]),
        ("hot_restart", &["--serve", "--directory"][..]),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let control = folder.path().join("control").display().to_string();
        let mut arguments = arguments.to_vec();
        if name == "hot_restart" {
            arguments.push(&control);
        }
        arguments.extend(["--inspect", "127.0.0.1:0"]);
        let mut server = Server::start(name, &arguments, Stdio::piped());
        let mut said = BufReader::new(server.0.stderr.take().expect("piped"));
        let mut line = String::new();
        said.read_line(&mut line).expect("text");
        let rest = line.trim_end().strip_prefix("look inside at http://");
        let address = rest.and_then(|rest| rest.strip_suffix("/0123456789abcdef/"));
        let address = address.unwrap_or_else(|| panic!("{name} says {line:?}"));
        for (path, status) in [("/0123456789abcdef/", "200"), ("/0123456789abcdee/", "404")] {
            let mut stream = TcpStream::connect(address).expect("it listens");
            stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
            write!(stream, "GET {path} HTTP/1.1\r\nHost: it\r\n\r\n").expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("text");
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{name}{path}: {answer}"
            );
        }
    }
}

#[test]
fn a_place_that_makes_no_sense_is_said() {
    let arguments = ["--listen", "tcp:127.0.0.1:0", "--inspect", "nowhere"];
    let output = Command::new(path_of("echo"))
        .args(arguments)
        .output()
        .expect("starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("nowhere"),
        "{text}"
    );
}
