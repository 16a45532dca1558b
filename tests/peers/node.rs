//! Node as the parent of a child of ours, as a child, and as the primary of a cluster.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::Command;
use std::rc::Rc;

use bowline::{
    CloseReason, Reactor, Transports, Unix, UnixStream, UnixTransport, UnixTransportHandle,
};
use bowline_peers::node::{
    NodeChannel, NodeContext, NodeFramer, NodeHandle, NodeHandleKind, NodePeer, NodeSendErrorKind,
    OutgoingHandle, channel, channel_of,
};
use rustix::fs::MemfdFlags;

use crate::programs::{PATIENCE, Program, has};
use crate::suite::{Heard, Limit, Message, Outcome, Rule, Sample, Served, Trial, send};
use crate::support::{DescriptorLedger, run_until, settle, socketpair};

/// Tells what it hears.
#[derive(Clone)]
struct Teller(Heard);

impl<T: UnixTransport> NodePeer<T> for Teller {
    fn message_received(&mut self, _: &mut NodeContext<'_, T>, message: &str) {
        self.0.message(message, []);
    }

    fn handle_received(&mut self, _: &mut NodeContext<'_, T>, message: &str, handle: NodeHandle) {
        let text = format!("{} {message}", handle.kind.name());
        self.0.message(text, [handle.fd]);
    }
}

/// What a Node sends.
struct Lines;

/// How many bytes a line of the suite may have.
const LONGEST: usize = 4_096;

fn with_handle(message: &str) -> Message {
    let line = format!("{{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Native\",\"msg\":{message}}}\n");
    Message::new(line, 1, format!("net.Native {message}"))
}

fn plain(message: &str) -> Message {
    Message::new(format!("{message}\n"), 0, message)
}

impl Sample for Lines {
    fn rule(&self) -> Rule {
        Rule::Claimed
    }

    fn serve(&self, reactor: &mut Reactor, heard: &Heard) -> Served {
        let framer = NodeFramer::new().with_max_length(LONGEST);
        let framed = channel_of(framer, Teller(heard.clone()));
        Served::by(|socket| reactor.adopt(Unix, socket, framed).expect("a socket"))
    }

    fn messages(&self) -> Vec<Message> {
        vec![
            plain("{\"hello\":1}"),
            with_handle("\"one\""),
            plain("\"NODE_HANDLE, it says\""),
            with_handle("[2]"),
        ]
    }

    fn outcome(&self, trial: Trial) -> Outcome {
        match trial {
            // One too many shifts nothing, in Node neither.
            Trial::SecondSet | Trial::TooMany | Trial::Stray => Outcome::Paired,
            // It is sent again.
            Trial::TooFew => Outcome::Dropped,
            _ => self.rule().outcome(trial),
        }
    }

    fn limits(&self) -> Vec<Limit> {
        let of = |length| {
            // The line feed is not counted.
            let rest = with_handle("\"\"").bytes.len() - 1;
            with_handle(&format!("\"{}\"", "x".repeat(length - rest)))
        };
        vec![Limit {
            of: "bytes",
            within: of(LONGEST),
            beyond: of(LONGEST + 1),
        }]
    }
}

suite!(lines, Lines);

/// What our end writes, read at the other.
fn answers(peer: &StdUnixStream) -> String {
    let mut text = [0; 4_096];
    match (&mut &*peer).read(&mut text) {
        Ok(count) => String::from_utf8_lossy(&text[..count]).into_owned(),
        Err(_) => String::new(),
    }
}

type Channel = NodeChannel<Teller>;

fn with_channel(
    reactor: &mut Reactor,
    handle: UnixTransportHandle,
    act: impl FnOnce(&mut NodeContext<'_, UnixStream>) + 'static,
) {
    reactor.call_protocol::<UnixStream, Channel>(handle, |channel, cx| {
        channel.call(cx, |_, cx| act(cx));
    });
    settle(reactor);
}

const ACK: &str = "{\"cmd\":\"NODE_HANDLE_ACK\"}\n";
const NACK: &str = "{\"cmd\":\"NODE_HANDLE_NACK\"}\n";

/// One end of a pair; whether the other is still open tells who has it.
fn pair() -> (StdUnixStream, OwnedFd) {
    let (kept, passed) = socketpair();
    (kept, passed.into())
}

#[test]
fn handle_is_acknowledged_at_once_and_one_without_is_refused() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, peer) = socketpair();
        let teller = channel(Teller(Heard::default()));
        let handle = reactor.adopt(Unix, ours.into(), teller).expect("a socket");
        // A handle of ours is in flight, and something waits behind it.
        let (_kept, passed) = pair();
        with_channel(&mut reactor, handle, |cx| {
            let passed = OutgoingHandle::new(NodeHandleKind::Socket, passed);
            cx.send_handle("1", passed).expect("JSON");
            cx.send("\"behind\"").expect("JSON");
            assert_eq!(cx.waiting(), 2);
        });
        let sent = "{\"cmd\":\"NODE_HANDLE\",\"type\":\"net.Socket\",\"msg\":1}\n";
        assert_eq!(answers(&peer), sent);
        // Answers pass it.
        let with_one = with_handle("2");
        let (_kept, passed) = pair();
        send(&peer, &with_one.bytes, &[passed.as_fd()]);
        send(&peer, &with_one.bytes, &[]);
        settle(&mut reactor);
        assert_eq!(answers(&peer), format!("{ACK}{NACK}"));
        send(&peer, ACK.as_bytes(), &[]);
        settle(&mut reactor);
        assert_eq!(answers(&peer), "\"behind\"\n");
        drop(peer);
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

#[test]
fn handle_is_sent_four_times_and_given_up() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, peer) = socketpair();
        let teller = channel(Teller(Heard::default()));
        let handle = reactor.adopt(Unix, ours.into(), teller).expect("a socket");
        let (kept, passed) = pair();
        with_channel(&mut reactor, handle, |cx| {
            let passed = OutgoingHandle::new(NodeHandleKind::Native, passed);
            cx.send_handle("1", passed).expect("JSON");
            cx.send("2").expect("JSON");
        });
        for _ in 0..4 {
            assert!(answers(&peer).contains("\"msg\":1"));
            let mut byte = [0];
            assert!(
                (&kept).read(&mut byte).is_err(),
                "it is open, and has said nothing"
            );
            send(&peer, NACK.as_bytes(), &[]);
            settle(&mut reactor);
        }
        assert_eq!(answers(&peer), "2\n", "what was said later follows");
        assert!(matches!((&kept).read(&mut [0]), Ok(0)), "nobody has it");
        drop(peer);
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

#[test]
fn what_node_would_not_survive_is_refused_and_comes_back() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, peer) = socketpair();
        let teller = channel(Teller(Heard::default()));
        let handle = reactor.adopt(Unix, ours.into(), teller).expect("a socket");
        with_channel(&mut reactor, handle, |cx| {
            let memory = rustix::fs::memfd_create("m", MemfdFlags::CLOEXEC).expect("a number");
            let file = File::open("/proc/self/comm").expect("Linux has it");
            for fd in [memory, file.into()] {
                let handle = OutgoingHandle::new(NodeHandleKind::Native, fd);
                let error = cx.send_handle("1", handle).expect_err("no socket");
                assert_eq!(error.kind, NodeSendErrorKind::NotPassable);
                assert!(error.handle.is_some());
            }
            let (reader, _writer) = std::io::pipe().expect("a pipe");
            for (text, kind) in [
                ("{", NodeSendErrorKind::NotJson),
                ("", NodeSendErrorKind::NotJson),
                ("1 2", NodeSendErrorKind::NotJson),
                ("[1,\n2]", NodeSendErrorKind::LineFeed),
            ] {
                assert_eq!(cx.send(text).expect_err(text).kind, kind);
                let reader = reader.try_clone().expect("a number");
                let handle = OutgoingHandle::new(NodeHandleKind::Native, OwnedFd::from(reader));
                let error = cx.send_handle(text, handle).expect_err(text);
                assert_eq!(error.kind, kind);
            }
            let handle = OutgoingHandle::new(NodeHandleKind::Native, OwnedFd::from(reader));
            cx.send_handle("1", handle).expect("a pipe may go");
        });
        assert!(answers(&peer).starts_with("{\"cmd\":\"NODE_HANDLE\""));
        drop(peer);
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

#[test]
fn what_waits_behind_a_handle_is_bounded() {
    let ledger = DescriptorLedger::open();
    {
        let mut reactor = Reactor::new().expect("a reactor");
        let (ours, peer) = socketpair();
        let mut teller = channel(Teller(Heard::default()));
        teller.receiver_mut().set_max_queued(200);
        let handle = reactor.adopt(Unix, ours.into(), teller).expect("a socket");
        with_channel(&mut reactor, handle, |cx| {
            let native = |fd| OutgoingHandle::new(NodeHandleKind::Native, fd);
            cx.send_handle("1", native(pair().1)).expect("JSON");
            let text = format!("\"{}\"", "x".repeat(97));
            cx.send(&text).expect("100 bytes wait");
            cx.send(&text).expect("200 bytes wait");
            let error = cx.send("1").expect_err("full");
            assert_eq!(error.kind, NodeSendErrorKind::QueueFull);
            let error = cx.send_handle("1", native(pair().1)).expect_err("full");
            assert_eq!(error.kind, NodeSendErrorKind::QueueFull);
            assert!(error.handle.is_some());
        });
        drop(peer);
        run_until(&mut reactor, |reactor| reactor.get(handle).is_none());
    }
    ledger.assert_balanced();
}

/// A child of a Node: answers messages, writes to the sockets that it is sent and sends
/// them back.
#[derive(Default)]
struct Shared {
    messages: Vec<String>,
    sockets: Vec<NodeHandle>,
    is_lost: bool,
}

struct Ours(Rc<RefCell<Shared>>);

impl<T: UnixTransport> NodePeer<T> for Ours {
    fn message_received(&mut self, _: &mut NodeContext<'_, T>, message: &str) {
        self.0.borrow_mut().messages.push(message.to_owned());
    }

    fn handle_received(&mut self, _: &mut NodeContext<'_, T>, message: &str, handle: NodeHandle) {
        let mut shared = self.0.borrow_mut();
        shared.messages.push(message.to_owned());
        shared.sockets.push(handle);
    }

    fn connection_lost(&mut self, _: &mut Reactor, _: &CloseReason) {
        self.0.borrow_mut().is_lost = true;
    }
}

/// A Node that runs this text, with a channel to us; the program, and our end of it.
fn node(
    reactor: &mut Reactor,
    script: &str,
) -> (Program, Rc<RefCell<Shared>>, UnixTransportHandle) {
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    let mut command = Command::new("node");
    command
        .args(["-e", script])
        .env("NODE_CHANNEL_FD", "3")
        .env("NODE_CHANNEL_SERIALIZATION_MODE", "json");
    let program = Program::start_with(command, &[(theirs.as_fd(), 3)]);
    let shared = Rc::default();
    let peer = channel(Ours(Rc::clone(&shared)));
    let handle = reactor.adopt(Unix, ours.into(), peer).expect("a socket");
    (program, shared, handle)
}

fn with_ours(
    reactor: &mut Reactor,
    handle: UnixTransportHandle,
    act: impl FnOnce(&mut NodeContext<'_, UnixStream>) + 'static,
) {
    reactor.call_protocol::<UnixStream, NodeChannel<Ours>>(handle, |channel, cx| {
        channel.call(cx, |_, cx| act(cx));
    });
}

/// Asks what the other end has written.
fn read_to_end(mut stream: impl std::io::Read) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an end");
    text
}

#[test]
fn child_of_node_answers_serves_sockets_and_gives_them_back() {
    let _ledger = DescriptorLedger::open();
    if !has("node", "nodejs") {
        return;
    }
    let mut reactor = Reactor::new().expect("a reactor");
    let script = "process.on('message', (message, handle) => {
        if (message === 'end') return process.disconnect();
        if (message === 'back') return process.send('yours', handle);
        if (handle) return handle.end('served by node ' + JSON.stringify(message));
        process.send({ heard: message });
    });
    process.send('ready');";
    let (mut program, shared, handle) = node(&mut reactor, script);
    run_until(&mut reactor, |_| !shared.borrow().messages.is_empty());
    let before = program.open_descriptors();
    with_ours(&mut reactor, handle, |cx| {
        cx.send("{\"text\":\"\u{e4}\",\"n\":[1,2]}").expect("JSON");
    });
    run_until(&mut reactor, |_| shared.borrow().messages.len() == 2);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    // Several at once: each waits for the one before to be acknowledged.
    let clients: Vec<_> = (0..5)
        .map(|number| {
            let client = TcpStream::connect(address).expect("it listens");
            client.set_read_timeout(Some(PATIENCE)).expect("it can");
            let accepted = OwnedFd::from(listener.accept().expect("one waits").0);
            with_ours(&mut reactor, handle, move |cx| {
                let socket = OutgoingHandle::new(NodeHandleKind::Socket, accepted);
                cx.send_handle(&number.to_string(), socket)
                    .expect("a socket");
            });
            client
        })
        .collect();
    for (number, client) in clients.into_iter().enumerate() {
        let reading = std::thread::spawn(move || read_to_end(client));
        run_until(&mut reactor, |_| reading.is_finished());
        let text = reading.join().expect("no panic");
        assert_eq!(text, format!("served by node {number}"));
    }
    let (kept, passed) = pair();
    with_ours(&mut reactor, handle, |cx| {
        let socket = OutgoingHandle::new(NodeHandleKind::Socket, passed);
        cx.send_handle("\"back\"", socket).expect("a socket");
    });
    run_until(&mut reactor, |_| !shared.borrow().sockets.is_empty());
    let back = shared.borrow_mut().sockets.pop().expect("one");
    assert_eq!(back.kind, NodeHandleKind::Socket);
    StdUnixStream::from(back.fd)
        .write_all(b"x")
        .expect("connected");
    run_until(&mut reactor, |_| matches!((&kept).read(&mut [0]), Ok(1)));
    program.wait_for_descriptors_at_most(&mut reactor, before);
    assert_eq!(
        shared.borrow().messages,
        [
            "\"ready\"",
            "{\"heard\":{\"text\":\"\u{e4}\",\"n\":[1,2]}}",
            "\"yours\""
        ]
    );
    with_ours(&mut reactor, handle, |cx| drop(cx.send("\"end\"")));
    let (is_well, said) = program.end(&mut reactor);
    assert!(is_well, "{said}");
    run_until(&mut reactor, |_| shared.borrow().is_lost);
}

#[test]
fn listener_is_served_by_node_and_sent_back() {
    let _ledger = DescriptorLedger::open();
    if !has("node", "nodejs") {
        return;
    }
    let mut reactor = Reactor::new().expect("a reactor");
    let script = "process.on('message', (message, server) => {
        if (!server) return process.disconnect();
        server.on('connection', (socket) => {
            socket.end('accepted by node');
            process.send('yours', server, () => server.close());
        });
    });";
    let (mut program, shared, handle) = node(&mut reactor, script);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    with_ours(&mut reactor, handle, |cx| {
        let server = OutgoingHandle::new(NodeHandleKind::Server, OwnedFd::from(listener));
        cx.send_handle("null", server).expect("a socket");
    });
    let asking = std::thread::spawn(move || {
        let client = TcpStream::connect(address).expect("it listens");
        client.set_read_timeout(Some(PATIENCE)).expect("it can");
        read_to_end(client)
    });
    run_until(&mut reactor, |_| asking.is_finished());
    assert_eq!(asking.join().expect("no panic"), "accepted by node");
    run_until(&mut reactor, |_| !shared.borrow().sockets.is_empty());
    let back = shared.borrow_mut().sockets.pop().expect("one");
    assert_eq!(back.kind, NodeHandleKind::Server);
    let back = TcpListener::from(back.fd);
    assert_eq!(back.local_addr().expect("it is bound"), address);
    with_ours(&mut reactor, handle, |cx| drop(cx.send("1")));
    let (is_well, said) = program.end(&mut reactor);
    assert!(is_well, "{said}");
    run_until(&mut reactor, |_| shared.borrow().is_lost);
}
