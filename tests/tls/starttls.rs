//! Connections that begin in the clear.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{Adopt as _, Connect as _, Listen as _};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::testing::ManualClock;
use bowline::tls::{StartTls, StartTlsError, TlsError, TlsRole, TlsTransport};
use bowline::{
    Address, CloseReason, Context, Protocol, Reactor, Tcp, Transport, Transports, Unix,
    UnixTransport,
};

use crate::harness::{
    BOTH, Peer, Raw, TlsPassing, accepting, client, client_config, connecting, server,
    server_config,
};
use crate::support::{DescriptorLedger, run_until, run_until_quiet};

type Log = Rc<RefCell<Vec<String>>>;

/// Speaks in lines, and starts TLS at the line `secure`.
struct Talk {
    log: Log,
    role: TlsRole,
    lost: Rc<RefCell<Option<TlsError>>>,
    /// What it does with what came behind.
    rest: Rest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Handed,
    PutBack,
}

impl Talk {
    fn note(&self, what: impl Into<String>) {
        self.log.borrow_mut().push(what.into());
    }
}

impl<T: TlsTransport> Protocol<T> for Talk {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.note("made");
        if let TlsRole::Client(_) = self.role {
            cx.transport.write(b"secure\n");
        }
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        let is_secured = cx.transport.tls().is_some_and(|tls| tls.is_established());
        let Some(end) = data
            .iter()
            .position(|byte| *byte == b'\n')
            .filter(|_| !is_secured)
        else {
            self.note(format!(
                "{}: {}",
                if is_secured { "secured" } else { "plain" },
                String::from_utf8_lossy(data)
            ));
            if is_secured && data == b"bye" {
                cx.transport.lose_connection();
            }
            return;
        };
        self.note("agreed");
        if let TlsRole::Server(_) = self.role {
            cx.transport.write(b"go\n");
        }
        let (mut rest, mut put_back) = (&data[end + 1..], &[][..]);
        if self.rest == Rest::PutBack {
            (rest, put_back) = (put_back, rest);
        }
        cx.transport.push_back(put_back.to_vec());
        cx.transport.start_tls(self.role.clone(), rest).unwrap();
        cx.transport.write(b"behind it");
        let again = cx.transport.start_tls(self.role.clone(), b"");
        assert!(matches!(again, Err(StartTlsError::Begun)));
    }

    fn connection_secured(&mut self, cx: &mut Context<'_, T>) {
        let tls = cx.transport.tls().unwrap();
        self.note(format!("secured with {:?}", tls.version().unwrap()));
    }

    fn connection_lost(&mut self, _: &mut Context<'_, T>, reason: &CloseReason) {
        self.note("lost");
        self.lost.replace(TlsError::of(reason).cloned());
    }
}

struct Half {
    reactor: Reactor,
    clock: ManualClock,
    log: Log,
    lost: Rc<RefCell<Option<TlsError>>>,
    peer: Peer,
    _ledger: DescriptorLedger,
}

/// Where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Tcp,
    Unix,
}

impl Half {
    fn new(place: Place, role: TlsRole, rest: Rest) -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        let mut reactor = Reactor::with_clock(clock.clone()).unwrap();
        let (log, lost) = (Log::default(), Rc::default());
        let talk = Talk {
            log: Rc::clone(&log),
            role: role.clone(),
            lost: Rc::clone(&lost),
            rest,
        };
        let mut talk = Some(talk);
        let raw = match (place, role) {
            (Place::Unix, _) => {
                let (ours, theirs) = StdUnixStream::pair().unwrap();
                let kind = Unix.layer(StartTls.passing());
                let talk = talk.take().unwrap();
                reactor.adopt(kind, ours.into(), talk).unwrap();
                theirs.set_nonblocking(true).unwrap();
                Raw::Unix(theirs)
            }
            (Place::Tcp, TlsRole::Server(_)) => {
                let here = Tcp::at(([127, 0, 0, 1], 0).into()).layer(StartTls);
                let factory = move |_: &Address| talk.take().unwrap();
                let listener = reactor.listen(here, factory).unwrap();
                let address = reactor.get(listener).unwrap().address().as_inet().unwrap();
                let peer = StdTcpStream::connect(address).unwrap();
                peer.set_nonblocking(true).unwrap();
                Raw::Tcp(peer)
            }
            (Place::Tcp, _) => {
                let listener = StdTcpListener::bind("127.0.0.1:0").unwrap();
                let there = Tcp::to(listener.local_addr().unwrap()).layer(StartTls);
                let factory = move |_: &Address| talk.take().unwrap();
                reactor.connect(there, factory).unwrap();
                run_until_quiet(&mut reactor);
                let peer = listener.accept().unwrap().0;
                peer.set_nonblocking(true).unwrap();
                Raw::Tcp(peer)
            }
        };
        run_until(&mut reactor, |_| !log.borrow().is_empty());
        Self {
            reactor,
            clock,
            log,
            lost,
            peer: Peer::new(raw),
            _ledger: ledger,
        }
    }

    /// Reads so much in the clear, and not a byte behind it.
    #[track_caller]
    fn read_plain(&mut self, wanted: &[u8]) {
        let mut received = Vec::new();
        let mut byte = [0];
        let Self { reactor, peer, .. } = self;
        run_until(reactor, |_| {
            while received.len() < wanted.len()
                && let Ok(1) = peer.raw.read(&mut byte)
            {
                received.push(byte[0]);
            }
            received.len() == wanted.len()
        });
        assert_eq!(received, wanted);
    }

    #[track_caller]
    fn run_until_noted(&mut self, what: &str) {
        let Self {
            reactor, peer, log, ..
        } = self;
        run_until(reactor, |_| {
            if peer.tls.is_some() {
                let _ = peer.step();
            }
            log.borrow().iter().any(|it| it == what)
        });
    }

    #[track_caller]
    fn read_secured(&mut self, wanted: &[u8]) {
        let mut received = vec![0; wanted.len()];
        let mut count = 0;
        let Self { reactor, peer, .. } = self;
        run_until(reactor, |_| {
            match peer.read(&mut received[count..]) {
                Ok(more) => count += more,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            count == wanted.len()
        });
        assert_eq!(received, wanted);
    }
}

#[test]
fn a_connection_is_secured_when_both_have_agreed() {
    for place in [Place::Tcp, Place::Unix] {
        for is_client in [false, true] {
            let role = match is_client {
                true => TlsRole::from(&client()),
                false => TlsRole::from(&server()),
            };
            let mut half = Half::new(place, role, Rest::Handed);
            if is_client {
                half.read_plain(b"secure\n");
                half.peer.raw.write_all(b"go\n").unwrap();
                half.peer.secure(accepting(server_config(BOTH)));
            } else {
                half.peer.raw.write_all(b"secure\n").unwrap();
                // What it wrote behind is not among that.
                half.read_plain(b"go\n");
                half.peer.secure(connecting(client_config(BOTH)));
            }
            half.run_until_noted("secured with TLSv1_3");
            half.read_secured(b"behind it");
            half.peer.send(b"bye");
            half.run_until_noted("lost");
            assert_eq!(
                *half.log.borrow(),
                [
                    "made",
                    "agreed",
                    "secured with TLSv1_3",
                    "secured: bye",
                    "lost"
                ]
            );
            assert!(half.lost.borrow().is_none());
        }
    }
}

/// A client that does not wait for the answer: what it has sent is taken for what it is.
#[test]
fn a_hello_that_came_early_is_none_the_worse() {
    for rest in [Rest::Handed, Rest::PutBack] {
        let mut half = Half::new(Place::Tcp, TlsRole::from(&server()), rest);
        half.peer.secure(connecting(client_config(BOTH)));
        let mut bytes = b"secure\n".to_vec();
        half.peer
            .tls
            .as_mut()
            .unwrap()
            .write_tls(&mut bytes)
            .unwrap();
        half.peer.raw.write_all(&bytes).unwrap();
        half.read_plain(b"go\n");
        half.run_until_noted("secured with TLSv1_3");
    }
}

/// CVE-2011-0411: none of it is taken for a command, before or after.
#[test]
fn what_was_smuggled_in_behind_the_command_is_refused() {
    for place in [Place::Tcp, Place::Unix] {
        for rest in [Rest::Handed, Rest::PutBack] {
            for role in [TlsRole::from(&server()), TlsRole::from(&client())] {
                let mut half = Half::new(place, role, rest);
                half.peer.raw.write_all(b"go\nDELETE everything\n").unwrap();
                half.run_until_noted("lost");
                assert_eq!(*half.log.borrow(), ["made", "agreed", "lost"]);
                assert!(matches!(*half.lost.borrow(), Some(TlsError::NotTls)));
            }
        }
    }
}

#[test]
fn a_handshake_in_the_middle_has_its_time_too() {
    let mut half = Half::new(Place::Tcp, TlsRole::from(&server()), Rest::Handed);
    half.peer.raw.write_all(b"secure\n").unwrap();
    half.read_plain(b"go\n");
    run_until_quiet(&mut half.reactor);
    half.clock.advance(Duration::from_millis(29_999));
    run_until_quiet(&mut half.reactor);
    assert_eq!(*half.log.borrow(), ["made", "agreed"]);
    half.clock.advance(Duration::from_millis(1));
    half.run_until_noted("lost");
    assert!(matches!(
        *half.lost.borrow(),
        Some(TlsError::HandshakeTimedOut)
    ));
}

/// What was written before leaves before, however long that takes.
#[test]
fn a_handshake_begins_when_what_was_written_before_has_left() {
    struct Pours(TlsRole);

    impl<T: TlsTransport> Protocol<T> for Pours {
        fn connection_made(&mut self, cx: &mut Context<'_, T>) {
            cx.transport.write(&vec![b'p'; 5 << 20]);
            cx.transport.start_tls(self.0.clone(), b"").unwrap();
            cx.transport.write(b"sealed");
        }

        fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
    }

    let _ledger = DescriptorLedger::open();
    for role in [TlsRole::from(&server()), TlsRole::from(&client())] {
        let mut reactor = Reactor::new().unwrap();
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let is_client = matches!(role, TlsRole::Client(_));
        let kind = Unix.layer(StartTls);
        reactor.adopt(kind, ours.into(), Pours(role)).unwrap();
        run_until_quiet(&mut reactor);
        let mut peer = Peer::new(Raw::Unix(theirs));
        let mut left = 5 << 20;
        let mut buffer = vec![0; 65_536];
        run_until(&mut reactor, |_| {
            let room = left.min(buffer.len());
            if let Ok(count) = peer.raw.read(&mut buffer[..room]) {
                assert!(buffer[..count].iter().all(|byte| *byte == b'p'));
                left -= count;
            }
            left == 0
        });
        peer.secure(match is_client {
            true => accepting(server_config(BOTH)),
            false => connecting(client_config(BOTH)),
        });
        run_until(&mut reactor, |_| !peer.step().unwrap());
        let mut received = [0; 6];
        run_until(&mut reactor, |_| {
            peer.read(&mut received).is_ok_and(|count| count == 6)
        });
        assert_eq!(&received, b"sealed");
    }
}

/// In lines, with the rest taken out of the framing.
struct Lines {
    log: Log,
}

impl<T: TlsTransport> FrameReceiver<T, LineFramer> for Lines {
    fn frame_received(&mut self, cx: &mut FrameContext<'_, T, LineFramer>, frame: &[u8]) {
        let line = String::from_utf8_lossy(frame).into_owned();
        self.log.borrow_mut().push(line);
        if frame == b"STARTTLS" {
            cx.transport.write(b"220 go\r\n");
            let rest = cx.framing.take_rest();
            cx.transport.start_tls(&server(), &rest).unwrap();
        }
    }

    fn connection_secured(&mut self, _: &mut FrameContext<'_, T, LineFramer>) {
        self.log.borrow_mut().push("secured".into());
    }

    fn connection_lost(&mut self, _: &mut FrameContext<'_, T, LineFramer>, reason: &CloseReason) {
        let why = TlsError::of(reason).map(TlsError::to_string);
        self.log
            .borrow_mut()
            .push(why.unwrap_or_else(|| "lost".into()));
    }
}

#[test]
fn lines_behind_the_command_are_none() {
    for smuggled in [&b""[..], b"MAIL FROM:<mallory>\r\n"] {
        let _ledger = DescriptorLedger::open();
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        let log = Log::default();
        let lines = Framed::new(
            LineFramer::new(),
            Lines {
                log: Rc::clone(&log),
            },
        );
        reactor
            .adopt(Unix.layer(StartTls), ours.into(), lines)
            .unwrap();
        theirs
            .write_all(&[b"EHLO us\r\nSTARTTLS\r\n", smuggled].concat())
            .unwrap();
        run_until(&mut reactor, |_| log.borrow().len() >= 2);
        let mut answer = [0; 8];
        run_until_quiet(&mut reactor);
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"220 go\r\n");
        if smuggled.is_empty() {
            theirs.set_nonblocking(true).unwrap();
            let mut peer = Peer::new(Raw::Unix(theirs));
            peer.secure(connecting(client_config(BOTH)));
            run_until(&mut reactor, |_| !peer.step().unwrap());
            peer.send(b"EHLO again\r\n");
            run_until(&mut reactor, |_| log.borrow().len() == 4);
            assert_eq!(
                *log.borrow(),
                ["EHLO us", "STARTTLS", "secured", "EHLO again"]
            );
        } else {
            run_until(&mut reactor, |_| log.borrow().len() == 3);
            assert_eq!(
                *log.borrow(),
                ["EHLO us", "STARTTLS", "TLS: the peer does not speak TLS"]
            );
        }
    }
}

/// Descriptors pass beside it, in the clear and after, each with its byte.
struct Gives(Option<TlsRole>);

impl Protocol<TlsPassing> for Gives {
    fn connection_made(&mut self, cx: &mut Context<'_, TlsPassing>) {
        cx.transport
            .send_file_descriptor(file("plain").into())
            .unwrap();
        cx.transport.write(b"p");
        if let Some(role) = self.0.take() {
            cx.transport.start_tls(role, b"").unwrap();
        }
        cx.transport.write(b"more ");
        cx.transport
            .write_with_descriptors(b"sealed", vec![OwnedFd::from(file("sealed")).into()])
            .unwrap();
    }

    fn data_received(&mut self, _: &mut Context<'_, TlsPassing>, _: &[u8]) {}
}

fn file(content: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

#[derive(Default)]
struct Takes {
    role: Option<TlsRole>,
    log: Log,
}

impl Protocol<TlsPassing> for Takes {
    fn data_received(&mut self, cx: &mut Context<'_, TlsPassing>, data: &[u8]) {
        self.log
            .borrow_mut()
            .push(String::from_utf8_lossy(data).into_owned());
        if let Some(role) = self.role.take() {
            assert_eq!(data, b"p", "TLS begins behind it");
            cx.transport.start_tls(role, b"").unwrap();
        }
    }

    fn file_descriptor_received(
        &mut self,
        _: &mut Context<'_, TlsPassing>,
        fd: OwnedFd,
    ) -> Result<(), OwnedFd> {
        let mut content = String::new();
        File::from(fd).read_to_string(&mut content).unwrap();
        self.log.borrow_mut().push(format!("[{content}]"));
        Ok(())
    }
}

#[test]
fn descriptors_pass_beside_what_is_in_the_clear_and_what_is_sealed() {
    let _ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let log = Log::default();
    let takes = Takes {
        role: Some(TlsRole::from(&client())),
        log: Rc::clone(&log),
    };
    let kind = || Unix.layer(StartTls.passing());
    reactor.adopt(kind(), theirs.into(), takes).unwrap();
    // Nothing glues the ClientHello to it: the client waits for the byte.
    let gives = Gives(Some(TlsRole::from(&server())));
    reactor.adopt(kind(), ours.into(), gives).unwrap();
    run_until(&mut reactor, |_| log.borrow().concat().ends_with("sealed"));
    let log = log.borrow();
    assert_eq!(
        log.concat(),
        "[plain]p[sealed]more sealed".replace("[sealed]more ", "more [sealed]")
    );
}
