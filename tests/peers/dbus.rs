//! D-Bus: the suite in both roles, a real bus, and clients and services of other libraries.

mod foreign;

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use std::cell::RefCell;
use std::rc::Rc;

use bowline::process::effective_user;
use bowline::{Address, AnyConnection as _, CloseReason, Once, Reactor, Transports, UnixStream};
use bowline_peers::dbus::{
    ByteOrder, DbusAnswer, DbusCaller, DbusContext, DbusError, DbusHandler, DbusHeader, DbusKind,
    DbusMessage, DbusRole, DbusSettings, connection, zvariant,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::programs::{Program, content, example, has, memory, say_missing};
use crate::suite::{Heard, Limit, Message, Rule, Sample, Served};
use crate::support::{DescriptorLedger, run_until, settle, socketpair};

/// Tells what it hears.
struct Teller(Heard);

type Cx<'c, 'f, H> = DbusContext<'c, 'f, UnixStream, H>;

impl Teller {
    fn tell(&self, cx: &mut Cx<'_, '_, Self>, message: &DbusMessage<'_>) {
        let order = message.order;
        let member = message.header.member.unwrap_or_default();
        let text = format!("{member} {order:?} {}", message.body.len());
        self.0.message(text, cx.descriptors());
    }
}

impl DbusHandler<UnixStream> for Teller {
    fn call_received(&mut self, cx: &mut Cx<'_, '_, Self>, call: &DbusMessage<'_>) {
        self.tell(cx, call);
        cx.reply(&DbusCaller::of(call), "", &[], Vec::new())
            .unwrap_or_else(|error| assert!(!cx.passes_descriptors(), "{error}"));
    }

    fn signal_received(&mut self, cx: &mut Cx<'_, '_, Self>, signal: &DbusMessage<'_>) {
        self.tell(cx, signal);
    }
}

struct Side(DbusRole);

/// How many bytes a message of the samples may have.
const LONGEST: usize = 4_096;

fn hex_user() -> String {
    let user = effective_user().to_string();
    user.bytes().map(|digit| format!("{digit:02x}")).collect()
}

fn message(order: ByteOrder, descriptors: usize, member: &str, length: usize) -> Message {
    let header = match descriptors {
        0 => DbusHeader::signal("/a", "a.b", member),
        _ => DbusHeader::call("/a", member),
    };
    let serial = NonZeroU32::new(7).unwrap();
    let mut bytes = Vec::new();
    let empty = header.signature("ay");
    empty
        .encode(order, serial, 4, descriptors, &mut bytes)
        .unwrap();
    let body = length.saturating_sub(bytes.len()).max(4);
    empty
        .encode(order, serial, body, descriptors, &mut bytes)
        .unwrap();
    let array = (body - 4) as u32;
    bytes.extend(match order {
        ByteOrder::Little => array.to_le_bytes(),
        ByteOrder::Big => array.to_be_bytes(),
    });
    bytes.resize(bytes.len() + body - 4, b'x');
    Message::new(bytes, descriptors, format!("{member} {order:?} {body}"))
}

impl Sample for Side {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let settings = DbusSettings::default().max_length(LONGEST);
        let protocol = connection(self.0, settings, Teller(heard.clone()));
        Served::by(|socket| reactor.adopt_unix_stream(socket, protocol).unwrap())
    }

    fn prelude(&self) -> Vec<Vec<u8>> {
        let lines = match self.0 {
            DbusRole::Service => vec![
                format!("\0AUTH EXTERNAL {}\r\n", hex_user()),
                "NEGOTIATE_UNIX_FD\r\n".into(),
                "BEGIN\r\n".into(),
            ],
            _ => vec!["OK 0123\r\n".into(), "AGREE_UNIX_FD\r\n".into()],
        };
        lines.into_iter().map(String::into_bytes).collect()
    }

    fn messages(&self) -> Vec<Message> {
        use ByteOrder::{Big, Little};
        vec![
            message(Little, 0, "Plain", 0),
            message(Big, 1, "One", 0),
            message(Little, 3, "Three", 150),
            message(Big, 0, "None", 0),
            message(Little, 1, "Last", 0),
        ]
    }

    fn limits(&self) -> Vec<Limit> {
        let of = |descriptors, length| message(ByteOrder::NATIVE, descriptors, "Limit", length);
        vec![
            Limit {
                of: "descriptors",
                within: of(16, 0),
                beyond: of(17, 0),
            },
            Limit {
                of: "bytes",
                within: of(1, LONGEST),
                beyond: of(1, LONGEST + 1),
            },
        ]
    }
}

crate::suite::suite!(service, Side(DbusRole::Service), lines);
crate::suite::suite!(client, Side(DbusRole::Client), lines);

/// What handlers of a test have noted.
type Notes = Rc<RefCell<Vec<String>>>;

#[derive(Clone, Default)]
struct Noter(Notes);

impl Noter {
    fn note(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }
}

impl DbusHandler<UnixStream> for Noter {
    fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
        self.note(format!("ready, {}", cx.passes_descriptors()));
    }

    fn failed(&mut self, _: &mut Cx<'_, '_, Self>, error: &DbusError) {
        self.note(error.to_string());
    }

    fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
        self.note("lost");
    }
}

fn pair(of_client: DbusSettings, of_service: DbusSettings) -> (Reactor, [Noter; 2]) {
    let (ours, theirs) = socketpair();
    let noters = [Noter::default(), Noter::default()];
    let mut reactor = Reactor::new().unwrap();
    let client = connection(DbusRole::Client, of_client, noters[0].clone());
    let service = connection(DbusRole::Service, of_service, noters[1].clone());
    reactor.adopt_unix_stream(ours.into(), client).unwrap();
    reactor.adopt_unix_stream(theirs.into(), service).unwrap();
    (reactor, noters)
}

#[test]
fn descriptors_pass_if_both_sides_take_them() {
    let _ledger = DescriptorLedger::open();
    for (client, service) in [(16, 16), (0, 16), (16, 0), (0, 0)] {
        let settings = |most| DbusSettings::default().max_descriptors(most);
        let (mut reactor, noters) = pair(settings(client), settings(service));
        settle(&mut reactor);
        let said = format!("ready, {}", client > 0 && service > 0);
        for noter in &noters {
            assert_eq!(*noter.0.borrow(), [&*said], "{client} and {service}");
        }
    }
}

/// The settings of a call that waits, and what came of it.
fn call_nobody(deadline: Option<Duration>, most: usize) -> Vec<String> {
    struct Caller(Noter, usize);
    impl DbusHandler<UnixStream> for Caller {
        fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
            for number in 0..=self.1 {
                let header = DbusHeader::call("/a", "Wait");
                let file = File::open("/dev/null").unwrap().into();
                let asked = cx.call(&header, &[], vec![file], move |caller, _, answer| {
                    caller.0.note(format!("{number}: {answer:?}"));
                });
                if let Err(error) = asked {
                    self.0
                        .note(format!("{error}, {} back", error.descriptors.len()));
                }
            }
        }
    }
    /// Keeps who calls, and never answers.
    struct Silent;
    impl DbusHandler<UnixStream> for Silent {
        fn call_received(&mut self, _: &mut Cx<'_, '_, Self>, _: &DbusMessage<'_>) {}
    }

    let (ours, theirs) = socketpair();
    let noter = Noter::default();
    let mut reactor = Reactor::new().unwrap();
    let settings = DbusSettings::default()
        .call_deadline(deadline)
        .max_waiting_calls(most);
    let caller = connection(DbusRole::Client, settings, Caller(noter.clone(), most));
    let silent = connection(DbusRole::Service, DbusSettings::default(), Silent);
    reactor.adopt_unix_stream(ours.into(), caller).unwrap();
    let silent = reactor.adopt_unix_stream(theirs.into(), silent).unwrap();
    settle(&mut reactor);
    if deadline.is_some() {
        run_until(&mut reactor, |_| noter.0.borrow().len() == most + 1);
    }
    reactor.get(silent).unwrap().abort_connection();
    settle(&mut reactor);
    noter.0.take()
}

#[test]
fn call_without_an_answer_ends_with_its_time_or_with_the_connection() {
    let _ledger = DescriptorLedger::open();
    let refused = "frame cannot be made: too many calls wait for their answer, 1 back";
    let late = call_nobody(Some(Duration::from_millis(20)), 2);
    assert_eq!(late, [refused, "0: TimedOut", "1: TimedOut"]);
    let lost = call_nobody(None, 2);
    assert_eq!(lost, [refused, "0: Lost", "1: Lost"]);
}

#[test]
fn client_that_never_authenticates_is_cut_off() {
    let _ledger = DescriptorLedger::open();
    let (ours, mut theirs) = socketpair();
    let noter = Noter::default();
    let mut reactor = Reactor::new().unwrap();
    let settings = DbusSettings::default().authentication_deadline(Duration::from_millis(20));
    let service = connection(DbusRole::Service, settings, noter.clone());
    reactor.adopt_unix_stream(ours.into(), service).unwrap();
    theirs.write_all(b"\0AUTH\r\n").unwrap();
    run_until(&mut reactor, |_| noter.0.borrow().len() == 2);
    assert_eq!(*noter.0.borrow(), ["authentication took too long", "lost"]);
    let mut answer = Vec::new();
    let _ = theirs.read_to_end(&mut answer);
    assert_eq!(answer, b"REJECTED EXTERNAL\r\n");
}

#[test]
fn user_that_the_kernel_does_not_confirm_is_refused() {
    let _ledger = DescriptorLedger::open();
    let (ours, mut theirs) = socketpair();
    let noter = Noter::default();
    let mut reactor = Reactor::new().unwrap();
    let service = connection(DbusRole::Service, DbusSettings::default(), noter.clone());
    reactor.adopt_unix_stream(ours.into(), service).unwrap();
    theirs
        .write_all(b"\0AUTH EXTERNAL 3132333435\r\nBEGIN\r\n")
        .unwrap();
    settle(&mut reactor);
    let what = "authentication failed: a beginning without authentication";
    assert_eq!(*noter.0.borrow(), [what, "lost"]);
}

/// How many bytes have come, with how many descriptors.
fn receive(peer: &StdUnixStream) -> (Vec<u8>, usize) {
    let (mut bytes, mut descriptors) = (Vec::new(), 0);
    let mut buffer = [0; 4_096];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        match recvmsg(peer, parts, &mut control, RecvFlags::DONTWAIT) {
            Ok(received) => bytes.extend(&buffer[..received.bytes]),
            Err(_) => return (bytes, descriptors),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors += fds.count();
            }
        }
    }
}

/// sd-bus ends a connection whose first descriptor comes in the read in which the lines end,
/// and libdbus loses it.
#[test]
fn client_passes_no_descriptor_before_its_peer_has_read_the_lines() {
    struct Eager(Noter);
    impl DbusHandler<UnixStream> for Eager {
        fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
            self.0.note("ready");
            let file = File::open("/dev/null").unwrap().into();
            let header = DbusHeader::call("/a", "Take");
            cx.call(&header, &[], vec![file], |_, _, _| {}).unwrap();
        }
    }

    let _ledger = DescriptorLedger::open();
    let (ours, mut theirs) = socketpair();
    let noter = Noter::default();
    let mut reactor = Reactor::new().unwrap();
    let client = connection(
        DbusRole::Client,
        DbusSettings::default(),
        Eager(noter.clone()),
    );
    reactor.adopt_unix_stream(ours.into(), client).unwrap();
    for line in ["OK 0123\r\n", "AGREE_UNIX_FD\r\n"] {
        theirs.write_all(line.as_bytes()).unwrap();
        settle(&mut reactor);
    }
    // All of this can come in one read.
    let (bytes, descriptors) = receive(&theirs);
    assert_eq!((descriptors, &**noter.0.borrow()), (0, &[][..]));
    let lines = bytes.windows(7).position(|it| it == b"BEGIN\r\n").unwrap() + 7;
    let ping = DbusMessage::parse(&bytes[lines..]).unwrap();
    assert_eq!(ping.header.member, Some("Ping"));
    let mut answer = ping.header;
    (answer.kind, answer.reply_serial) = (DbusKind::Return, Some(ping.serial));
    let mut bytes = Vec::new();
    answer
        .encode(ByteOrder::NATIVE, ping.serial, 0, 0, &mut bytes)
        .unwrap();
    theirs.write_all(&bytes).unwrap();
    settle(&mut reactor);
    assert_eq!(*noter.0.borrow(), ["ready"]);
    assert_eq!(receive(&theirs).1, 1);
}

/// A service that hands out files of memory, and reads those that it is given.
#[derive(Default)]
struct Files {
    name: Rc<RefCell<String>>,
    open: usize,
}

const BUS: &str = "org.freedesktop.DBus";
const NAME: &str = "com.example.Bowline";

impl DbusHandler<UnixStream> for Files {
    fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
        if cx.unique_name().is_empty() {
            return;
        }
        let header = DbusHeader::call("/org/freedesktop/DBus", "RequestName")
            .interface(BUS)
            .destination(BUS);
        let asked = cx.call_with(&header, &(NAME, 0_u32), |files, cx, answer| {
            assert!(matches!(answer, DbusAnswer::Return(_)), "{answer:?}");
            cx.unique_name().clone_into(&mut files.name.borrow_mut());
        });
        asked.unwrap();
    }

    fn call_received(&mut self, cx: &mut Cx<'_, '_, Self>, call: &DbusMessage<'_>) {
        let caller = DbusCaller::of(call);
        let descriptors: Vec<_> = cx.descriptors().collect();
        match call.header.member {
            Some("Open") => {
                let text: String = call.body_as().unwrap();
                self.open += 1;
                let file = memory(&text);
                cx.reply_with(&caller, &zvariant::Fd::from(&file)).unwrap();
            }
            Some("Store") => {
                let body = call.body_with_as(descriptors);
                let (first, second): (zvariant::OwnedFd, zvariant::OwnedFd) = body.unwrap();
                let [first, second] = [first, second].map(|fd| content(OwnedFd::from(fd)));
                cx.reply_with(&caller, &format!("{first} and {second}"))
                    .unwrap();
            }
            _ => {
                let text = "there is no such method";
                cx.reply_error(&caller, "com.example.Error.No", text)
                    .unwrap();
            }
        }
    }
}

/// A bus of the test's own.
fn start_bus(folder: &Path, reactor: &mut Reactor) -> Option<(Program, PathBuf)> {
    if !has("dbus-daemon", "dbus-daemon") {
        return None;
    }
    let (socket, configuration) = (folder.join("bus"), folder.join("bus.conf"));
    let text = format!(
        "<busconfig><type>session</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
         <policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/>\
         <allow eavesdrop=\"true\"/>\
         <allow own=\"*\"/><allow user=\"*\"/></policy></busconfig>",
        socket.display()
    );
    fs::write(&configuration, text).unwrap();
    let mut command = Command::new("dbus-daemon");
    let file = format!("--config-file={}", configuration.display());
    let daemon = Program::start(command.args(["--nofork", "--nosyslog", &file]));
    daemon.wait_for_file(reactor, &socket);
    Some((daemon, socket))
}

/// Our service on the bus, which has its name when this returns.
fn serve(reactor: &mut Reactor, socket: &Path) {
    let files = Files::default();
    let name = Rc::clone(&files.name);
    let service = connection(DbusRole::Bus, DbusSettings::default(), files);
    reactor.connect_unix(socket, Once::new(service)).unwrap();
    run_until(reactor, |_| !name.borrow().is_empty());
}

#[test]
fn client_and_service_of_ours_meet_on_a_real_bus() {
    struct Client(Noter);
    impl DbusHandler<UnixStream> for Client {
        fn ready(&mut self, cx: &mut Cx<'_, '_, Self>) {
            let header = DbusHeader::call("/files", "Open").destination(NAME);
            let asked = cx.call_with(&header, "in memory", |client, cx, answer| {
                let DbusAnswer::Return(reply) = answer else {
                    panic!("{answer:?}")
                };
                let its: Vec<_> = cx.descriptors().collect();
                let file: zvariant::OwnedFd = reply.body_with_as(its).unwrap();
                client.0.note(content(file.into()));
            });
            asked.unwrap();
            let header = DbusHeader::call("/files", "Nothing").destination(NAME);
            let asked = cx.call(&header, &[], Vec::new(), |client, cx, answer| {
                let DbusAnswer::Error(error) = answer else {
                    panic!("{answer:?}")
                };
                let name = error.header.error_name.unwrap();
                client
                    .0
                    .note(format!("{name}: {}", error.error_text().unwrap()));
                cx.transport().lose_connection();
            });
            asked.unwrap();
        }

        fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
            self.0.note("lost");
        }
    }

    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let Some((daemon, socket)) = start_bus(folder.path(), &mut reactor) else {
        return;
    };
    serve(&mut reactor, &socket);
    let before = daemon.open_descriptors();
    for _ in 0..3 {
        let noter = Noter::default();
        let client = connection(
            DbusRole::Bus,
            DbusSettings::default(),
            Client(noter.clone()),
        );
        reactor.connect_unix(&socket, Once::new(client)).unwrap();
        run_until(&mut reactor, |_| noter.0.borrow().len() == 3);
        let error = "com.example.Error.No: there is no such method";
        assert_eq!(*noter.0.borrow(), ["in memory", error, "lost"]);
    }
    daemon.wait_for_descriptors(&mut reactor, before);
}

/// libdbus, by way of Python, through the bus and to our own listener.
const PYTHON: &str = r#"
import dbus, dbus.bus, dbus.connection, os, sys
address, kind = sys.argv[1:3]
if kind == 'bus':
    connection, name = dbus.bus.BusConnection(address), 'com.example.Bowline'
else:
    connection, name = dbus.connection.Connection(address), None
files = dbus.Interface(connection.get_object(name, '/files', introspect=False), 'com.example.Files')
def memory(text):
    fd = os.memfd_create('given')
    os.write(fd, text)
    passed = dbus.types.UnixFd(fd)
    os.close(fd)
    return passed
for number in range(3):
    fd = files.Open('for Python').take()
    print(os.pread(fd, 100, 0).decode())
    os.close(fd)
    print(files.Store(memory(b'one'), memory(b'two')))
try:
    files.Nothing()
except dbus.DBusException as error:
    print(error.get_dbus_name())
before = len(os.listdir('/proc/self/fd'))
files.Store(memory(b'a'), memory(b'b'))
print('leaked', len(os.listdir('/proc/self/fd')) - before)
"#;

fn has_python_dbus() -> bool {
    let script = ["-c", "import dbus"];
    let found = Command::new("/usr/bin/python3").args(script).output();
    if found.is_ok_and(|it| it.status.success()) {
        return true;
    }
    say_missing("python3-dbus", "apt-get install python3-dbus");
    false
}

fn assert_python_is_served(reactor: &mut Reactor, address: &str, kind: &str) {
    let mut command = Command::new("/usr/bin/python3");
    let mut python = Program::start(command.args(["-c", PYTHON, address, kind]));
    let (is_well, said) = python.end(reactor);
    assert!(is_well, "{said}");
    let round = "for Python\none and two\n";
    let end = "com.example.Error.No\nleaked 0\n";
    assert_eq!(said, round.repeat(3) + end);
}

#[test]
fn libdbus_and_our_service_pass_descriptors_on_a_real_bus() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let Some((daemon, socket)) = start_bus(folder.path(), &mut reactor) else {
        return;
    };
    if !has_python_dbus() {
        return;
    }
    serve(&mut reactor, &socket);
    let before = daemon.open_descriptors();
    let address = format!("unix:path={}", socket.display());
    assert_python_is_served(&mut reactor, &address, "bus");
    daemon.wait_for_descriptors(&mut reactor, before);
    // Two that pass none.
    for (program, package, arguments) in [
        (
            "dbus-send",
            "dbus-bin",
            &["--print-reply", "--dest=com.example.Bowline"][..],
        ),
        ("busctl", "systemd", &["introspect", NAME, "/files"]),
    ] {
        if has(program, package) {
            let mut command = Command::new(program);
            match program {
                "dbus-send" => command
                    .arg(format!("--bus={address}"))
                    .args(arguments)
                    .args(["/files", "com.example.Files.Nothing"]),
                _ => command.arg(format!("--address={address}")).args(arguments),
            };
            let (is_well, said) = Program::start(&mut command).end(&mut reactor);
            assert!(
                !is_well && said.contains("no such method"),
                "{program}: {said}"
            );
        }
    }
    daemon.wait_for_descriptors(&mut reactor, before);
}

#[test]
fn libdbus_and_gdbus_speak_to_our_listener() {
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("peers");
    let mut reactor = Reactor::new().unwrap();
    let factory =
        |_: &Address| connection(DbusRole::Service, DbusSettings::default(), Files::default());
    reactor.listen_unix(&socket, factory).unwrap();
    let address = format!("unix:path={}", socket.display());
    if has_python_dbus() {
        assert_python_is_served(&mut reactor, &address, "peer");
    }
    if has("dbus-send", "dbus-bin") {
        let mut command = Command::new("dbus-send");
        let peer = format!("--peer={address}");
        command.args([&*peer, "--print-reply", "/files"]);
        let mut ping = Program::start(command.arg("org.freedesktop.DBus.Peer.Ping"));
        let (is_well, said) = ping.end(&mut reactor);
        assert!(is_well && said.contains("method return"), "{said}");
    }
    if has("gdbus", "libglib2.0-bin") {
        let mut command = Command::new("gdbus");
        command.args(["call", "--address", &address, "--object-path", "/files"]);
        let method = ["--method", "com.example.Files.Nothing"];
        let (is_well, said) = Program::start(command.args(method)).end(&mut reactor);
        assert!(!is_well && said.contains("no such method"), "{said}");
    }
}

/// As its first lines say.
#[test]
fn example_hands_out_sealed_memory() {
    const READ: &str = r#"
import dbus, dbus.bus, fcntl, os, sys
bus = dbus.bus.BusConnection(sys.argv[1])
memory = bus.get_object('com.example.Memory', '/memory', introspect=False)
fd = memory.Open('hello', dbus_interface='com.example.Memory').take()
print(os.pread(fd, 100, 0).decode(), fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 15)
"#;
    let _ledger = DescriptorLedger::open();
    let folder = tempfile::tempdir().unwrap();
    let mut reactor = Reactor::new().unwrap();
    let Some((_daemon, socket)) = start_bus(folder.path(), &mut reactor) else {
        return;
    };
    if !has_python_dbus() {
        return;
    }
    let service = Program::start(
        Command::new(example("dbus_memfd"))
            .arg("--bus")
            .arg(&socket),
    );
    service.wait_for(&mut reactor, "is com.example.Memory");
    let before = service.open_descriptors();
    for _ in 0..2 {
        let address = format!("unix:path={}", socket.display());
        let mut command = Command::new("/usr/bin/python3");
        let mut reader = Program::start(command.args(["-c", READ, &address]));
        let (is_well, said) = reader.end(&mut reactor);
        assert!(is_well, "{said}");
        // Sealed against everything: F_SEAL_SEAL, SHRINK, GROW, WRITE.
        assert_eq!(said, "hello 15\n");
    }
    service.wait_for_descriptors(&mut reactor, before);
}
