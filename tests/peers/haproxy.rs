//! HAProxy, which gives its listeners and takes ours, and single connections either way.

use std::cell::RefCell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use bowline::framing::{
    FrameContext, FrameEncoder as _, FrameReceiver, Framed, Pairing, Unclaimed,
};
use bowline::process::describe_socket;
use bowline::{
    Address, CloseReason, ConnectError, Context, Once, PassedDescriptor, Protocol, Reactor, Tcp,
    Transport, Transports, Unix, UnixAddress, UnixTransport,
};
use bowline_peers::haproxy::{
    GetsocksFramer, GetsocksPart, GivenListener, ListenerName, TakeError, TakenListener,
    give_connection, give_listeners, take_connections, take_listeners,
};

use crate::programs::{PATIENCE, Program, has};
use crate::suite::{Heard, Message, Question, Rule, Sample, Served, send};
use crate::support::{DescriptorLedger, row, run_until, settle, socketpair};

type Taken = Rc<RefCell<Option<Result<Vec<TakenListener>, TakeError>>>>;

/// A configuration that says `served by haproxy` to all that it binds.
pub(crate) fn configuration(global: &str, binds: &str) -> String {
    format!(
        "global\n  nbthread 1\n  {global}\ndefaults\n  mode http\n  timeout client 20s\n  timeout server 20s\n  \
         timeout connect 5s\nfrontend f\n{binds}\n  \
         http-request return status 200 content-type text/plain string \"served by haproxy\"\n"
    )
}

pub(crate) fn haproxy(directory: &Path, configuration: &str) -> Command {
    let path = directory.join("haproxy.cfg");
    fs::write(&path, configuration).expect("written");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(path);
    command
}

fn port_of(listener: &TcpListener) -> u16 {
    listener.local_addr().expect("it is bound").port()
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    port_of(&TcpListener::bind("127.0.0.1:0").expect("a port is free"))
}

/// Asks over this connection, and returns all that is answered.
fn ask(mut stream: impl std::io::Read + std::io::Write) -> String {
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        .expect("it is connected");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn ask_port(port: u16) -> String {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it can");
    ask(stream)
}

/// Starts, and waits until its stats socket is there.
#[track_caller]
fn started(reactor: &mut Reactor, command: &mut Command, stats: &Path) -> Program {
    let mut program = Program::start(command);
    program.wait_for_listener(reactor, stats);
    program
}

fn take(reactor: &mut Reactor, path: &Path) -> Taken {
    let taken = Taken::default();
    let shared = Rc::clone(&taken);
    let taker = take_listeners(move |_, result| *shared.borrow_mut() = Some(result));
    let once = Once::new(taker).on_failure(|_, _, error: &ConnectError| {
        panic!("not connected: {error}");
    });
    reactor.connect_unix(path, once).expect("room");
    run_until(reactor, |_| taken.borrow().is_some());
    taken
}

/// Answers, in place of HAProxy, and says so.
struct Instead;

impl<T: Transport> Protocol<T> for Instead {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        if data.ends_with(b"\r\n\r\n") {
            cx.transport
                .write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nserved by bowline");
            cx.transport.lose_connection();
        }
    }
}

#[test]
fn listeners_of_haproxy_are_taken_and_served() {
    let _ledger = DescriptorLedger::open();
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let (stats, path) = (directory.path().join("stats"), directory.path().join("p"));
    let name = format!("bowline-{}", std::process::id());
    let ports = [free_port(), free_port()];
    let configuration = configuration(
        &format!(
            "stats socket {} mode 600 level admin expose-fd listeners",
            stats.display()
        ),
        &format!(
            "  bind 127.0.0.1:{}\n  bind 127.0.0.1:{} interface lo\n  bind {}\n  bind abns@{name}",
            ports[0],
            ports[1],
            path.display()
        ),
    );
    let mut reactor = Reactor::new().expect("a reactor");
    let mut command = haproxy(directory.path(), &configuration);
    let mut program = started(&mut reactor, &mut command, &stats);
    assert!(ask_port(ports[0]).ends_with("served by haproxy"));
    let before = program.open_descriptors();

    for _ in 0..3 {
        take(&mut reactor, &stats);
    }
    let taken = take(&mut reactor, &stats);
    let taken = taken
        .borrow_mut()
        .take()
        .expect("told")
        .expect("all of them");
    let expected = [
        Address::Unix(UnixAddress::Path(stats.clone())),
        Address::Inet(SocketAddr::from(([127, 0, 0, 1], ports[0]))),
        Address::Inet(SocketAddr::from(([127, 0, 0, 1], ports[1]))),
        Address::Unix(UnixAddress::Path(path)),
        Address::Unix(UnixAddress::Abstract(name.into_bytes())),
    ];
    for address in expected {
        let found = taken
            .iter()
            .find(|it| it.address() == Some(address.clone()));
        let found = found.unwrap_or_else(|| panic!("no {address:?} in {taken:?}"));
        assert!(found.socket.is_listening);
        let is_second = address.as_inet().is_some_and(|it| it.port() == ports[1]);
        let interface = if is_second { &b"lo"[..] } else { b"" };
        assert_eq!(found.name.interface, interface, "{address:?}");
        assert_eq!(found.name.namespace, b"");
    }
    assert_eq!(taken.len(), 5);
    program.wait_for_descriptors_at_most(&mut reactor, before);

    // It goes, and what comes to the same sockets is served here.
    let pid = rustix::process::Pid::from_raw(program.pid().cast_signed()).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::USR1).expect("it runs");
    program.end(&mut reactor);
    let mut listeners = Vec::new();
    for it in taken {
        if let Some(Address::Inet(_)) = it.address() {
            let here = Tcp::listening(it.fd);
            let served = reactor.listen(here, |_: &Address| Instead);
            listeners.push(served.expect("it listens"));
        }
    }
    for port in ports {
        let asking = thread::spawn(move || ask_port(port));
        run_until(&mut reactor, |_| asking.is_finished());
        let answer = asking.join().expect("no panic");
        assert!(answer.ends_with("served by bowline"), "{answer}");
    }
    for listener in listeners {
        reactor.get(listener).expect("it listens").stop_listening();
    }
    settle(&mut reactor);
}

#[test]
fn haproxy_that_exposes_nothing_is_said_to_refuse() {
    let _ledger = DescriptorLedger::open();
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let stats = directory.path().join("stats");
    let configuration = configuration(
        &format!("stats socket {} mode 600 level admin", stats.display()),
        &format!("  bind 127.0.0.1:{}", free_port()),
    );
    let mut reactor = Reactor::new().expect("a reactor");
    let mut command = haproxy(directory.path(), &configuration);
    let _program = started(&mut reactor, &mut command, &stats);
    let taken = take(&mut reactor, &stats);
    let taken = taken.borrow_mut().take().expect("told");
    assert!(matches!(taken, Err(TakeError::Refused)), "{taken:?}");
}

/// Gives what is listed, as often as it is asked.
fn giver(
    reactor: &mut Reactor,
    path: &Path,
    batch: usize,
    listeners: Vec<(Rc<OwnedFd>, ListenerName)>,
) -> bowline::ListenerHandle {
    let listeners = Rc::new(listeners);
    let here = Unix::at(path).mode(0o600);
    let factory = move |_: &Address| {
        let listeners = Rc::clone(&listeners);
        let mut giver = give_listeners(move |_| {
            let given = |(fd, name): &(Rc<OwnedFd>, ListenerName)| GivenListener {
                fd: PassedDescriptor::shared(fd),
                name: name.clone(),
            };
            listeners.iter().map(given).collect()
        });
        giver.receiver_mut().set_max_batch(batch);
        giver
    };
    reactor.listen(here, factory).expect("it listens")
}

#[test]
fn haproxy_takes_our_listeners_in_batches_of_any_size() {
    let _ledger = DescriptorLedger::open();
    if !has("haproxy", "haproxy") {
        return;
    }
    let mut reactor = Reactor::new().expect("a reactor");
    for batch in [252, 2] {
        let directory = tempfile::tempdir().expect("a folder");
        let (stats, from) = (
            directory.path().join("stats"),
            directory.path().join("from"),
        );
        // Bound here and nowhere else: without ours it could not start.
        let listeners: Vec<_> = (0..5)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a port is free"))
            .collect();
        let ports: Vec<_> = listeners.iter().map(port_of).collect();
        let given = listeners
            .into_iter()
            .map(|it| (Rc::new(OwnedFd::from(it)), ListenerName::default()))
            .collect();
        let listener = giver(&mut reactor, &from, batch, given);
        let binds: Vec<_> = ports
            .iter()
            .map(|port| format!("  bind 127.0.0.1:{port}\n"))
            .collect();
        let configuration = configuration(
            &format!("stats socket {} mode 600 level admin", stats.display()),
            &binds.concat(),
        );
        let mut command = haproxy(directory.path(), &configuration);
        command.arg("-x").arg(&from);
        let program = started(&mut reactor, &mut command, &stats);
        let asked = || {
            for port in &ports {
                let answer = ask_port(*port);
                assert!(answer.ends_with("served by haproxy"), "{answer}");
            }
        };
        // Its threads have opened theirs when all have answered.
        asked();
        let before = program.open_descriptors();
        asked();
        program.wait_for_descriptors_at_most(&mut reactor, before);
        reactor.get(listener).expect("it listens").stop_listening();
        settle(&mut reactor);
    }
}

#[test]
fn what_is_given_is_taken_in_batches_of_any_size() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("from");
    for (batch, count) in [
        (252, 0),
        (252, 1),
        (252, 252),
        (252, 253),
        (252, 600),
        (1, 7),
    ] {
        let given: Vec<_> = (0..count)
            .map(|index| {
                let listener = UnixListener::bind(directory.path().join(index.to_string()));
                let name = ListenerName {
                    // Long ones, so that a batch is more than one read takes.
                    namespace: vec![b'n'; 255],
                    interface: index.to_string().into_bytes(),
                };
                (Rc::new(OwnedFd::from(listener.expect("a path"))), name)
            })
            .collect();
        let listener = giver(&mut reactor, &path, batch, given.clone());
        let taken = take(&mut reactor, &path);
        let taken = taken
            .borrow_mut()
            .take()
            .expect("told")
            .expect("all of them");
        assert_eq!(taken.len(), count);
        for (index, (taken, (fd, name))) in taken.iter().zip(&given).enumerate() {
            assert_eq!(&taken.name, name, "the {index}th of {count}");
            let given = describe_socket(fd.as_fd()).expect("a socket");
            assert_eq!(taken.socket, given, "the {index}th of {count}");
        }
        drop((taken, given));
        reactor.get(listener).expect("it listens").stop_listening();
        settle(&mut reactor);
        for index in 0..count {
            fs::remove_file(directory.path().join(index.to_string())).expect("it is there");
        }
    }
    drop(reactor);
    ledger.assert_balanced();
}

#[test]
fn other_requests_are_refused_in_words() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let directory = tempfile::tempdir().expect("a folder");
    let path = directory.path().join("from");
    let listener = giver(&mut reactor, &path, 252, Vec::new());
    let mut stream = StdUnixStream::connect(&path).expect("it listens");
    stream.write_all(b"show info\n").expect("it is connected");
    let reading = thread::spawn(move || {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an end");
        answer
    });
    run_until(&mut reactor, |_| reading.is_finished());
    let answer = reading.join().expect("no panic");
    assert!(answer.contains("_getsocks"), "{answer}");
    reactor.get(listener).expect("it listens").stop_listening();
    settle(&mut reactor);
}

#[test]
fn who_does_not_answer_is_given_up() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let taken = Taken::default();
    let shared = Rc::clone(&taken);
    let mut taker = take_listeners(move |_, result| *shared.borrow_mut() = Some(result));
    taker.receiver_mut().set_deadline(Duration::from_millis(20));
    reactor.adopt(Unix, ours.into(), taker).expect("a socket");
    run_until(&mut reactor, |_| taken.borrow().is_some());
    let taken = taken.borrow_mut().take().expect("told");
    assert!(matches!(taken, Err(TakeError::TimedOut)), "{taken:?}");
    drop(theirs);
}

/// Keeps what it receives.
#[derive(Default)]
struct Keep(Rc<RefCell<(String, bool)>>);

impl<T: Transport> Protocol<T> for Keep {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        let text = String::from_utf8_lossy(data);
        self.0.borrow_mut().0.push_str(&text);
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        self.0.borrow_mut().1 = true;
    }
}

/// Only the socket, to give connections through.
struct Nothing;

impl<T: Transport> Protocol<T> for Nothing {
    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

#[test]
fn haproxy_serves_connections_that_are_given_to_it() {
    let _ledger = DescriptorLedger::open();
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let stats = directory.path().join("stats");
    let global = format!("stats socket {} mode 600 level admin", stats.display());
    let configuration = configuration(&global, "  bind sockpair@7");
    let mut reactor = Reactor::new().expect("a reactor");
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let program = started_with(
        &mut reactor,
        directory.path(),
        &configuration,
        &stats,
        theirs,
    );
    let pair = reactor.adopt(Unix, ours.into(), Nothing).expect("a socket");
    let mut before = None;
    for _ in 0..5 {
        let said = Rc::default();
        let pair = reactor.get(pair).expect("it is connected");
        let fd = give_connection(pair).expect("a pair");
        let connection = reactor.adopt(Unix, fd, Keep(Rc::clone(&said)));
        let connection = connection.expect("a socket");
        let request = b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n";
        reactor
            .get(connection)
            .expect("it is connected")
            .write(request);
        run_until(&mut reactor, |_| said.borrow().1);
        let (answer, _) = &*said.borrow();
        assert!(answer.ends_with("served by haproxy"), "{answer}");
        before.get_or_insert_with(|| program.open_descriptors());
    }
    program.wait_for_descriptors_at_most(&mut reactor, before.expect("of five"));
    reactor
        .get(pair)
        .expect("it is connected")
        .abort_connection();
    settle(&mut reactor);
}

#[test]
fn connections_of_haproxy_are_taken() {
    let _ledger = DescriptorLedger::open();
    if !has("haproxy", "haproxy") {
        return;
    }
    let directory = tempfile::tempdir().expect("a folder");
    let stats = directory.path().join("stats");
    let port = free_port();
    let configuration = format!(
        "global\n  nbthread 1\n  stats socket {} mode 600 level admin\ndefaults\n  mode http\n  \
         timeout client 20s\n  timeout server 20s\n  timeout connect 5s\nlisten l\n  \
         bind 127.0.0.1:{port}\n  server s sockpair@7\n",
        stats.display()
    );
    let mut reactor = Reactor::new().expect("a reactor");
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let program = started_with(
        &mut reactor,
        directory.path(),
        &configuration,
        &stats,
        theirs,
    );
    let takes = take_connections(|reactor, fd| {
        reactor.adopt(Unix, fd, Instead).expect("a stream");
    });
    let pair = reactor.adopt(Unix, ours.into(), takes).expect("a socket");
    let mut before = None;
    for _ in 0..5 {
        let asking = thread::spawn(move || ask_port(port));
        run_until(&mut reactor, |_| asking.is_finished());
        let answer = asking.join().expect("no panic");
        assert!(answer.ends_with("served by bowline"), "{answer}");
        // What it opens once is there with the first answer.
        before.get_or_insert_with(|| program.open_descriptors());
    }
    program.wait_for_descriptors_at_most(&mut reactor, before.expect("of five"));
    reactor
        .get(pair)
        .expect("it is connected")
        .abort_connection();
    settle(&mut reactor);
}

/// Starts it with this socket as its descriptor 7.
#[track_caller]
fn started_with(
    reactor: &mut Reactor,
    directory: &Path,
    configuration: &str,
    stats: &Path,
    socket: StdUnixStream,
) -> Program {
    let command = haproxy(directory, configuration);
    let mut program = Program::start_with(command, &[(socket.as_fd(), 7)]);
    drop(socket);
    program.wait_for_listener(reactor, stats);
    program
}

#[test]
fn what_is_no_connection_is_closed_and_the_next_is_taken() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a reactor");
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let taken = Rc::new(RefCell::new(Vec::new()));
    let shared = Rc::clone(&taken);
    let takes = take_connections(move |_, fd| shared.borrow_mut().push(fd));
    reactor.adopt(Unix, ours.into(), takes).expect("a socket");
    let giving = reactor
        .adopt(Unix, theirs.into(), Nothing)
        .expect("a socket");
    let transport: &mut dyn UnixTransport = reactor.get(giving).expect("connected");
    let file = fs::File::open("/dev/null").expect("Linux has it");
    transport
        .write_with_descriptors(b"\0\0", vec![file.into()])
        .expect("one");
    let end = give_connection(transport).expect("a pair");
    run_until(&mut reactor, |_| !taken.borrow().is_empty());
    let taken = taken.borrow_mut().pop().expect("one");
    StdUnixStream::from(end).write_all(b"x").expect("connected");
    let mut byte = [0];
    StdUnixStream::from(taken)
        .read_exact(&mut byte)
        .expect("it is the other end");
    reactor.get(giving).expect("connected").abort_connection();
    run_until(&mut reactor, |reactor| reactor.get(giving).is_none());
    settle(&mut reactor);
}

/// Records, each told as it comes.
#[derive(Clone, Copy)]
struct Records;

struct Teller(Heard);

impl<T: UnixTransport> FrameReceiver<T, GetsocksFramer> for Teller {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, GetsocksFramer>, frame: &[u8]) {
        if cx.framing.framer().part() == GetsocksPart::Count {
            let records = GetsocksPart::Records;
            return cx.framing.framer_mut().set_part(records);
        }
        let ListenerName { interface, .. } = ListenerName::of(frame);
        let text = String::from_utf8(interface).expect("text");
        self.0.message(text, cx.framing.descriptors());
    }
}

fn record(interface: &str) -> Message {
    let framer = GetsocksFramer::new(GetsocksPart::Records);
    let (namespace, interface) = (b"blue".to_vec(), interface.as_bytes().to_vec());
    let name = ListenerName {
        namespace,
        interface: interface.clone(),
    };
    let mut bytes = Vec::new();
    framer.encode(&name, b"", 1, &mut bytes).expect("short");
    Message::new(bytes, 1, String::from_utf8(interface).expect("text"))
}

impl Sample for Records {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let framer = GetsocksFramer::new(GetsocksPart::Count);
        let framed =
            Framed::new(framer, Teller(heard.clone())).pairing(Pairing::Claimed(Unclaimed::Fail));
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn prelude(&self) -> Vec<Vec<u8>> {
        vec![4_i32.to_ne_bytes().into()]
    }

    fn messages(&self) -> Vec<Message> {
        ["eth0", "eth1", "lo", "br0"].map(record).into()
    }

    fn unasked(&self) -> Vec<(Question, &'static str)> {
        vec![
            (Question::Stray, "none is plain"),
            (Question::Limit, "none but the format's"),
        ]
    }
}

suite!(records, Records, asks cut early late sets few many lines last);

/// Messages of `sockpair@`: all are two bytes, and own one.
struct Connections;

impl Sample for Connections {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let heard = heard.clone();
        let takes = take_connections(move |_, fd| heard.message("connection", [fd]));
        Served::by(|socket| reactor.adopt(Unix, socket, takes).expect("a socket"))
    }

    fn messages(&self) -> Vec<Message> {
        vec![Message::new([0, 0], 1, "connection"); 3]
    }

    fn descriptor(&self) -> OwnedFd {
        StdUnixStream::pair().expect("a pair").0.into()
    }

    fn unasked(&self) -> Vec<(Question, &'static str)> {
        vec![
            (Question::Stray, "none is plain"),
            (Question::Limit, "none but the format's"),
            (Question::Lines, "no lines"),
        ]
    }
}

suite!(connections, Connections, asks cut early late sets few many last);

/// What a peer sends in one call: bytes, and so many listeners.
type Sent = (Vec<u8>, usize);

/// What comes of these answers to `_getsocks`, and of the end of the connection.
#[track_caller]
fn taken_from(sent: &[Sent]) -> Result<usize, TakeError> {
    let ledger = DescriptorLedger::open();
    let outcome = {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, theirs) = socketpair();
        let taken = Taken::default();
        let shared = Rc::clone(&taken);
        let taker = take_listeners(move |_, result| *shared.borrow_mut() = Some(result));
        reactor.adopt(Unix, ours.into(), taker).expect("a socket");
        settle(&mut reactor);
        for (bytes, count) in sent {
            if taken.borrow().is_some() {
                break;
            }
            let listeners: Vec<_> = (0..*count).map(|_| listening()).collect();
            let borrowed: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
            send(&theirs, bytes, &borrowed);
            settle(&mut reactor);
        }
        // What is unread would make a reset of the end.
        let mut request = [0; 64];
        let _ = (&theirs).read(&mut request);
        drop(theirs);
        run_until(&mut reactor, |_| taken.borrow().is_some());
        let taken = taken.borrow_mut().take().expect("told");
        taken.map(|taken| taken.len())
    };
    ledger.assert_balanced();
    outcome
}

fn listening() -> OwnedFd {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.into()
}

/// A number as the peer says it.
fn int(number: i32) -> Vec<u8> {
    number.to_ne_bytes().into()
}

#[test]
fn what_is_too_few_or_too_many_is_no_answer() {
    let records = |count: usize| record("lo").bytes.repeat(count);
    let together = [int(2), records(2)].concat();
    for (sent, count) in [
        (vec![(int(2), 0), (records(2), 2)], 2),
        (vec![(together.clone(), 2)], 2),
        (vec![(int(2), 0), (records(1), 2), (records(1), 0)], 2),
        (vec![(int(3), 0), (records(2), 2), (records(1), 1)], 3),
    ] {
        let _row = row(&sent);
        assert_eq!(taken_from(&sent).expect("all of them"), count);
    }
    for (sent, expected) in [
        (vec![], "gives no listeners"),
        (vec![(int(2), 0), (records(1), 1)], "gave 1 of 2"),
        (vec![(int(2), 0), (records(2), 1)], "keep to the protocol"),
        (vec![(int(2), 0), (records(2), 3)], "keep to the protocol"),
        (vec![(together, 3)], "keep to the protocol"),
        (vec![(int(2), 1), (records(2), 2)], "keep to the protocol"),
        (vec![(int(-1), 0)], "-1 listeners"),
        (vec![(int(65_537), 0)], "65537 listeners, 65536 are allowed"),
    ] {
        let _row = row(&sent);
        let error = taken_from(&sent).expect_err("it is wrong").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn who_asks_may_not_send_descriptors() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        for with_descriptor in 0..2 {
            let (ours, theirs) = socketpair();
            let gives = |_: &mut Reactor| (0..3).map(|_| listening().into()).collect();
            let mut giver = give_listeners(gives);
            giver.receiver_mut().set_max_batch(1);
            let giver = reactor.adopt(Unix, ours.into(), giver).expect("a socket");
            for (number, bytes) in [&b"_getsocks\n"[..], &[0; 4]].into_iter().enumerate() {
                let stray = listening();
                let strays = [stray.as_fd()];
                let is_it = number == with_descriptor;
                send(&theirs, bytes, if is_it { &strays } else { &[] });
                settle(&mut reactor);
                if is_it {
                    break;
                }
            }
            assert!(reactor.get(giver).is_none(), "refused at {with_descriptor}");
        }
    }
    ledger.assert_balanced();
}
