//! The console socket: the suite over its one message, what a runtime may send, and runc.

use std::cell::{Cell, RefCell};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use bowline::process::{TerminalSize, terminal_size};
use bowline::{
    AnyConnection as _, CloseReason, Context, ListenerHandle, Once, Pipe, Protocol, Reactor,
    Transport, Transports, UnixStream,
};
use bowline_peers::oci::{Console, ConsoleError, ConsoleSocket, LABEL_LIMIT, send_console};
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};

use crate::programs::{Program, example, has, say_missing};
use crate::suite::{End, Heard, Limit, Message, Question, Rule, Sample, Served, identity, send};
use crate::support::{DescriptorLedger, run_until, settle};

/// What a runtime sends, which is one message.
struct Consoles;

impl Consoles {
    fn of_length(length: usize) -> Message {
        Message::new(vec![b'x'; length], 1, "a console")
    }
}

impl Sample for Consoles {
    fn rule(&self) -> Rule {
        Rule::FirstRead
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let is_over = Rc::new(Cell::new(false));
        let (heard, ends) = (heard.clone(), Rc::clone(&is_over));
        ConsoleSocket::at(&path)
            .listen(reactor, move |_, given| {
                ends.set(true);
                if let Ok(console) = given {
                    heard.message("a console", [console.into_descriptor()]);
                }
            })
            .unwrap();
        Served {
            peer: Some(StdUnixStream::connect(path).unwrap().into()),
            end: End::Told(is_over),
            folder: Some(folder),
        }
    }

    fn messages(&self) -> Vec<Message> {
        vec![Message::new("/dev/ptmx", 1, "a console")]
    }

    fn descriptor(&self) -> OwnedFd {
        terminal()
    }

    fn limits(&self) -> Vec<Limit> {
        vec![Limit {
            of: "bytes",
            within: Self::of_length(LABEL_LIMIT - 1),
            beyond: Self::of_length(LABEL_LIMIT),
        }]
    }

    fn unasked(&self) -> Vec<(Question, &'static str)> {
        vec![
            (Question::Early, "one message"),
            (Question::Stray, "none is plain"),
            (Question::Lines, "no lines"),
        ]
    }
}

suite!(console, Consoles, asks cut late sets few many limit last);

/// What a console socket has given.
type Given = Rc<RefCell<Vec<Result<Console, ConsoleError>>>>;

/// An engine that waits.
fn engine(folder: &Path, within: Option<Duration>) -> (Reactor, ListenerHandle, Given) {
    let mut reactor = Reactor::new().unwrap();
    let given = Given::default();
    let results = Rc::clone(&given);
    let mut socket = ConsoleSocket::at(folder.join("console"));
    if let Some(limit) = within {
        socket = socket.within(limit);
    }
    let listener = socket
        .listen(&mut reactor, move |_, result| {
            results.borrow_mut().push(result)
        })
        .unwrap();
    (reactor, listener, given)
}

/// The side of a new pseudo-terminal that holds it.
fn terminal() -> OwnedFd {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    terminal
}

/// What is given for what a runtime sends, each piece in a call; then it stays, or goes.
fn sent(pieces: &[(&[u8], &[BorrowedFd<'_>])], stays: bool) -> Result<Console, ConsoleError> {
    let folder = tempfile::tempdir().unwrap();
    let (mut reactor, _, given) = engine(folder.path(), None);
    let path = folder.path().join("console");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others may connect");
    let runtime = StdUnixStream::connect(&path).unwrap();
    for (bytes, descriptors) in pieces {
        if given.borrow().is_empty() {
            send(&runtime, bytes, descriptors);
            settle(&mut reactor);
        }
    }
    let kept = stays.then_some(runtime);
    settle(&mut reactor);
    assert!(!path.exists(), "it listens on");
    drop(kept);
    settle(&mut reactor);
    let mut given = given.take();
    assert_eq!(given.len(), 1, "called more often, or not: {given:?}");
    given.remove(0)
}

/// As runc, which hangs up at once, and as crun, which stays for as long as the container.
#[test]
fn console_is_taken_as_runc_and_crun_send_it() {
    let _ledger = DescriptorLedger::open();
    let terminal = terminal();
    let one = [terminal.as_fd()];
    let longest = vec![b'x'; LABEL_LIMIT - 1];
    for label in [b"/dev/ptmx", &b" "[..], &longest] {
        for stays in [false, true] {
            let console = sent(&[(label, &one)], stays).unwrap();
            assert_eq!(console.label(), label);
            assert_eq!(identity(console.terminal()), identity(&terminal));
        }
    }
}

/// The rest of a label that was cut is not waited for: a runtime says nothing more.
#[test]
fn label_is_what_comes_at_once() {
    let _ledger = DescriptorLedger::open();
    let terminal = terminal();
    let one = [terminal.as_fd()];
    let console = sent(&[(b"/dev", &one), (b"/ptmx", &[])], true).unwrap();
    assert_eq!(console.label(), b"/dev");
}

#[test]
fn what_is_no_console_is_refused_and_closed() {
    let _ledger = DescriptorLedger::open();
    let terminal = terminal();
    let terminal = terminal.as_fd();
    let null = fs::File::open("/dev/null").unwrap();
    let too_long = vec![b'x'; LABEL_LIMIT];
    let passed = |count| format!("runtime passed {count} descriptors for a console");
    let wrong = "runtime passed no console: a pseudo-terminal was to be passed, and it was \
                 something else";
    for (pieces, error) in [
        (&[(&b"x"[..], &[][..])][..], &*passed(0)),
        (&[(b"x", &[terminal, terminal])], &passed(2)),
        (&[(b"x", &[null.as_fd()])], wrong),
        (
            &[(&too_long, &[terminal])],
            "runtime sent a label of too many bytes",
        ),
        (&[], "runtime hung up before it passed a console"),
    ] {
        let refused = sent(pieces, false).unwrap_err();
        assert_eq!(refused.to_string(), error);
    }
}

#[test]
fn waiting_ends_with_its_time_or_with_the_listener() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let (mut reactor, _, given) = engine(folder.path(), Some(Duration::from_millis(20)));
    run_until(&mut reactor, |_| !given.borrow().is_empty());
    assert!(matches!(given.take()[..], [Err(ConsoleError::TimedOut)]));
    settle(&mut reactor);
    assert!(!folder.path().join("console").exists());

    let (mut reactor, listener, given) = engine(folder.path(), None);
    settle(&mut reactor);
    reactor.get(listener).unwrap().stop_listening();
    settle(&mut reactor);
    assert!(matches!(given.take()[..], [Err(ConsoleError::Stopped)]));
}

#[test]
fn console_goes_from_our_runtime_to_our_engine() {
    struct Runtime(Option<OwnedFd>);
    impl Protocol<UnixStream> for Runtime {
        fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
            let terminal = self.0.take().unwrap().into();
            send_console(cx.transport, terminal, b"/dev/ptmx").unwrap();
            cx.transport.lose_connection();
        }

        fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
    }

    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let (mut reactor, _, given) = engine(folder.path(), None);
    let runtime = Once::new(Runtime(Some(terminal())));
    let path = folder.path().join("console");
    reactor.connect_unix(path.as_path(), runtime).unwrap();
    run_until(&mut reactor, |_| !given.borrow().is_empty());
    let given = given.take().remove(0).unwrap();
    assert_eq!(given.label(), b"/dev/ptmx");
}

/// A bundle whose container runs this in a shell; `None` where there is nothing to run it.
fn bundle(folder: &Path, script: &str) -> Option<()> {
    if !has("runc", "runc") {
        return None;
    }
    let root = folder.join("rootfs");
    let shell = Path::new("/bin/sh");
    let listed = Command::new("ldd").arg(shell).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let libraries = listed.split_whitespace().filter(|it| it.starts_with('/'));
    for path in libraries.map(Path::new).chain([shell]) {
        let copy = root.join(path.strip_prefix("/").unwrap());
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(path, copy).unwrap();
    }
    let spec = Command::new("runc")
        .arg("spec")
        .current_dir(folder)
        .output();
    assert!(spec.unwrap().status.success());
    let file = folder.join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    // The arguments that a specification has by itself.
    let from = text.find("\"args\"").unwrap();
    let to = from + text[from..].find(']').unwrap() + 1;
    let arguments = format!("\"args\": [\"/bin/sh\", \"-c\", {script:?}]");
    fs::write(&file, [&text[..from], &arguments, &text[to..]].concat()).unwrap();
    Some(())
}

/// What comes from a terminal.
#[derive(Clone, Default)]
struct Screen(Rc<RefCell<(String, Option<String>)>>);

impl<T: Transport> Protocol<T> for Screen {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.0.borrow_mut().0 += &String::from_utf8_lossy(data);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.0.borrow_mut().1 = Some(reason.to_string());
    }
}

const SCRIPT: &str = "echo hello; read line; echo got $line";

/// Whether a container can be run here; that it cannot is said.
fn runs(said: &str) -> bool {
    // Where namespaces or control groups cannot be had.
    let is_refused = said.contains("operation not permitted")
        || said.contains("permission denied")
        || said.contains("cgroup");
    if is_refused {
        say_missing("a kernel that lets runc run a container", said);
    }
    !is_refused
}

/// How many descriptors the first process of a container has open.
fn descriptors_of_container(id: &str) -> usize {
    let state = Command::new("runc").args(["state", id]).output().unwrap();
    let state = String::from_utf8(state.stdout).unwrap();
    let (_, behind) = state.split_once("\"pid\": ").expect("it runs");
    let pid = behind.split(',').next().expect("a number");
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn console_of_a_container_is_a_connection() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{SCRIPT}; read line");
    let Some(()) = bundle(folder.path(), &script) else {
        return;
    };
    let (mut reactor, _, given) = engine(folder.path(), None);
    let id = format!("bowline-test-{}", std::process::id());
    let mut command = Command::new("runc");
    command.args(["run", "--detach", "--console-socket", "console", &id]);
    let mut runtime = Program::start(command.current_dir(folder.path()));
    let (is_well, said) = runtime.end(&mut reactor);
    if !is_well && !runs(&said) {
        return;
    }
    assert!(is_well, "{said}");
    run_until(&mut reactor, |_| !given.borrow().is_empty());
    let console = given.take().remove(0).unwrap();
    assert_eq!(console.label(), b"/dev/ptmx");
    let size = TerminalSize::default().rows(40).columns(120);
    bowline::process::set_terminal_size(console.terminal(), size).unwrap();
    assert_eq!(terminal_size(console.terminal()).unwrap(), size);
    let screen = Screen::default();
    let terminal = reactor
        .adopt(Pipe, console.into_descriptor(), screen.clone())
        .unwrap();
    run_until(&mut reactor, |_| screen.0.borrow().0.contains("hello"));
    // The runtime has ended; what runs in the container has its terminal, and nothing else.
    assert_eq!(descriptors_of_container(&id), 3);
    reactor.get(terminal).unwrap().write(b"me\n");
    run_until(&mut reactor, |_| screen.0.borrow().0.contains("got me"));
    assert_eq!(descriptors_of_container(&id), 3);
    reactor.get(terminal).unwrap().write(b"\n");
    run_until(&mut reactor, |_| screen.0.borrow().1.is_some());
    let (said, reason) = screen.0.take();
    assert_eq!(said, "hello\r\nme\r\ngot me\r\n\r\n");
    assert_eq!(reason.as_deref(), Some("closed cleanly"));
    let deleted = Command::new("runc")
        .args(["delete", "--force", &id])
        .output();
    assert!(deleted.unwrap().status.success());
}

/// As its first lines say.
#[test]
fn example_runs_a_container_on_its_console() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = bundle(folder.path(), SCRIPT) else {
        return;
    };
    let mut reactor = Reactor::new().unwrap();
    let id = format!("bowline-example-{}", std::process::id());
    let mut command = Command::new(example("oci_console"));
    let mut engine = Program::start(
        command
            .arg("--bundle")
            .arg(folder.path())
            .args(["--id", &id]),
    );
    engine.tell("me\n");
    let (is_well, said) = engine.end(&mut reactor);
    if !is_well && !runs(&said) {
        return;
    }
    assert!(is_well, "{said}");
    assert!(
        said.contains("hello\r\n") && said.ends_with("got me\r\n"),
        "{said:?}"
    );
}
