//! The programs of the README and of the guide, as whoever copies them runs them:
//! twice in a row, each ended with SIGTERM.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::DescriptorLedger;

/// How long a step may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The blocks of code of a page, each behind what its fence says.
fn blocks(page: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join(page)).unwrap();
    // Every second piece is between two fences.
    let inside = text.split("\n```").skip(1).step_by(2);
    inside
        .map(|block| block.split_once('\n').expect("a block"))
        .map(|(fence, code)| (fence.to_owned(), code.to_owned()))
        .collect()
}

/// The only block of code that contains `mark`, with what the page hides.
fn program(page: &str, mark: &str) -> String {
    let blocks = blocks(Path::new(page));
    let mut found = blocks.iter().filter(|(_, code)| code.contains(mark));
    let (_, code) = found.next().expect("it has it");
    assert!(found.next().is_none(), "several contain {mark}");
    let shown = |line: &str| {
        line.trim_start()
            .strip_prefix("# ")
            .unwrap_or(line)
            .trim_end_matches('#')
            .to_owned()
    };
    let code: Vec<String> = code.lines().map(shown).collect();
    let code = code.join("\n");
    match code.contains("fn main()") {
        true => code,
        // As rustdoc does.
        false => format!("fn main() -> Result<(), Box<dyn std::error::Error>> {{\n{code}\n}}"),
    }
}

/// Compiles a program against the library that this test was built with.
fn compile(code: &str, directory: &Path) -> PathBuf {
    match try_to_compile(code, directory) {
        Ok(program) => program,
        Err(errors) => panic!("{}", errors.last().expect("the library is built")),
    }
}

/// What the compiler said otherwise, by each library that there is.
fn try_to_compile(code: &str, directory: &Path) -> Result<PathBuf, Vec<String>> {
    let (source, program) = (directory.join("program.rs"), directory.join("program"));
    fs::write(&source, code).unwrap();
    let executable = std::env::current_exe().unwrap();
    let deps = executable.parent().unwrap();
    let mut libraries: Vec<(SystemTime, PathBuf)> = fs::read_dir(deps)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("libbowline-") && name.ends_with(".rlib")
        })
        .map(|path| (fs::metadata(&path).unwrap().modified().unwrap(), path))
        .collect();
    libraries.sort();
    let mut errors = Vec::new();
    // Others are of other features; the one of this test may not be the last.
    for (_, library) in libraries.iter().rev() {
        let output = Command::new("rustc")
            .args(["--edition=2024", "--crate-name=program", "-o"])
            .args([&program, &source])
            .arg("--extern")
            .arg(format!("bowline={}", library.display()))
            .arg("-L")
            .arg(format!("dependency={}", deps.display()))
            .args(["--cfg", "feature=\"signals\""])
            .output()
            .expect("rustc");
        if output.status.success() {
            return Ok(program);
        }
        errors.push(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Err(errors)
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// A client of either kind.
trait Client: Read + Write {}
impl Client for UnixStream {}
impl Client for TcpStream {}

/// The children of a process, as the kernel shows them.
fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let listed = listed.unwrap_or_default();
    let numbers = listed.split_whitespace();
    numbers.map(|pid| pid.parse().unwrap()).collect()
}

/// Where a process listens for TCP.
fn port(pid: u32) -> Option<u16> {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let inode = fields.nth(5)?;
        let is_its = state == "0A" && sockets.contains(&format!("socket:[{inode}]"));
        let (_, port) = local.split_once(':')?;
        is_its.then(|| u16::from_str_radix(port, 16).ok())?
    })
}

/// Whether a process that is not our child is there and has not ended.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The state is behind the name.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some(None | Some('Z' | 'X')))
}

/// Runs a server, has an echo of it, ends it while the client is there.
fn run(program: &Path, connect: impl Fn(&Child) -> Option<Box<dyn Client>>) {
    let mut child: Child = Command::new(program).spawn().unwrap();
    let mut client = until("it does not listen", || {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        connect(&child)
    });
    let mut answer = [0; 5];
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    let workers = children(child.id());
    client.write_all(b"again").unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"again", "what had arrived is answered");
    let status = until("it does not end", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    for worker in workers {
        until("it leaves a worker behind", || {
            (!runs(worker)).then_some(())
        });
    }
}

/// Compiles a program of a page and has it tried twice in a row.
fn twice(
    page: &str,
    mark: &str,
    change: impl FnOnce(String, &str) -> String,
    once: impl Fn(&Path, &Path),
) {
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let code = change(program(page, mark), path);
    let program = compile(&code, directory.path());
    for _ in 0..2 {
        once(&program, directory.path());
    }
    drop(directory);
    ledger.assert_balanced();
}

fn over_unix(program: &Path, socket: &Path) {
    run(program, |_| {
        Some(Box::new(UnixStream::connect(socket).ok()?))
    });
    assert!(!socket.exists(), "it has left its socket");
}

fn over_tcp(program: &Path) {
    run(program, |child| {
        let address = ("127.0.0.1", port(child.id())?);
        Some(Box::new(TcpStream::connect(address).ok()?))
    });
}

/// Puts each of `to` for what stands before it.
fn replaced(code: String, changes: &[(&str, &str)]) -> String {
    let change = |code: String, (from, to): &(&str, &str)| {
        assert!(code.contains(from), "{from}");
        code.replace(from, to)
    };
    changes.iter().fold(code, change)
}

#[test]
fn smallest_program_of_the_readme_runs_twice() {
    let change = |code, path: &str| {
        let socket = format!("{path}/echo.sock");
        replaced(code, &[("7007", "0"), ("/tmp/echo.sock", &socket)])
    };
    twice("README.md", "/tmp/echo.sock", change, |program, at| {
        over_unix(program, &at.join("echo.sock"));
        // The same program, at its other door.
        over_tcp(program);
    });
}

#[test]
fn program_of_the_readme_that_passes_a_file_runs_twice() {
    let same = |code, _: &str| code;
    twice("README.md", "struct Sender;", same, |program, _| {
        let output = Command::new(program).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.trim_end(), "your file: program");
    });
}

#[test]
fn program_of_the_guide_with_workers_runs_twice() {
    let change = |code, _: &str| replaced(code, &[("8080", "0")]);
    twice("src/guide/pools.md", "fn main()", change, |program, _| {
        over_tcp(program);
    });
}

#[test]
fn program_of_the_guide_that_can_be_restarted_runs_twice() {
    let change = |code, path: &str| {
        let changes = [
            ("[0, 0, 0, 0], 7)", "[127, 0, 0, 1], 0)"),
            ("/run/echo", path),
        ];
        replaced(code, &changes)
    };
    let page = "src/guide/restarts.md";
    twice(page, "/run/echo/socket", change, |program, at| {
        over_unix(program, &at.join("socket"));
    });
}

/// Starts a program at a port of its own, has it talked to, and ends it meanwhile.
fn at_a_port(program: &Path, folder: &Path, talk: impl Fn(&mut dyn FnMut() -> TcpStream, &Child)) {
    let mut child = Command::new(program)
        .arg("tcp:host=127.0.0.1:port=0")
        .current_dir(folder)
        .env("RUNTIME_DIRECTORY", folder.join("run"))
        .spawn()
        .unwrap();
    let here = until("it does not listen", || {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        port(child.id())
    });
    let mut connect = || {
        let client = TcpStream::connect(("127.0.0.1", here)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    };
    talk(&mut connect, &child);
    let status = until("it does not end", || child.try_wait().unwrap());
    assert!(status.success(), "{status}");
}

fn terminate(child: &Child) {
    kill_process(Pid::from_child(child), Signal::TERM).unwrap();
}

/// The next line of a client.
fn line(client: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\n") && client.read(&mut byte).unwrap() > 0 {
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// The answer to a request: its head, and what follows.
fn http(client: &mut TcpStream, target: &str) -> (String, String) {
    let request = format!("GET {target} HTTP/1.1\r\nHost: here\r\n\r\n");
    client.write_all(request.as_bytes()).unwrap();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let next = line(client);
        assert!(!next.is_empty(), "it ends behind {head:?}");
        head.push_str(&next);
    }
    let length = head.split("Content-Length: ").nth(1).unwrap();
    let length = length.lines().next().unwrap().parse().unwrap();
    let mut body = vec![0; length];
    client.read_exact(&mut body).unwrap();
    (head, String::from_utf8(body).unwrap())
}

#[test]
fn program_of_the_guide_with_a_room_runs_twice() {
    let same = |code, _: &str| code;
    twice("src/guide/chat.md", "fn main()", same, |program, at| {
        at_a_port(program, at, |connect, child| {
            let (mut ann, mut bob) = (connect(), connect());
            for (client, name) in [(&mut ann, "ann"), (&mut bob, "bob")] {
                assert_eq!(line(client), "* who are you?\n");
                client.write_all(format!("{name}\n").as_bytes()).unwrap();
                assert_eq!(line(client), format!("* welcome, {name}\n"));
            }
            assert_eq!(line(&mut ann), "* bob has joined\n");
            bob.write_all(b"hello\r\n").unwrap();
            assert_eq!(line(&mut ann), "bob: hello\n");
            terminate(child);
            assert_eq!(line(&mut bob), "* the room closes\n");
        });
    });
}

#[test]
fn program_of_the_guide_that_serves_files_runs_twice() {
    let same = |code, _: &str| code;
    twice("src/guide/http.md", "fn main()", same, |program, at| {
        fs::write(at.join("page"), "x".repeat(1_000_000)).unwrap();
        at_a_port(program, at, |connect, child| {
            let mut client = connect();
            for _ in 0..2 {
                let (head, body) = http(&mut client, "/page");
                assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
                assert_eq!(body.len(), 1_000_000);
            }
            for target in ["/none", "/../page", "//etc/passwd", "/"] {
                let (head, _) = http(&mut client, target);
                assert!(head.starts_with("HTTP/1.1 404"), "{target}: {head}");
            }
            // Half of a request is waited for, and is the last one.
            client.write_all(b"GET /page HT").unwrap();
            terminate(child);
            until("it listens on", || port(child.id()).is_none().then_some(()));
            client.write_all(b"TP/1.1\r\n\r\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("Connection: close") && answer.len() > 1_000_000);
        });
    });
}

#[test]
fn program_of_the_guide_with_workers_that_can_be_restarted_runs_twice() {
    let same = |code, _: &str| code;
    twice("src/guide/services.md", "fn main()", same, |program, at| {
        at_a_port(program, at, |connect, child| {
            let mut client = connect();
            let (_, body) = http(&mut client, "/");
            let workers = children(child.id());
            let served = body
                .trim()
                .strip_prefix("process ")
                .unwrap()
                .parse()
                .unwrap();
            assert!(workers.contains(&served), "{served} of {workers:?}");
            terminate(child);
            until("it listens on", || port(child.id()).is_none().then_some(()));
            drop(client);
            for worker in workers {
                until("it leaves a worker behind", || {
                    (!runs(worker)).then_some(())
                });
            }
        });
    });
}

/// The chapters of the guide, in order.
fn chapters() -> Vec<String> {
    let guide = fs::read_to_string(root().join("src/guide.rs")).unwrap();
    let modules = guide
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod "));
    modules
        .map(|line| line.trim_end_matches(" {}").to_owned())
        .collect()
}

#[test]
fn every_chapter_leads_on_and_back() {
    let _ledger = DescriptorLedger::open();
    let chapters = chapters();
    let guide = fs::read_to_string(root().join("src/guide.rs")).unwrap();
    for (number, chapter) in chapters.iter().enumerate() {
        let path = root().join(format!("src/guide/{chapter}.md"));
        let text = fs::read_to_string(path).unwrap();
        let (_, end) = text.rsplit_once("\n---\n").expect(chapter);
        let link = |to: usize| format!("](crate::guide::{})", chapters[to]);
        let mut wanted = vec!["(crate::guide)".to_owned()];
        wanted.extend((number > 0).then(|| "[Before: ".to_owned()));
        wanted.extend((number > 0).then(|| link(number - 1)));
        wanted.extend((number + 1 < chapters.len()).then(|| link(number + 1)));
        for link in wanted {
            assert!(end.contains(&link), "{chapter} has no {link}");
        }
        let listed = format!("//! {}. [", number + 1);
        let line = guide.lines().find(|line| line.starts_with(&listed));
        let line = line.expect(chapter);
        assert!(
            line.ends_with(&format!("]({chapter})")),
            "{line} is not {chapter}"
        );
    }
    let files = fs::read_dir(root().join("src/guide")).unwrap().count();
    assert_eq!(files, chapters.len(), "a chapter is in no list");
}

/// A map is of use while it can be taken in at a glance.
#[test]
fn front_page_has_at_most_forty_names() {
    let _ledger = DescriptorLedger::open();
    let page = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let map = page.split("//! # By task").nth(1).unwrap();
    let map = map.split("\n//! #").next().unwrap();
    let rows = map.lines().filter(|line| line.starts_with("//! |"));
    let names: usize = rows
        .map(|row| row.matches('`').count() / 2 - row.matches("(feature").count())
        .sum();
    assert!((20..=40).contains(&names), "{names} names");
}

/// All pages of documentation: their paths, and their lines.
fn pages() -> Vec<(PathBuf, Vec<String>)> {
    let mut folders: Vec<PathBuf> = ["src", "reactor/src", "protocol/src", "transport/src"]
        .into_iter()
        .chain(["handoff/src", "tls/src", "inspect/src", "peers/src"])
        .map(|folder| root().join(folder))
        .collect();
    let mut pages = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            match extension {
                None if path.is_dir() && !path.ends_with("tests") => folders.push(path),
                Some("md" | "rs") => {
                    let text = fs::read_to_string(&path).unwrap();
                    pages.push((path, text.lines().map(str::to_owned).collect()));
                }
                _ => {}
            }
        }
    }
    pages
}

/// A line without where its links to the web lead.
fn without_addresses(line: &str) -> String {
    let mut parts = line.split("](http");
    let first = parts.next().unwrap_or_default().to_owned();
    let rest = parts.filter_map(|part| part.split_once(')'));
    rest.fold(first, |text, (_, behind)| text + "]" + behind)
}

#[test]
fn documentation_names_no_file_that_readers_do_not_have() {
    let _ledger = DescriptorLedger::open();
    let theirs = [
        "examples/",
        "tests/",
        "benches/",
        "ARCHITECTURE",
        "CONTRIBUTING",
        ".ci/",
    ];
    for (path, lines) in pages() {
        let is_page = path.extension().is_some_and(|extension| extension == "md");
        for line in lines {
            // A file of others that an address leads to is there for everybody.
            let text = without_addresses(line.trim_start());
            let is_documentation = is_page || text.starts_with("///") || text.starts_with("//!");
            let named = theirs.iter().find(|file| text.contains(**file));
            assert!(
                !is_documentation || named.is_none(),
                "{}: {text}",
                path.display()
            );
        }
    }
}

/// What needs a feature says so on its own page: `doc(cfg)` is not to be had of a stable
/// compiler.
#[test]
fn items_that_need_a_feature_say_so() {
    let _ledger = DescriptorLedger::open();
    let facade = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let reexported = facade.split("pub mod testing {").nth(1).unwrap();
    let (reexported, _) = reexported.split_once("\n}\n").unwrap();
    let named = |text: &str, name: &str| {
        let mut words = text.split(|it: char| !it.is_alphanumeric() && it != '_');
        words.any(|word| word == name)
    };
    let mut seen = 0;
    for (path, lines) in pages() {
        let path = path.strip_prefix(root()).unwrap().display().to_string();
        let feature = if path.contains("/src/testing/") {
            "testing"
        } else if path.starts_with("tls/src/") {
            "tls"
        } else if path == "reactor/src/signals.rs" {
            "signals"
        } else {
            continue;
        };
        let exports = fs::read_to_string(root().join("tls/src/lib.rs")).unwrap();
        for (number, line) in lines.iter().enumerate() {
            let item = line.strip_prefix("pub ").or_else(|| match feature {
                "signals" => line.trim_start().strip_prefix("pub "),
                _ => None,
            });
            let Some((kind, rest)) = item.and_then(|item| item.split_once(' ')) else {
                continue;
            };
            let name = rest
                .split(|it: char| !it.is_alphanumeric() && it != '_')
                .next();
            let name = name.unwrap_or_default();
            let is_shown = match feature {
                "testing" => named(reexported, name),
                "tls" => named(&exports, name) || path.ends_with("config.rs"),
                _ => true,
            };
            if !is_shown || !["struct", "enum", "trait", "fn", "type", "const"].contains(&kind) {
                continue;
            }
            let above = lines[..number].iter().rev();
            let above = above.take_while(|line| !line.is_empty() && !line.starts_with('}'));
            let says = |line: &String| line.contains(&format!("Feature `{feature}"));
            assert!(
                above.clone().any(says),
                "{path}: {name} does not say `{feature}`"
            );
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} were looked at");
}

/// Whoever looks for a name of Twisted's finds it in the chapter: those of the interfaces
/// of streams, datagrams, processes and endpoints (`twisted.internet.interfaces`, of 24.11).
#[test]
fn every_public_name_of_twisted_has_its_row() {
    const NAMES: &str = "
        write writeSequence loseConnection getPeer getHost loseWriteConnection abortConnection
        getTcpNoDelay setTcpNoDelay getTcpKeepAlive setTcpKeepAlive sendFileDescriptor
        fileDescriptorReceived stopListening startListening stopConnecting disconnect connect
        getDestination makeConnection connectionMade dataReceived connectionLost
        readConnectionLost writeConnectionLost buildProtocol doStart doStop
        clientConnectionFailed clientConnectionLost startedConnecting registerProducer
        unregisterProducer pauseProducing resumeProducing stopProducing listenTCP connectTCP
        listenUNIX connectUNIX listenUNIXDatagram connectUNIXDatagram listenUDP
        listenMulticast listenSSL connectSSL adoptStreamPort adoptStreamConnection
        adoptDatagramPort datagramReceived connectionRefused startProtocol stopProtocol
        setBroadcastAllowed getBroadcastAllowed joinGroup leaveGroup setTTL getTTL
        setLoopbackMode getLoopbackMode setOutgoingInterface getOutgoingInterface
        spawnProcess childFDs usePTY childDataReceived childConnectionLost processExited
        processEnded outReceived errReceived inConnectionLost outConnectionLost
        errConnectionLost pid closeStdin closeStdout closeStderr closeChildFD writeToChild
        signalProcess serverFromString clientFromString quoteStringArgument
        TCP4ServerEndpoint TCP6ServerEndpoint UNIXServerEndpoint AdoptedStreamServerEndpoint
        SSL4ServerEndpoint TCP4ClientEndpoint TCP6ClientEndpoint UNIXClientEndpoint
        SSL4ClientEndpoint HostnameEndpoint StandardIOEndpoint ProcessEndpoint wrapClientTLS
        connectProtocol IStreamServerEndpointStringParser
        IStreamClientEndpointStringParserWithReactor startTLS getPeerCertificate
        negotiatedProtocol lineReceived rawDataReceived sendLine lineLengthExceeded
        setRawMode setLineMode stringReceived sendString callLater callWhenRunning
        callFromThread addSystemEventTrigger removeSystemEventTrigger fireSystemEvent
        addReader addWriter removeReader removeWriter removeAll getReaders getWriters
        getDelayedCalls seconds cancel reset delay getTime active resolve logPrefix";
    let _ledger = DescriptorLedger::open();
    let chapter = fs::read_to_string(root().join("src/guide/twisted.md")).unwrap();
    let rows: Vec<&str> = chapter
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .flat_map(|cell| cell.split(|it: char| !it.is_alphanumeric() && it != '_'))
        .collect();
    let missing: Vec<&str> = NAMES
        .split_whitespace()
        .filter(|name| !rows.contains(name))
        .collect();
    assert!(missing.is_empty(), "no row has {missing:?}");
}

/// Says why, and ends with a failure, where another program has its port.
#[test]
fn programs_that_cannot_listen_say_why_and_end_with_a_failure() {
    let ledger = DescriptorLedger::open();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let here = format!("[127, 0, 0, 1], {port})");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let programs = [
        (
            "README.md",
            "/tmp/echo.sock",
            vec![("7007", &*port), ("/tmp", path)],
        ),
        ("src/guide/pools.md", "fn main()", vec![("8080", &*port)]),
        (
            "src/guide/restarts.md",
            "/run/echo/socket",
            vec![("[0, 0, 0, 0], 7)", &*here), ("/run/echo", path)],
        ),
    ];
    for (page, mark, changes) in programs {
        let code = replaced(program(page, mark), &changes);
        let program = compile(&code, directory.path());
        let output = Command::new(program).output().unwrap();
        assert!(!output.status.success(), "{page}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("ddress already in use"), "{page}: {said}");
    }
    drop((taken, directory));
    ledger.assert_balanced();
}

/// Programs that rustdoc does not run, and those that are whole, are run here: whoever
/// adds one finds no test of it, and writes it.
#[test]
fn every_whole_program_has_its_test() {
    // Not while another test counts descriptors.
    let _ledger = DescriptorLedger::open();
    let guide = fs::read_dir(root().join("src/guide")).unwrap();
    let mut pages: Vec<PathBuf> = guide.map(|entry| entry.unwrap().path()).collect();
    pages.push("README.md".into());
    let mut found = Vec::new();
    for page in &pages {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        for (fence, code) in blocks(page) {
            if fence.contains("no_run") || code.contains("fn main()") {
                let mark = code.lines().find(|line| line.contains("struct "));
                found.push(format!("{name}: {}", mark.unwrap_or("settings only")));
            }
        }
    }
    found.sort();
    let tested = [
        "README.md: struct Echo;",
        "README.md: struct Sender;",
        "chat.md: struct Member {",
        "http.md: struct Http {",
        "pools.md: struct Echo {",
        "restarts.md: settings only",
        "restarts.md: struct Echo;",
        "services.md: struct Http {",
    ];
    assert_eq!(found, tested);
}

/// What most have written wrongly at first is answered in their words, not with a list
/// of types that happen to fit.
#[test]
fn errors_of_the_compiler_say_what_to_write() {
    let ledger = DescriptorLedger::open();
    let scratch = tempfile::tempdir().unwrap();
    // What listens on TCP, and what is said of it.
    let listened: [(&str, &[&str]); 5] = [
        // A receiver of frames, as it is.
        (
            "|_: &Address| Lines",
            &[
                "`Lines` is not a protocol over",
                "`Framed::new(framer, receiver)`",
            ],
        ),
        // No factory at all.
        (
            "Lines",
            &["`Lines` does not build protocols", "`|_: &Address| Echo`"],
        ),
        // A protocol that passes descriptors.
        (
            "|_: &Address| Passing",
            &[
                "TcpStream` does not pass descriptors",
                "only UNIX connections do",
            ],
        ),
        // A receiver of other frames than it is put behind.
        (
            "|_: &Address| Framed::new(NetstringFramer::new(), Lines)",
            &[
                "`Lines` does not receive the frames of `NetstringFramer`",
                "`impl<T: Transport> FrameReceiver<T, NetstringFramer>`",
            ],
        ),
        // Rustc has no place for words of ours here; the guide has them, and what is named
        // is the type to be written.
        (
            "|_| Echo",
            &[
                "is not general enough",
                "`fn(&'2 bowline::Address) -> Echo`",
            ],
        ),
    ];
    for (factory, says) in listened {
        let body = format!(
            "let address = ([127, 0, 0, 1], 0).into();
             let _ = Reactor::new().unwrap().listen_tcp(address, {factory});"
        );
        assert_errors(&body, "", says, scratch.path());
    }
    // Descriptors over anything, and over what could pass them but is not said to.
    let sends = "let _ = cx.transport.send_file_descriptor(std::io::stdin().as_fd()
        .try_clone_to_owned().unwrap().into());";
    let says = [
        "perhaps you need to restrict type parameter `T` with it",
        "UnixTransport",
    ];
    assert_errors("", sends, &says, scratch.path());
    // Over what cannot.
    let sends = "fn passes(it: &mut bowline::TcpStream) {
            let _ = it.send_file_descriptor(std::fs::File::open(\"/dev/null\").unwrap());
        }";
    let says = [
        "TcpStream` does not pass descriptors",
        "only UNIX connections do",
    ];
    assert_errors(sends, "", &says, scratch.path());
    drop(scratch);
    ledger.assert_balanced();
}

/// Compiles a program with a `main` and a callback of these bodies, which cannot be.
#[track_caller]
fn assert_errors(main: &str, callback: &str, says: &[&str], scratch: &Path) {
    let code = format!(
        "use std::os::fd::AsFd as _;
         use bowline::framing::{{FrameContext, FrameReceiver, Framed, LineFramer, NetstringFramer}};
         use bowline::{{Address, Context, Protocol, Reactor, Transport, Transports, UnixTransport}};
         struct Lines;
         impl<T: Transport> FrameReceiver<T, LineFramer> for Lines {{
             fn frame_received(&mut self, _: &mut FrameContext<'_, T, LineFramer>, _: &[u8]) {{}}
         }}
         struct Echo;
         impl<T: Transport> Protocol<T> for Echo {{
             fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {{ {callback} }}
         }}
         struct Passing;
         impl<T: UnixTransport> Protocol<T> for Passing {{
             fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {{}}
         }}
         fn main() {{ {main} }}"
    );
    let errors = try_to_compile(&code, scratch).expect_err("it cannot be compiled");
    let said = |error: &&String| says.iter().all(|words| error.contains(words));
    let fits = errors.iter().any(|error| said(&error));
    assert!(fits, "{says:?} is not in:\n{}", errors.join("\n"));
}
