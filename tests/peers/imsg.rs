//! imsg with tmux, which has its messages, as server and as client.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use bowline::framing::{FrameContext, FrameEncoder as _, FrameReceiver};
use bowline::{Address, CloseReason, Once, Reactor, Transports, Unix, UnixTransport};
use bowline_peers::imsg::{self, Imsg, ImsgDialect, ImsgFramer, ImsgHeader};

use crate::programs::{Program, has};
use crate::suite::{Heard, Limit, Message, Outcome, Rule, Sample, Served, Trial};
use crate::support::{DescriptorLedger, run_until, settle};

const STDIN: u32 = 104;
const DONE: u32 = 106;
const STDOUT: u32 = 110;
const LONG_FLAGS: u32 = 111;
const COMMAND: u32 = 200;
const EXIT: u32 = 203;
const WRITE_OPEN: u32 = 303;
const WRITE: u32 = 304;
const WRITE_READY: u32 = 305;

/// The header of a message as tmux makes it: the version of its protocol, and no process.
fn header(kind: u32) -> ImsgHeader {
    let (peer_id, pid) = (8, u32::MAX);
    ImsgHeader { kind, peer_id, pid }
}

/// tmux, with nothing of whoever runs the tests.
pub(crate) fn tmux(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("tmux");
    command
        .env_remove("TMUX")
        .env("TERM", "screen")
        .args(["-f", "/dev/null", "-S"])
        .arg(socket)
        .args(arguments);
    command
}

/// The dialect of the tmux that is installed, if one is.
fn dialect() -> Option<ImsgDialect> {
    if !has("tmux", "tmux") {
        return None;
    }
    let output = Command::new("tmux").arg("-V").output().expect("it starts");
    let version = String::from_utf8(output.stdout).expect("text");
    let number = version.trim().trim_start_matches("tmux ");
    let number = number.trim_end_matches(|letter: char| letter.is_ascii_lowercase());
    let number: f32 = number.parse().expect("a version");
    Some(match number >= 3.55 {
        true => ImsgDialect::Current,
        false => ImsgDialect::Legacy,
    })
}

/// What a client of tmux has said.
#[derive(Default)]
struct Said {
    kinds: Vec<u32>,
    with_descriptor: Vec<u32>,
    command: Vec<u8>,
    dialect: Option<ImsgDialect>,
    is_lost: bool,
}

/// A server of tmux that writes to the descriptor that it was given, and says goodbye.
struct Server(Rc<RefCell<Said>>, Option<OwnedFd>);

impl<T: UnixTransport> FrameReceiver<T, ImsgFramer> for Server {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, ImsgFramer>, frame: &[u8]) {
        let Imsg { header: it, data } = Imsg::of(frame);
        let mut said = self.0.borrow_mut();
        said.kinds.push(it.kind);
        assert_eq!(it.peer_id & 0xff, 8, "the version of tmux's protocol");
        if let Some(fd) = cx.framing.descriptors().next() {
            said.with_descriptor.push(it.kind);
            if it.kind == STDOUT {
                self.1 = Some(fd);
            }
        }
        if it.kind == COMMAND {
            said.command = data[4..].to_vec();
            said.dialect = Some(cx.framing.framer().dialect());
            let mut output = File::from(self.1.take().expect("it came before"));
            output.write_all(b"said by bowline\n").expect("a pipe");
            cx.send_frame_of(&header(EXIT), &7_i32.to_ne_bytes())
                .expect("short");
        }
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, ImsgFramer>, _: &CloseReason) {
        self.0.borrow_mut().is_lost = true;
    }
}

#[test]
fn client_of_tmux_is_served_and_its_descriptors_are_its_own() {
    let _ledger = DescriptorLedger::open();
    let Some(dialect) = dialect() else { return };
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let said = Rc::new(RefCell::new(Said::default()));
    let shared = Rc::clone(&said);
    let listener = reactor
        .listen_unix(path.as_path(), move |_: &Address| {
            // It is to find out which dialect it meets, and begins with the wrong one.
            let wrong = match dialect {
                ImsgDialect::Legacy => ImsgDialect::Current,
                ImsgDialect::Current => ImsgDialect::Legacy,
            };
            let server = Server(Rc::clone(&shared), None);
            imsg::protocol(ImsgFramer::learning(wrong), server)
        })
        .expect("it listens");
    let mut client = Program::start(&mut tmux(&path, &["list-sessions", "-F", "x"]));
    let (is_well, output) = client.end(&mut reactor);
    assert_eq!(
        output, "said by bowline\n",
        "by its descriptor, and no more"
    );
    assert!(!is_well, "it ends as it was told");
    run_until(&mut reactor, |_| said.borrow().is_lost);
    let said = said.borrow();
    assert_eq!(said.with_descriptor, [STDIN, STDOUT], "{:?}", said.kinds);
    assert!(said.kinds.contains(&DONE), "{:?}", said.kinds);
    assert_eq!(said.command, b"list-sessions\0-F\0x\0");
    assert_eq!(
        said.dialect,
        Some(dialect),
        "learned from the first descriptor"
    );
    reactor.get(listener).expect("it listens").stop_listening();
    settle(&mut reactor);
}

/// A client of tmux: says what it is, and the output of one command.
struct Client {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    command: &'static [u8],
    heard: Rc<RefCell<Answers>>,
}

#[derive(Default)]
struct Answers {
    text: Vec<u8>,
    exit: Option<Vec<u8>>,
    is_lost: bool,
}

impl<T: UnixTransport> FrameReceiver<T, ImsgFramer> for Client {
    fn connection_made(&mut self, cx: &mut FrameContext<'_, T, ImsgFramer>) {
        // Flags, terminal, its name, and folder: without a name the server crashes.
        let (flags, term) = ((LONG_FLAGS, &[0; 8][..]), (101, &b"screen\0"[..]));
        for (kind, data) in [flags, term, (102, b"\0"), (108, b"/\0")] {
            cx.send_frame_of(&header(kind), data).expect("short");
        }
        for (kind, fd) in [(STDIN, &mut self.input), (STDOUT, &mut self.output)] {
            let fd = fd.take().expect("there").into();
            cx.send_frame_of_with_descriptors(&header(kind), b"", vec![fd])
                .expect("one");
        }
        let arguments = self.command.iter().filter(|byte| **byte == 0).count();
        let command = [&(arguments as i32).to_ne_bytes()[..], self.command].concat();
        for (kind, data) in [(DONE, &[][..]), (COMMAND, &command)] {
            cx.send_frame_of(&header(kind), data).expect("short");
        }
    }

    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, ImsgFramer>, frame: &[u8]) {
        let Imsg { header: it, data } = Imsg::of(frame);
        let mut heard = self.heard.borrow_mut();
        match it.kind {
            WRITE_OPEN => {
                // Of the same stream, without an error.
                let ready = [&data[..4], &[0; 4]].concat();
                cx.send_frame_of(&header(WRITE_READY), &ready)
                    .expect("short");
            }
            WRITE => heard.text.extend_from_slice(&data[4..]),
            EXIT => {
                heard.exit = Some(data.to_vec());
                cx.transport.lose_connection();
            }
            _ => {}
        }
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, ImsgFramer>, _: &CloseReason) {
        self.heard.borrow_mut().is_lost = true;
    }
}

/// Has the server run a command; what it says, and how it ends.
#[track_caller]
fn command(
    reactor: &mut Reactor,
    (path, dialect): (&Path, ImsgDialect),
    command: &'static [u8],
) -> (String, Option<Vec<u8>>) {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let heard = Rc::new(RefCell::new(Answers::default()));
    let client = Client {
        input: Some(File::open("/dev/null").expect("Linux has it").into()),
        output: Some(writer.into()),
        command,
        heard: Rc::clone(&heard),
    };
    let client = imsg::protocol(ImsgFramer::new(dialect), client);
    reactor
        .connect_unix(path, Once::new(client))
        .expect("a socket");
    run_until(reactor, |_| heard.borrow().is_lost);
    let mut text = String::from_utf8(std::mem::take(&mut heard.borrow_mut().text)).expect("text");
    // Ends, when the server has closed what it was given.
    reader.read_to_string(&mut text).expect("a pipe");
    let exit = heard.borrow_mut().exit.take();
    (text, exit)
}

#[test]
fn server_of_tmux_obeys_and_keeps_no_descriptor() {
    let _ledger = DescriptorLedger::open();
    let Some(dialect) = dialect() else { return };
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut server = Program::start(&mut tmux(&path, &["-D"]));
    server.wait_for_listener(&mut reactor, &path);
    let there = (path.as_path(), dialect);
    let new = b"new-session\0-d\0-s\0ours\0-x\080\0-y\x0024\0sleep 1000\0";
    let (text, _) = command(&mut reactor, there, new);
    assert_eq!(text, "");
    let mut before = None;
    for _ in 0..5 {
        let list = b"list-sessions\0-F\0#{session_name}\0";
        let (text, exit) = command(&mut reactor, there, list);
        assert_eq!(text, "ours\n");
        assert!(exit.is_some_and(|code| code.iter().all(|byte| *byte == 0)));
        before.get_or_insert_with(|| server.open_descriptors());
    }
    server.wait_for_descriptors_at_most(&mut reactor, before.expect("of five"));
    let (_, exit) = command(&mut reactor, there, b"kill-session\0-t\0ours\0");
    assert!(exit.is_some());
}

/// The messages of a dialect, read by a framer that knows it or learns it.
struct Of(ImsgDialect, fn(ImsgDialect) -> ImsgFramer);

struct Teller(Heard);

impl<T: UnixTransport> FrameReceiver<T, ImsgFramer> for Teller {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, ImsgFramer>, frame: &[u8]) {
        let Imsg { header, data } = Imsg::of(frame);
        let text = told(header.kind, data);
        self.0.message(text, cx.framing.descriptors());
    }
}

fn told(kind: u32, data: &[u8]) -> String {
    let shown = &data[..data.len().min(8)];
    format!("{kind}: {} of {}", shown.escape_ascii(), data.len())
}

impl Of {
    fn message(&self, kind: u32, data: &[u8], descriptors: usize) -> Message {
        let mut bytes = Vec::new();
        let framer = ImsgFramer::new(self.0);
        framer
            .encode(&header(kind), data, descriptors, &mut bytes)
            .expect("short");
        Message::new(bytes, descriptors, told(kind, data))
    }

    fn strays_are_closed(&self) -> bool {
        let framer = self.1(self.0);
        self.0 == ImsgDialect::Current && !framer.is_learning()
    }
}

impl Sample for Of {
    fn rule(&self) -> Rule {
        Rule::ClaimedOrWaits
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let framed = imsg::protocol(self.1(self.0), Teller(heard.clone()));
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match trial {
            Trial::SecondSet | Trial::TooMany | Trial::Stray if self.strays_are_closed() => {
                Outcome::Paired
            }
            _ => self.rule().outcome(trial),
        }
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            self.message(100, b"plain", 0),
            self.message(STDIN, b"", 1),
            self.message(STDOUT, b"data", 1),
            self.message(DONE, b"", 0),
            self.message(200, b"last", 1),
        ]
    }

    fn limits(&self) -> Vec<Limit> {
        let longest = vec![7; ImsgFramer::MAX_LENGTH - 16];
        let mut beyond = self.message(1, &longest, 1);
        // The low half is the length in both.
        let length = ImsgFramer::MAX_LENGTH as u16 + 1;
        let place = if cfg!(target_endian = "big") && self.0 == ImsgDialect::Current {
            6
        } else {
            4
        };
        beyond.bytes[place..place + 2].copy_from_slice(&length.to_ne_bytes());
        beyond.bytes.push(7);
        vec![Limit {
            of: "bytes",
            within: self.message(1, &longest, 1),
            beyond,
        }]
    }
}

suite!(legacy, Of(ImsgDialect::Legacy, ImsgFramer::new));
suite!(current, Of(ImsgDialect::Current, ImsgFramer::new));
suite!(
    legacy_to_be_learned,
    Of(ImsgDialect::Legacy, ImsgFramer::learning)
);
suite!(
    current_to_be_learned,
    Of(ImsgDialect::Current, |_| ImsgFramer::learning(
        ImsgDialect::Legacy
    ))
);
suite!(
    legacy_met_with_the_other_dialect,
    Of(ImsgDialect::Legacy, |_| ImsgFramer::learning(
        ImsgDialect::Current
    ))
);
