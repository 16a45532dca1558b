//! varlink: the suite in both roles, order, upgrades, and asyncvarlink.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use bowline::framing::FramingError;
use bowline::{
    Address, CloseReason, Reactor, Transport as _, Transports, UnixStream, UnixTransportHandle,
};
use bowline_peers::varlink::serde_json::{Value, json, value::to_raw_value};
use bowline_peers::varlink::{
    VarlinkAnswer, VarlinkCall, VarlinkContext, VarlinkHandler, VarlinkRole, VarlinkSettings,
    connection,
};

use crate::programs::{Program, content, example, memory, say_missing};
use crate::suite::{Heard, Limit, Message, Outcome, Rule, Sample, Served, Trial, send};
use crate::support::{DescriptorLedger, run_until, settle, socketpair};

type Cx<'c, 'f, H> = VarlinkContext<'c, 'f, UnixStream, H>;

/// Tells what it hears, as a service or as a client.
struct Teller(Heard, VarlinkRole);

impl VarlinkHandler<UnixStream> for Teller {
    fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
        if self.1 == VarlinkRole::Client {
            let mut call = VarlinkCall::new("a.b.C");
            call.more = true;
            let asked = cx.call(&call, Vec::new(), |teller, cx, answer| {
                if let VarlinkAnswer::Reply(reply) = answer {
                    let what: Value = reply.results().unwrap();
                    let what = what["what"].as_str().unwrap().to_owned();
                    teller.0.message(what, cx.descriptors());
                }
            });
            asked.unwrap();
        }
    }

    fn call_received(&mut self, cx: &mut Cx<'_, '_, Self>, call: &VarlinkCall<'_>) {
        let what: Value = call.arguments().unwrap();
        let what = what["what"].as_str().unwrap().to_owned();
        self.0.message(what, cx.descriptors());
        cx.reply(&json!({}), Vec::new()).unwrap();
    }
}

struct Side(VarlinkRole);

const LONGEST: usize = 4_096;
const MOST: usize = 16;

impl Side {
    fn message(&self, descriptors: usize, what: &str) -> Message {
        let text = match self.0 {
            VarlinkRole::Service => {
                format!("{{\"method\":\"a.b.C\",\"parameters\":{{\"what\":\"{what}\"}}}}\0")
            }
            VarlinkRole::Client => {
                format!("{{\"parameters\":{{\"what\":\"{what}\"}},\"continues\":true}}\0")
            }
        };
        Message::new(text, descriptors, what)
    }

    /// Of so many bytes, its zero left out.
    fn of_length(&self, length: usize) -> Message {
        let rest = self.message(0, "").bytes.len() - 1;
        self.message(1, &"x".repeat(length - rest))
    }
}

impl Sample for Side {
    fn rule(&self) -> Rule {
        Rule::ByLastByte
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let settings = VarlinkSettings::default()
            .max_length(LONGEST)
            .max_descriptors(MOST);
        let protocol = connection(self.0, settings, Teller(heard.clone(), self.0));
        Served::by(|socket| reactor.adopt_unix_stream(socket, protocol).unwrap())
    }

    fn messages(&self) -> Vec<Message> {
        [
            (0, "plain"),
            (1, "one"),
            (3, "three"),
            (0, "none"),
            (1, "last"),
        ]
        .map(|(count, what)| self.message(count, what))
        .into()
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match trial {
            // Who sends so means the first message, or the last; nothing says which.
            Trial::Lumped => Outcome::Dealt(vec![0, 0, 0, 0, 5]),
            _ => self.rule().outcome(trial),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        vec![
            Limit {
                of: "descriptors",
                within: self.message(MOST, "many"),
                beyond: self.message(MOST + 1, "too many"),
            },
            Limit {
                of: "bytes",
                within: self.of_length(LONGEST),
                beyond: self.of_length(LONGEST + 1),
            },
        ]
    }
}

crate::suite::suite!(service, Side(VarlinkRole::Service));
crate::suite::suite!(client, Side(VarlinkRole::Client));

type Notes = Rc<RefCell<Vec<String>>>;

/// Both sides of a connection, which note what they are told.
#[derive(Clone, Default)]
struct Both {
    notes: Notes,
    /// What the service is called with waits here, to be answered by the test.
    is_slow: bool,
}

impl Both {
    fn note(&self, what: impl Into<String>) {
        self.notes.borrow_mut().push(what.into());
    }

    fn ask(
        &self,
        cx: &mut Cx<'_, '_, Self>,
        call: &VarlinkCall<'_>,
        descriptors: usize,
        name: &'static str,
    ) {
        let its = (0..descriptors).map(|_| File::open("/dev/null").unwrap().into());
        let asked = cx.call(call, its.collect(), move |both, _, answer| match answer {
            VarlinkAnswer::Reply(reply) => {
                let what: Value = reply.results().unwrap();
                let error = reply.error.unwrap_or("");
                both.note(format!("{name}: {what}{error}"));
            }
            other => both.note(format!("{name}: {other:?}")),
        });
        asked.unwrap();
    }
}

impl VarlinkHandler<UnixStream> for Both {
    fn call_received(&mut self, cx: &mut Cx<'_, '_, Self>, call: &VarlinkCall<'_>) {
        let count = cx.descriptors().count();
        self.note(format!("{} with {count}", call.method));
        match call.method {
            _ if self.is_slow || call.oneway => {}
            "a.b.Several" => {
                for number in 0..2 {
                    cx.reply_and_continue(&json!(number), Vec::new()).unwrap();
                }
                cx.reply(&json!(2), Vec::new()).unwrap();
                let twice = cx.reply(&json!(3), Vec::new()).unwrap_err();
                self.note(twice.to_string());
            }
            "a.b.No" => cx.reply_error("a.b.Refused", &json!({})).unwrap(),
            _ => cx.reply(&json!("yes"), Vec::new()).unwrap(),
        }
    }

    fn raw_data_received(&mut self, cx: &mut Cx<'_, '_, Self>, data: &[u8]) {
        self.note(format!("raw {}", data.escape_ascii()));
        if data == b"ping" {
            cx.transport().write(b"pong");
        }
    }

    fn failed(&mut self, _: &mut Cx<'_, '_, Self>, error: &FramingError) {
        self.note(error.to_string());
    }

    fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
        self.note("lost");
    }
}

struct Pair {
    reactor: Reactor,
    client: UnixTransportHandle,
    service: UnixTransportHandle,
    at_client: Both,
    at_service: Both,
}

impl Pair {
    fn new(settings: VarlinkSettings, is_slow: bool) -> Self {
        let (ours, theirs) = socketpair();
        let (at_client, mut at_service) = (Both::default(), Both::default());
        at_service.is_slow = is_slow;
        let mut reactor = Reactor::new().unwrap();
        let of_client = connection(VarlinkRole::Client, settings.clone(), at_client.clone());
        let of_service = connection(VarlinkRole::Service, settings, at_service.clone());
        let client = reactor.adopt_unix_stream(ours.into(), of_client).unwrap();
        let service = reactor
            .adopt_unix_stream(theirs.into(), of_service)
            .unwrap();
        settle(&mut reactor);
        Self {
            reactor,
            client,
            service,
            at_client,
            at_service,
        }
    }

    /// As a timer of the program would.
    fn enter(
        &mut self,
        side: UnixTransportHandle,
        act: impl FnOnce(&mut Both, &mut Cx<'_, '_, Both>) + 'static,
    ) {
        type Framed = bowline_peers::varlink::Varlink<UnixStream, Both>;
        self.reactor.call_protocol(side, |framed: &mut Framed, cx| {
            framed.call(cx, |peer, frame| peer.enter(frame, act));
        });
        settle(&mut self.reactor);
    }

    fn told(&self) -> [Vec<String>; 2] {
        [self.at_client.notes.take(), self.at_service.notes.take()]
    }
}

#[test]
fn answers_come_in_the_order_of_calls() {
    let _ledger = DescriptorLedger::open();
    let mut pair = Pair::new(VarlinkSettings::default().max_descriptors(2), false);
    let client = pair.client;
    pair.enter(client, |both, cx| {
        let mut several = VarlinkCall::new("a.b.Several");
        several.more = true;
        both.ask(cx, &several, 0, "several");
        let mut oneway = VarlinkCall::new("a.b.Oneway");
        oneway.oneway = true;
        both.ask(cx, &oneway, 0, "oneway");
        both.ask(cx, &VarlinkCall::new("a.b.No"), 0, "no");
        // It waits for the answers to those before it, and the last waits for it.
        both.ask(cx, &VarlinkCall::new("a.b.Take"), 2, "take");
        both.ask(cx, &VarlinkCall::new("a.b.Last"), 0, "last");
        assert_eq!(cx.waiting_calls(), 4);
    });
    let [client, service] = pair.told();
    let several = ["several: 0", "several: 1", "several: 2"];
    let rest = ["no: {}a.b.Refused", "take: \"yes\"", "last: \"yes\""];
    assert_eq!(client, [&several[..], &rest].concat());
    let expected = [
        "a.b.Several with 0",
        "frame cannot be made: no call waits for an answer",
        "a.b.Oneway with 0",
        "a.b.No with 0",
        "a.b.Take with 2",
        "a.b.Last with 0",
    ];
    assert_eq!(service, expected);
}

#[test]
fn calls_wait_for_the_answer_to_the_one_before() {
    let _ledger = DescriptorLedger::open();
    let mut pair = Pair::new(VarlinkSettings::default(), true);
    let (client, service) = (pair.client, pair.service);
    pair.enter(client, |both, cx| {
        both.ask(cx, &VarlinkCall::new("a.b.One"), 0, "one");
        both.ask(cx, &VarlinkCall::new("a.b.Two"), 0, "two");
    });
    assert_eq!(pair.told(), [vec![], vec!["a.b.One with 0".to_owned()]]);
    for (answered, next) in [("one: 7", Some("a.b.Two with 0")), ("two: 7", None)] {
        pair.enter(service, |_, cx| {
            let refused = cx.reply_and_continue(&json!(0), Vec::new()).unwrap_err();
            assert!(
                refused.to_string().contains("takes one answer"),
                "{refused}"
            );
            cx.reply(&json!(7), Vec::new()).unwrap();
        });
        let next: Vec<String> = next.map(String::from).into_iter().collect();
        assert_eq!(pair.told(), [vec![answered.to_owned()], next]);
    }
}

#[test]
fn upgraded_connection_is_raw_from_the_next_byte_on() {
    let _ledger = DescriptorLedger::open();
    let mut pair = Pair::new(VarlinkSettings::default(), false);
    let client = pair.client;
    pair.enter(client, |both, cx| {
        let mut call = VarlinkCall::new("a.b.Upgrade");
        call.upgrade = true;
        let raw = to_raw_value(&json!({"to": "ping"})).unwrap();
        both.ask(cx, &call.parameters(&raw), 0, "upgrade");
        // In the same read as the call.
        cx.transport().write(b"ping");
    });
    let [client, service] = pair.told();
    assert_eq!(service, ["a.b.Upgrade with 0", "raw ping"]);
    assert_eq!(client, ["upgrade: \"yes\"", "raw pong"]);
}

#[test]
fn late_answer_ends_the_connection() {
    let _ledger = DescriptorLedger::open();
    let deadline = Some(Duration::from_millis(20));
    let mut pair = Pair::new(VarlinkSettings::default().call_deadline(deadline), true);
    let client = pair.client;
    pair.enter(client, |both, cx| {
        both.ask(cx, &VarlinkCall::new("a.b.One"), 0, "one");
        both.ask(cx, &VarlinkCall::new("a.b.Two"), 0, "two");
    });
    run_until(&mut pair.reactor, |reactor| reactor.get(client).is_none());
    settle(&mut pair.reactor);
    let [client, _] = pair.told();
    assert_eq!(client, ["one: TimedOut", "two: TimedOut", "lost"]);
}

/// As sd-varlink does, and what nobody asked for is no answer.
#[test]
fn descriptors_are_refused_by_default_and_so_are_answers_to_nothing() {
    let _ledger = DescriptorLedger::open();
    for (role, text, count, error) in [
        (
            VarlinkRole::Service,
            "{\"method\":\"a.b.C\"}\0",
            1,
            "peer sent more than 0 descriptors with a frame",
        ),
        (
            VarlinkRole::Client,
            "{}\0",
            0,
            "peer broke the framing: an answer that nothing was asked for",
        ),
        (
            VarlinkRole::Service,
            "[]\0",
            0,
            "peer broke the framing: a call that is none",
        ),
    ] {
        let both = Both::default();
        let (ours, theirs) = socketpair();
        let mut reactor = Reactor::new().unwrap();
        let protocol = connection(role, VarlinkSettings::default(), both.clone());
        reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        let file = File::open("/dev/null").unwrap();
        let its = [std::os::fd::AsFd::as_fd(&file)];
        send(&theirs, text.as_bytes(), &its[..count]);
        settle(&mut reactor);
        assert_eq!(both.notes.take(), [error, "lost"]);
    }
}

/// asyncvarlink, in this role; `None` where it is not installed.
fn python(role: &str, path: &Path) -> Option<Command> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/interop-venv/bin/python");
    let found = Command::new(&python)
        .args(["-c", "import asyncvarlink"])
        .output();
    if !found.is_ok_and(|it| it.status.success()) {
        say_missing("asyncvarlink", "tests/interop/setup");
        return None;
    }
    let mut command = Command::new(python);
    command
        .arg(root.join("tests/peers/varlink_peer.py"))
        .arg(role)
        .arg(path);
    Some(command)
}

/// A service of files, as that of asyncvarlink is; and a client of it.
#[derive(Clone, Default)]
struct Files(Notes);

impl VarlinkHandler<UnixStream> for Files {
    fn call_received(&mut self, cx: &mut Cx<'_, '_, Self>, call: &VarlinkCall<'_>) {
        let arguments: Value = call.arguments().unwrap();
        match call.method {
            "com.example.files.Open" => {
                let file = memory(arguments["text"].as_str().unwrap());
                let answer = json!({"fileDescriptor": 0});
                cx.reply(&answer, vec![file.into()]).unwrap();
            }
            "com.example.files.Read" => {
                let index = arguments["fileDescriptor"].as_u64().unwrap();
                let fd = cx.descriptors().nth(index as usize).unwrap();
                cx.reply(&json!({"content": content(fd)}), Vec::new())
                    .unwrap();
            }
            other => panic!("{other}"),
        }
    }
}

impl Files {
    /// Asks for a file, and gives one, several times and all at once.
    fn ask(cx: &mut Cx<'_, '_, Self>) {
        let open = to_raw_value(&json!({"text": "for us"})).unwrap();
        let read = to_raw_value(&json!({"fileDescriptor": 0})).unwrap();
        for _ in 0..3 {
            let call = VarlinkCall::new("com.example.files.Open").parameters(&open);
            let asked = cx.call(&call, Vec::new(), |files, cx, answer| {
                assert!(matches!(answer, VarlinkAnswer::Reply(_)), "{answer:?}");
                let fd = cx.descriptors().next().expect("it has one");
                files.0.borrow_mut().push(content(fd));
            });
            asked.unwrap();
            let call = VarlinkCall::new("com.example.files.Read").parameters(&read);
            let given = vec![memory("of ours").into()];
            let asked = cx.call(&call, given, |files, _, answer| {
                let VarlinkAnswer::Reply(reply) = answer else {
                    panic!("{answer:?}")
                };
                let what: Value = reply.results().unwrap();
                files.0.borrow_mut().push(what["content"].to_string());
            });
            asked.unwrap();
        }
    }
}

fn settings() -> VarlinkSettings {
    VarlinkSettings::default().max_descriptors(8)
}

#[test]
fn asyncvarlink_calls_our_service() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("files");
    let Some(mut command) = python("client", &path) else {
        return;
    };
    let mut reactor = Reactor::new().unwrap();
    let factory = |_: &Address| connection(VarlinkRole::Service, settings(), Files::default());
    reactor.listen_unix(&path, factory).unwrap();
    let (is_well, said) = Program::start(&mut command).end(&mut reactor);
    assert!(is_well, "{said}");
    let round = "for Python\nof Python\n";
    assert_eq!(said, round.repeat(3) + "leaked 0\n");
}

#[test]
fn our_client_calls_asyncvarlink() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("files");
    let Some(mut command) = python("service", &path) else {
        return;
    };
    let mut reactor = Reactor::new().unwrap();
    let service = Program::start(&mut command);
    service.wait_for(&mut reactor, "serving");
    let before = service.open_descriptors();
    let files = Files::default();
    let notes = Rc::clone(&files.0);
    let client = connection(VarlinkRole::Client, settings(), files);
    let connected = StdUnixStream::connect(&path).unwrap();
    let handle = reactor.adopt_unix_stream(connected.into(), client).unwrap();
    type Framed = bowline_peers::varlink::Varlink<UnixStream, Files>;
    reactor.call_protocol(handle, |framed: &mut Framed, cx| {
        framed.call(cx, |peer, frame| peer.enter(frame, |_, cx| Files::ask(cx)));
    });
    run_until(&mut reactor, |_| notes.borrow().len() == 6);
    assert_eq!(*notes.borrow(), ["for us", "\"of ours\""].repeat(3));
    reactor.get(handle).unwrap().lose_connection();
    settle(&mut reactor);
    service.wait_for_descriptors(&mut reactor, before);
}

/// As its first lines say; and asyncvarlink, which asks what it is.
#[test]
fn example_opens_files_below_its_folder_and_no_others() {
    const ASK: &str = r#"
import asyncio, os, sys
import asyncvarlink as varlink
class Files(varlink.VarlinkInterface, name="com.example.files"):
    @varlink.varlinkmethod(return_parameter="fileDescriptor")
    def Open(self, *, name: str) -> varlink.FileDescriptor: ...
async def main():
    _, protocol = await varlink.connect_unix_varlink(varlink.VarlinkClientProtocol, sys.argv[1])
    files = protocol.make_proxy(Files)
    with await files.Open(name="inside") as opened:
        print(os.pread(opened["fileDescriptor"].fileno(), 100, 0).decode())
    try:
        await files.Open(name="nothing")
    except varlink.VarlinkErrorReply as error:
        print(error.name)
asyncio.run(main())
"#;
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let (socket, files) = (folder.path().join("socket"), folder.path().join("files"));
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("inside"), "what is inside").unwrap();
    std::fs::write(folder.path().join("outside"), "what is outside").unwrap();
    std::os::unix::fs::symlink("../outside", files.join("link")).unwrap();
    let mut reactor = Reactor::new().unwrap();
    let run = |arguments: [&std::ffi::OsStr; 2]| {
        let mut command = Command::new(example("varlink_files"));
        command.arg("--socket").arg(&socket).args(arguments);
        Program::start(&mut command)
    };
    let mut service = run(["--serve".as_ref(), files.as_os_str()]);
    service.wait_for_listener(&mut reactor, &socket);
    let mut read = |name: &str| {
        let ended = run(["--read".as_ref(), name.as_ref()]).end(&mut reactor);
        (ended.0, ended.1.trim_end().to_owned())
    };
    assert_eq!(read("inside"), (true, "what is inside".to_owned()));
    // The connection that looked for the listener is gone by now.
    let before = service.open_descriptors();
    for (name, error) in [
        ("nothing", "com.example.files.NotFound"),
        ("../outside", "com.example.files.NotAllowed"),
        ("link", "com.example.files.NotAllowed"),
        (".", "com.example.files.NotAllowed"),
    ] {
        let (is_well, said) = read(name);
        assert!(!is_well && said.contains(error), "{name}: {said}");
    }
    service.wait_for_descriptors_at_most(&mut reactor, before);
    if let Some(python) = python("client", &socket) {
        let mut command = Command::new(python.get_program());
        let mut asks = Program::start(command.args(["-c", ASK]).arg(&socket));
        let (is_well, said) = asks.end(&mut reactor);
        assert!(is_well, "{said}");
        assert_eq!(said, "what is inside\ncom.example.files.NotFound\n");
    }
    service.wait_for_descriptors_at_most(&mut reactor, before);
    assert!(service.stop(&mut reactor).0, "{}", service.said());
}
