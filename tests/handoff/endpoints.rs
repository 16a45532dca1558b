//! Endpoint strings: what they mean, what is wrong with them and where. Contract group 12.

use std::io::{Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{
    SocketAddr as StdUnixAddress, UnixListener as StdUnixListener, UnixStream as StdUnixStream,
};
use std::process::{Command, Stdio};
use std::rc::Rc;

use bowline::endpoint::{
    ClientEndpoint, EndpointArguments, EndpointError, EndpointFactory, EndpointKinds,
    ServerEndpoint, quote,
};
use bowline::handoff::Inherited;
use bowline::process::{spawn_with_descriptors, spawn_with_listen_fds};
use bowline::{
    Address, BuildContext, ConnectError, ConnectorHandle, Context, Factory, ListenerHandle,
    Protocol, Reactor, Tcp, TcpStream, Transport, Transports, UnixAddress,
};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::support::{DescriptorLedger, Moved, run_until};

#[derive(Clone)]
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

fn echo(_: &Address) -> Echo {
    Echo
}

trait Peer: Read + Write {
    fn be_nonblocking(&self);
}

impl Peer for StdTcpStream {
    fn be_nonblocking(&self) {
        self.set_nonblocking(true).expect("a socket");
    }
}

impl Peer for StdUnixStream {
    fn be_nonblocking(&self) {
        self.set_nonblocking(true).expect("a socket");
    }
}

/// Whoever connects there is answered.
#[track_caller]
fn assert_echoes(reactor: &mut Reactor, listener: ListenerHandle) {
    let address = reactor.get(listener).expect("it listens").address();
    let mut peer: Box<dyn Peer> = match &address {
        Address::Inet(address) => Box::new(StdTcpStream::connect(address).expect("it listens")),
        Address::Unix(UnixAddress::Path(path)) => {
            Box::new(StdUnixStream::connect(path).expect("it listens"))
        }
        Address::Unix(UnixAddress::Abstract(name)) => {
            let name = StdUnixAddress::from_abstract_name(name).expect("short");
            Box::new(StdUnixStream::connect_addr(&name).expect("it listens"))
        }
        other => panic!("listens at {other}"),
    };
    peer.be_nonblocking();
    peer.write_all(b"?").expect("there is room");
    let mut answer = [0; 1];
    run_until(reactor, |_| matches!(peer.read(&mut answer), Ok(1)));
    assert_eq!(&answer, b"?", "{address}");
    drop(peer);
    run_until(reactor, |reactor| reactor.registered() == 1);
}

/// E-08.
#[test]
fn every_form_listens_where_it_says() {
    let ledger = DescriptorLedger::open();
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("a:b=c");
    let path = path.to_str().expect("text");
    let quoted = quote(path);
    let name = format!("bowline-test-{}", std::process::id());
    let any = |text: &str| text.parse::<std::net::IpAddr>().expect("an address");
    let forms = [
        ("tcp:0".to_owned(), Ok(any("0.0.0.0"))),
        ("tcp:port=0:host=127.0.0.1".to_owned(), Ok(any("127.0.0.1"))),
        (
            "tcp:0:interface=127.0.0.1:backlog=1".to_owned(),
            Ok(any("127.0.0.1")),
        ),
        (
            "tcp:127.0.0.1:0:reuseport=1".to_owned(),
            Ok(any("127.0.0.1")),
        ),
        (r"tcp:interface=\:\:1:port=0".to_owned(), Ok(any("::1"))),
        ("tcp:[::1]:0".to_owned(), Ok(any("::1"))),
        ("tcp:port=0:host=[::1]".to_owned(), Ok(any("::1"))),
        ("tcp6:0".to_owned(), Ok(any("::"))),
        (
            format!("unix:{quoted}"),
            Err(UnixAddress::Path(path.into())),
        ),
        (
            format!("unix:mode=640:path={quoted}"),
            Err(UnixAddress::Path(path.into())),
        ),
        (
            format!("unix-abstract:{name}:backlog=5"),
            Err(UnixAddress::Abstract(name.into())),
        ),
    ];
    for (form, wanted) in forms {
        let mut reactor = Reactor::new().expect("a poller");
        let endpoint: ServerEndpoint = form.parse().expect("a form");
        assert_eq!(endpoint.to_string(), form);
        let listener = reactor.listen(endpoint, echo).expect("it is free");
        let address = reactor.get(listener).expect("it listens").address().clone();
        match (&address, wanted) {
            (Address::Inet(found), Ok(wanted)) => assert_eq!(found.ip(), wanted, "{form}"),
            (Address::Unix(found), Err(wanted)) => assert_eq!(*found, wanted, "{form}"),
            other => panic!("{form}: {other:?}"),
        }
        if form.contains("mode=") {
            let mode = std::fs::metadata(path)
                .expect("a file")
                .permissions()
                .mode();
            assert_eq!(mode & 0o7777, 0o640, "{form}");
        }
        assert_echoes(&mut reactor, listener);
        if form.starts_with("tcp6") {
            let port = address.as_inet().expect("a port").port();
            let refused = StdTcpStream::connect(("127.0.0.1", port));
            assert!(refused.is_err(), "tcp6 serves IPv6 only");
        }
    }
    ledger.assert_balanced();
}

/// What became of an attempt.
#[derive(Clone, Default)]
struct Attempts(Rc<std::cell::RefCell<Vec<String>>>);

impl Factory for Attempts {
    type Protocol = Greets;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Greets> {
        Some(Greets(self.clone()))
    }

    fn connection_failed(&mut self, _: &mut BuildContext<'_>, error: &ConnectError) {
        self.0.borrow_mut().push(error.to_string());
    }
}

struct Greets(Attempts);

impl<T: Transport> Protocol<T> for Greets {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        let peer = cx.transport.peer().to_string();
        self.0.0.borrow_mut().push(format!("made {peer}"));
        cx.transport.lose_connection();
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}
}

/// E-09.
#[test]
fn every_form_connects_to_where_it_says() {
    let ledger = DescriptorLedger::open();
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("s");
    let tcp = StdTcpListener::bind("127.0.0.1:0").expect("loopback");
    let address = tcp.local_addr().expect("bound");
    let port = address.port();
    let unix = StdUnixListener::bind(&path).expect("free");
    let name = format!("bowline-test-client-{}", std::process::id());
    let by_name = StdUnixAddress::from_abstract_name(&name).expect("short");
    let by_name = StdUnixListener::bind_addr(&by_name).expect("free");
    let path = path.display().to_string();
    let inet = format!("made {address}");
    let forms = [
        (format!("tcp:127.0.0.1:{port}"), inet.clone()),
        (format!("tcp:{port}:host=127.0.0.1:timeout=5"), inet.clone()),
        (
            format!("tcp:host=127.0.0.1:port={port}:bind=127.0.0.2"),
            inet.clone(),
        ),
        (
            format!(r"tcp:127.0.0.1:{port}:bindAddress=127.0.0.2\:0"),
            inet.clone(),
        ),
        (format!("tcp:localhost:{port}:timeout=0.5e1"), inet),
        (format!("unix:{path}"), format!("made {path}")),
        (
            format!("unix:path={path}:timeout=5"),
            format!("made {path}"),
        ),
        (format!("unix-abstract:{name}"), format!("made @{name}")),
    ];
    for (form, wanted) in forms {
        let mut reactor = Reactor::new().expect("a poller");
        let endpoint: ClientEndpoint = form.parse().expect("a form");
        assert_eq!(endpoint.to_string(), form);
        let attempts = Attempts::default();
        reactor.connect(endpoint, attempts.clone()).expect("begins");
        run_until(&mut reactor, |_| !attempts.0.borrow().is_empty());
        assert_eq!(attempts.0.borrow()[0], wanted, "{form}");
        if form.contains("127.0.0.2") {
            while let Ok((_, from)) = tcp.accept() {
                tcp.set_nonblocking(true).expect("a socket");
                if from.ip().to_string() == "127.0.0.2" {
                    break;
                }
            }
            tcp.set_nonblocking(false).expect("a socket");
        }
    }
    drop((tcp, unix, by_name));
    ledger.assert_balanced();
}

/// E-09: a timeout in a string is the connector's.
#[test]
fn timeout_of_a_string_ends_the_attempt() {
    let ledger = DescriptorLedger::open();
    let clock = bowline::testing::ManualClock::new();
    let mut reactor = Reactor::with_clock(Moved(clock.clone())).expect("a poller");
    // A queue of one that is full: who comes next waits.
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("s");
    let listener = StdUnixListener::bind(&path).expect("free");
    rustix::net::listen(&listener, 0).expect("a listener");
    let first = StdUnixStream::connect(&path).expect("there is room for one");
    let endpoint = format!("unix:{}:timeout=2.5", path.display());
    let endpoint: ClientEndpoint = endpoint.parse().expect("a form");
    let attempts = Attempts::default();
    reactor.connect(endpoint, attempts.clone()).expect("begins");
    reactor.turn(Some(std::time::Duration::ZERO));
    clock.advance(std::time::Duration::from_millis(2_400));
    reactor.turn(Some(std::time::Duration::ZERO));
    assert!(attempts.0.borrow().is_empty(), "{:?}", attempts.0);
    clock.advance(std::time::Duration::from_millis(200));
    run_until(&mut reactor, |_| !attempts.0.borrow().is_empty());
    drop((first, listener, reactor));
    ledger.assert_balanced();
}

/// E-08, E-09, E-10: every mistake, what is said, and which part of the string is shown.
#[test]
fn mistakes_are_shown_in_their_place() {
    let long = "x".repeat(108);
    let long_path = format!("unix:{long}");
    let servers = [
        ("", "", "is no kind of endpoint, which are tcp, tcp6, unix"),
        ("tpc:80", "tpc", "\"tpc\" is no kind of endpoint"),
        ("8080", "8080", "write tcp:8080"),
        ("127.0.0.1:80", "127.0.0.1", "write tcp:127.0.0.1:80"),
        ("/run/x", "/run/x", "write unix:/run/x"),
        ("tcp", "", "port is missing"),
        ("tcp:http", "http", "\"http\" is no port"),
        ("tcp:65536", "65536", "is no port"),
        ("tcp:80:host=nowhere", "nowhere", "is no IP address"),
        ("tcp:80:mode=600", "mode=600", "tcp has no argument mode"),
        ("tcp:127.0.0.1:80:90", "90", "takes fewer arguments"),
        ("tcp:80:backlog=many", "many", "is no backlog"),
        (
            "tcp:80:backlog=1:backlog=2",
            "backlog",
            "backlog is given twice",
        ),
        ("tcp:80:reuseport=yes", "yes", "it is 0 or 1"),
        ("tcp:[::1:80", "[::1:80", "the bracket is not closed"),
        (r"unix:/run/x\", r"\", "nothing to escape"),
        ("unix:", "", "the path is empty"),
        (&long_path, &long, "longer than 107 bytes"),
        ("unix:/x:mode=999", "999", "is no mode in octal"),
        ("unix:/x:mode=17777", "17777", "is no mode in octal"),
        ("unix:/x:lockfile=1", "1", "there are no lock files"),
        ("systemd:name=a:index=0", "0", "either name or index"),
        ("systemd:domain=IP:index=0", "IP", "INET, INET6 or UNIX"),
        ("fd:three", "three", "is no descriptor number"),
        ("stdio:", "stdio", "adopt it with Stdio"),
    ];
    for (text, marked, said) in servers {
        let error = text.parse::<ServerEndpoint>().expect_err(text);
        assert_mistake(text, &error, marked, said);
    }
    let clients = [
        ("tcp:host", "", "port is missing"),
        ("tcp::80", "", "the host is empty"),
        ("tcp:a:80:timeout=0", "0", "above zero"),
        ("tcp:a:80:timeout=-1", "-1", "above zero"),
        ("tcp:a:80:bind=b", "b", "is no IP address"),
        ("unix:/x:mode=600", "mode=600", "unix has no argument mode"),
        ("fd:3", "fd", "which are tcp, unix, unix-abstract"),
    ];
    for (text, marked, said) in clients {
        let error = text.parse::<ClientEndpoint>().expect_err(text);
        assert_mistake(text, &error, marked, said);
    }
}

#[track_caller]
fn assert_mistake(text: &str, error: &EndpointError, marked: &str, said: &str) {
    let shown = format!("{error}");
    assert!(shown.contains(said), "{text}: {shown}");
    let place = error.place().expect("the string is wrong");
    assert_eq!(&text[place.clone()], marked, "{text}: {shown}");
    let picture = format!("{error:#}");
    let marks = picture.lines().last().expect("three lines");
    let column = text[..place.start].chars().count();
    assert_eq!(marks.find('^'), Some(column + 2), "{picture}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// E-10: whatever is quoted is one argument, and comes out as it was.
    #[test]
    fn quoted_arguments_come_out_as_they_were(values in prop::collection::vec(".{0,12}", 1..5)) {
        let positional: Vec<_> = values.iter().map(|value| quote(value)).collect();
        let text = format!("kind:{}:name={}", positional.join(":"), quote(&values[0]));
        let mut arguments = EndpointArguments::parse(&text).expect("it is well formed");
        prop_assert_eq!(arguments.kind(), "kind");
        let named = arguments.named("name").expect("it is there");
        prop_assert_eq!(named.as_str(), &values[0]);
        for value in &values {
            let taken = arguments.positional().expect("it is there");
            prop_assert_eq!(taken.as_str(), value);
        }
        prop_assert!(arguments.finish().is_ok());
    }

    /// E-10: no string is a panic, and each error shows a part of it.
    #[test]
    fn any_string_is_an_endpoint_or_an_error(
        kind in "(tcp|tcp6|unix|unix-abstract|systemd|fd|inherited|.{0,4})",
        rest in "[:=\\\\\\[\\]a-z0-9é.]{0,30}",
    ) {
        let text = format!("{kind}:{rest}");
        let errors = [
            text.parse::<ServerEndpoint>().err(),
            text.parse::<ClientEndpoint>().err(),
        ];
        for error in errors.into_iter().flatten() {
            let place = error.place().expect("it is about the string");
            prop_assert!(text.get(place).is_some(), "{}", error);
            prop_assert!(format!("{error:#}").ends_with('^'), "{}", error);
        }
    }
}

/// Says to a child which test it is to be.
const CASE: &str = "BOWLINE_TEST_ENDPOINTS";

/// E-12: systemd's sockets by name and by index, and descriptors by number.
#[test]
fn sockets_this_process_was_started_with_are_listened_on() {
    if let Ok(case) = std::env::var(CASE) {
        return started_with(&case);
    }
    let ledger = DescriptorLedger::open();
    let directory = TempDir::new().expect("a directory");
    let web = StdTcpListener::bind("127.0.0.1:0").expect("loopback");
    let also = StdTcpListener::bind("127.0.0.1:0").expect("loopback");
    let admin = StdUnixListener::bind(directory.path().join("s")).expect("free");
    let (stream, _other) = StdUnixStream::pair().expect("a pair");
    for case in ["systemd", "numbers"] {
        let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
        command
            .args(["--exact", "--nocapture"])
            .arg("endpoints::sockets_this_process_was_started_with_are_listened_on")
            .env(CASE, case)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = if case == "systemd" {
            let given = [
                (web.as_fd(), "web"),
                (admin.as_fd(), "admin"),
                (also.as_fd(), "web"),
                (stream.as_fd(), "stream"),
                (admin.as_fd(), "other"),
            ];
            spawn_with_listen_fds(command, &given)
        } else {
            spawn_with_descriptors(command, &[(admin.as_fd(), 7), (stream.as_fd(), 9)])
        };
        let output = child.expect("starts").wait_with_output().expect("ends");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{case}: {said}");
    }
    drop((web, also, admin, stream, _other));
    ledger.assert_balanced();
}

fn started_with(case: &str) {
    let (right, wrong) = match case {
        "systemd" => (
            &[
                "systemd:web",
                "systemd:domain=UNIX:index=1",
                "systemd:name=web:domain=INET",
            ][..],
            &[
                // Both of that name are taken by now.
                (
                    "systemd:name=web",
                    "no socket named \"web\" that is not taken, of 5",
                ),
                ("systemd:index=9", "no socket number 9"),
                ("systemd:name=other:domain=INET", "another domain"),
                ("systemd:stream", "no listening TCP or UNIX socket"),
                ("inherited:web", "was not claimed"),
            ][..],
        ),
        _ => (
            &["fd:7"][..],
            &[
                ("fd:7", "exists"),
                ("fd:9", "no listening TCP or UNIX socket"),
                ("fd:55", "not found"),
                ("systemd:web", "no socket named \"web\""),
            ][..],
        ),
    };
    for text in right {
        let endpoint: ServerEndpoint = text.parse().expect("a form");
        let mut reactor = Reactor::new().expect("a poller");
        let listener = reactor.listen(endpoint, echo).expect(text);
        assert_echoes(&mut reactor, listener);
    }
    for (text, said) in wrong {
        let endpoint: ServerEndpoint = text.parse().expect("a form");
        let mut reactor = Reactor::new().expect("a poller");
        let error = reactor.listen(endpoint, echo).expect_err(text).to_string();
        let has_said = error.to_lowercase().contains(&said.to_lowercase());
        assert!(has_said, "{text}: {error}");
    }
}

#[test]
fn what_was_inherited_is_claimed_by_its_name() {
    let ledger = DescriptorLedger::open();
    let listener = || StdTcpListener::bind("127.0.0.1:0").expect("loopback");
    let (web, other) = (listener(), listener());
    let port = web.local_addr().expect("bound").port();
    let mut inherited = Inherited::new();
    inherited.add("web", web.into());
    inherited.add("other", other.into());

    let endpoint: ServerEndpoint = "inherited:nothing".parse().expect("a form");
    let error = endpoint.claim(&mut inherited).expect_err("it is not there");
    assert!(error.to_string().contains("\"nothing\""), "{error}");
    // The domain of the string holds here too, and what does not fit is left.
    let endpoint: ServerEndpoint = "systemd:name=other:domain=UNIX".parse().expect("a form");
    let error = endpoint.claim(&mut inherited).expect_err("it is TCP");
    assert!(error.to_string().contains("another domain"), "{error}");
    assert_eq!(inherited.len(), 2);
    for text in ["inherited:web", "systemd:name=other:domain=INET"] {
        let endpoint: ServerEndpoint = text.parse().expect("a form");
        let endpoint = endpoint.claim(&mut inherited).expect("it is there");
        let mut reactor = Reactor::new().expect("a poller");
        let listener = reactor.listen(endpoint, echo).expect(text);
        let address = reactor.get(listener).expect("it listens").address().clone();
        let is_web = address.as_inet().expect("TCP").port() == port;
        assert_eq!(is_web, text == "inherited:web");
        assert_echoes(&mut reactor, listener);
    }
    // What has an address of its own claims nothing.
    let endpoint: ServerEndpoint = "tcp:127.0.0.1:0".parse().expect("a form");
    assert!(endpoint.claim(&mut inherited).is_ok());
    assert!(inherited.is_empty());
    ledger.assert_balanced();
}

/// A kind of a program's own, which only listens.
struct Local;

impl<F: Factory<Protocol: Protocol<TcpStream>>> EndpointFactory<F> for Local {
    fn listen(
        &self,
        reactor: &mut Reactor,
        mut arguments: EndpointArguments,
        factory: F,
    ) -> Result<ListenerHandle, EndpointError> {
        let port: u16 = arguments.require("port")?.parse("port")?;
        arguments.finish()?;
        let here = Tcp::at(([127, 0, 0, 1], port).into());
        Ok(reactor
            .listen(here, factory)
            .map_err(std::io::Error::from)?)
    }
}

/// E-10.
#[test]
fn kinds_of_a_programs_own_stand_beside_the_others() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().expect("a poller");
    let mut kinds = EndpointKinds::new();
    kinds.add("local", Local);
    for text in ["local:0", "local:port=0", "tcp:127.0.0.1:0"] {
        let listener = kinds.listen(&mut reactor, text, echo).expect(text);
        assert_echoes(&mut reactor, listener);
        reactor.get(listener).expect("it listens").stop_listening();
        run_until(&mut reactor, |reactor| reactor.registered() == 0);
    }
    let connect = |reactor: &mut Reactor, text: &str| -> Result<ConnectorHandle, _> {
        kinds.connect(reactor, text, echo)
    };
    let error = connect(&mut reactor, "local:0").expect_err("it only listens");
    assert_mistake(
        "local:0",
        &error,
        "local",
        "one cannot connect to this kind",
    );
    let error = connect(&mut reactor, "remote:0").expect_err("no kind");
    assert_mistake("remote:0", &error, "remote", "unix-abstract, local");
    let error = kinds
        .listen(&mut reactor, "local:x", echo)
        .expect_err("no port");
    assert_mistake("local:x", &error, "x", "\"x\" is no port");
    // The system's own refusal is no matter of the string.
    let taken = StdTcpListener::bind("127.0.0.1:0").expect("loopback");
    let port = taken.local_addr().expect("bound").port();
    for kind in ["local", "tcp:127.0.0.1"] {
        let error = kinds
            .listen(&mut reactor, &format!("{kind}:{port}"), echo)
            .expect_err("it is taken");
        assert!(error.place().is_none(), "{error}");
        assert!(error.to_string().contains("in use"), "{error}");
    }
    drop((reactor, taken));
    ledger.assert_balanced();
}
