//! A restart in the reactor of the test: its clock is moved by hand, and its other
//! side is made of plain calls, or is a second restart beside it. So every limit is
//! met exactly, and nothing waits.

mod children;
mod fuzz;
mod manager;
mod moving;
mod packets;
mod predecessor;
mod settings;
mod strings;
mod successor;
mod wire;

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bowline::Unix;
use bowline::endpoint::Adopt as _;
use bowline::handoff::channel::Role;
use bowline::handoff::restart::{
    Listeners, Movable, MoveTicket, Moved, Packed, Program, Restart, RestartError, RestartSettings,
    Start,
};
use bowline::testing::ManualClock;
use bowline::{
    Address, AnyConnection as _, Context, Protocol, Reactor, Transport, Transports, UnixStream,
    UnixTransport,
};

use self::wire::{Hand, Said};
use crate::support::{DescriptorLedger, Staged, in_short, staged};

/// How often a predecessor asks whether its child has ended.
const REAP: Duration = Duration::from_millis(20);

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A reactor, a clock, and a directory for sockets.
struct Stage {
    reactor: Reactor,
    clock: ManualClock,
    directory: tempfile::TempDir,
    _ledger: DescriptorLedger,
}

staged!(Stage);

impl Stage {
    fn new() -> Self {
        let ledger = DescriptorLedger::open();
        let clock = ManualClock::new();
        Self {
            reactor: Reactor::with_clock(clock.clone()).expect("epoll"),
            clock,
            directory: tempfile::tempdir().expect("temporary directory"),
            _ledger: ledger,
        }
    }

    /// With a process that serves `web`, and has said so.
    fn serving() -> (Self, Server) {
        let mut stage = Self::new();
        let server = stage.begin("old", &["web"]);
        server.events();
        (stage, server)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The path of the control socket.
    fn control(&self) -> PathBuf {
        self.path("control/control")
    }

    /// Limits that differ from each other.
    fn settings(&self) -> RestartSettings {
        let mut settings = RestartSettings::new(self.path("control"));
        settings.answer = ms(1_000);
        settings.start = ms(3_000);
        settings.ready = ms(5_000);
        settings.drain = ms(7_000);
        settings
    }

    /// Begins, with listeners of these names, and lets happen what can.
    fn begin(&mut self, name: &'static str, listeners: &'static [&'static str]) -> Server {
        let settings = self.settings();
        self.begin_with(settings, name, listeners)
    }

    fn begin_with(
        &mut self,
        settings: RestartSettings,
        name: &'static str,
        listeners: &'static [&'static str],
    ) -> Server {
        let server = self.begin_only(settings, name, listeners);
        self.settle();
        server
    }

    /// Begins, and leaves the rest for later.
    fn begin_only(
        &mut self,
        settings: RestartSettings,
        name: &'static str,
        listeners: &'static [&'static str],
    ) -> Server {
        let directory = self.directory.path().to_owned();
        let listen = move |scene: &Rc<Scene>, reactor: &mut Reactor, all: &mut Listeners<'_>| {
            for name in listeners {
                let lines = Line::factory(scene, all.restart());
                let path = directory.join(name);
                all.listen(reactor, name, Unix::at(path), lines)?;
            }
            Ok(())
        };
        self.begin_as(settings, name, listen)
    }

    /// Begins with a program that listens so.
    fn begin_as(
        &mut self,
        settings: RestartSettings,
        name: &'static str,
        listen: impl FnMut(&Rc<Scene>, &mut Reactor, &mut Listeners<'_>) -> io::Result<()> + 'static,
    ) -> Server {
        let scene = Rc::new(Scene {
            name,
            events: RefCell::default(),
            takes: Cell::new("line"),
            restart: RefCell::default(),
            connections: Cell::default(),
        });
        let program = Play {
            scene: Rc::clone(&scene),
            listen: Box::new(listen),
        };
        let restart = Restart::begin(&mut self.reactor, settings, program).expect("ours");
        *scene.restart.borrow_mut() = Some(restart.clone());
        Server { restart, scene }
    }

    /// A successor by hand, which has said hello as process `pid`.
    fn successor(&mut self, pid: u32) -> Hand {
        self.successor_with(pid, 1 << 20)
    }

    /// Has a hand say something, and lets happen what comes of it.
    fn say(&mut self, hand: &Hand, message: &Said) {
        hand.send(message, &[]);
        self.settle();
    }

    /// Has a hand say all of that, each when everything has come of the one before.
    fn say_all(&mut self, hand: &Hand, messages: impl IntoIterator<Item = Said>) {
        for message in messages {
            self.say(hand, &message);
        }
    }

    /// A hand closes its end of the channel.
    fn hang_up(&mut self, hand: Hand) {
        drop(hand);
        self.settle();
    }

    fn successor_with(&mut self, pid: u32, max_payload: u32) -> Hand {
        let socket = StdUnixStream::connect(self.control()).expect("it listens");
        let hand = Hand::new(socket);
        hand.greet(Role::SUCCESSOR, pid, max_payload);
        self.settle();
        hand
    }

    /// A predecessor by hand, which nobody has found yet.
    fn predecessor(&self) -> StdUnixListener {
        let directory = self.path("control");
        fs::create_dir(&directory).expect("ours");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).expect("ours");
        let listener = StdUnixListener::bind(self.control()).expect("bound");
        listener.set_nonblocking(true).expect("a socket");
        listener
    }

    /// Takes the connection of a successor, and says hello.
    fn found(&mut self, listener: &StdUnixListener) -> Hand {
        self.settle();
        let (socket, _) = listener.accept().expect("it looks for one");
        let hand = Hand::new(socket);
        hand.greet(Role::PREDECESSOR, 77, 1 << 20);
        self.settle();
        hand
    }

    fn client(&mut self, name: &str) -> Client {
        let client = self.waiting(name);
        self.settle();
        client
    }

    /// One that nobody has accepted, for all that the test knows.
    fn waiting(&self, name: &str) -> Client {
        let socket = StdUnixStream::connect(self.path(name)).expect("it listens");
        socket.set_nonblocking(true).expect("a socket");
        Client { socket }
    }

    /// What the client is told.
    fn ask(&mut self, client: &mut Client, question: &str) -> String {
        client.socket.write_all(question.as_bytes()).expect("room");
        self.settle();
        client.hears()
    }

    /// As [`ask`](Self::ask), and leaves the answer where it is.
    fn tell(&mut self, client: &mut Client, word: &str) {
        client.socket.write_all(word.as_bytes()).expect("room");
        self.settle();
    }

    fn is_listening(&self, name: &str) -> bool {
        StdUnixStream::connect(self.path(name)).is_ok()
    }
}

struct Client {
    socket: StdUnixStream,
}

impl Client {
    /// All that has come, or "lost".
    fn hears(&mut self) -> String {
        let mut all = Vec::new();
        match self.socket.read_to_end(&mut all) {
            Ok(_) if all.is_empty() => "lost".into(),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => "lost".into(),
            Ok(_) => String::from_utf8_lossy(&all).into_owned(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                String::from_utf8_lossy(&all).into_owned()
            }
        }
    }

    /// How many bytes have come.
    fn count(&mut self) -> usize {
        self.hears().len()
    }
}

/// A process, or what would be one.
struct Server {
    restart: Restart,
    scene: Rc<Scene>,
}

impl Server {
    /// What its program was told since it was asked last.
    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.scene.events.borrow_mut())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The two own each other.
        self.scene.restart.borrow_mut().take();
    }
}

/// What a program and its connections share with the test.
struct Scene {
    name: &'static str,
    events: RefCell<Vec<String>>,
    /// The kind of connections that it takes.
    takes: Cell<&'static str>,
    restart: RefCell<Option<Restart>>,
    connections: Cell<usize>,
}

impl Scene {
    fn note(&self, event: impl Into<String>) {
        self.events.borrow_mut().push(event.into());
    }
}

type Listen = Box<dyn FnMut(&Rc<Scene>, &mut Reactor, &mut Listeners<'_>) -> io::Result<()>>;

/// The program: it notes what it is told.
struct Play {
    scene: Rc<Scene>,
    listen: Listen,
}

impl Program for Play {
    fn listen(&mut self, reactor: &mut Reactor, listeners: &mut Listeners<'_>) -> io::Result<()> {
        self.scene.note("listens");
        (self.listen)(&self.scene, reactor, listeners)
    }

    fn serving(&mut self, _: &mut Reactor, start: Start) {
        self.scene.note(match start {
            Start::TookOver { pid, connections } => format!("took over {pid} {connections}"),
            _ => "serves".into(),
        });
    }

    fn not_started(&mut self, _: &mut Reactor, error: &RestartError) {
        let error = in_short(error);
        self.scene.note(format!("not started: {error}"));
    }

    fn successor_failed(&mut self, _: &mut Reactor, error: &RestartError) {
        self.scene.note(format!("goes on: {error}"));
    }

    fn manager_not_told(&mut self, _: &mut Reactor, error: &RestartError) {
        self.scene.note(error.to_string());
    }

    fn handed_over(&mut self, _: &mut Reactor, _: Duration) {
        self.scene.note("handed over");
    }

    fn takes(&self, kind: &str) -> bool {
        kind == self.scene.takes.get()
    }

    fn connection_moved(&mut self, reactor: &mut Reactor, moved: Moved) {
        let groups: Vec<_> = moved
            .unsent
            .descriptors
            .iter()
            .map(|group| (group.message.clone(), group.descriptors.len()))
            .collect();
        self.scene.note(format!(
            "moved {} {} unread {} unsent {} {groups:?} held {}",
            moved.kind,
            moved.packed.state.len(),
            moved.packed.unread.len(),
            moved.unsent.bytes.len(),
            moved.packed.descriptors.len()
        ));
        let restart = self.scene.restart.borrow().clone().expect("it has begun");
        let mut line = Line::new(&self.scene, &restart);
        line.packed = moved.packed;
        // Of another family than those here, as only a predecessor by hand sends them.
        if let Err(error) = reactor.adopt(Unix.with_unsent(moved.unsent), moved.fd, line) {
            self.scene.note(error.to_string());
        }
    }
}

/// A connection, which does what it is asked: words, each with a number.
struct Line {
    scene: Rc<Scene>,
    restart: Restart,
    number: usize,
    packed: Packed,
    /// Whether it does not want to move.
    stays: bool,
    ticket: Option<MoveTicket>,
}

impl Line {
    fn new(scene: &Rc<Scene>, restart: &Restart) -> Self {
        let number = scene.connections.get();
        scene.connections.set(number + 1);
        Self {
            scene: Rc::clone(scene),
            restart: restart.clone(),
            number,
            packed: Packed::default(),
            stays: false,
            ticket: None,
        }
    }

    fn factory(scene: &Rc<Scene>, restart: &Restart) -> impl FnMut(&Address) -> Self + use<> {
        let (scene, restart) = (Rc::clone(scene), restart.clone());
        move |_| Self::new(&scene, &restart)
    }
}

/// A file that takes no room.
fn file() -> OwnedFd {
    fs::File::open("/dev/null").expect("Linux has it").into()
}

impl Protocol<UnixStream> for Line {
    fn connection_made(&mut self, cx: &mut Context<'_, UnixStream>) {
        let handle = cx.transport.handle();
        self.ticket = Some(self.restart.movable::<UnixStream, Self>(handle));
    }

    fn data_received(&mut self, cx: &mut Context<'_, UnixStream>, data: &[u8]) {
        let text = String::from_utf8_lossy(data).into_owned();
        let mut words = text.split(' ');
        let word = words.next().expect("there is one");
        let count: usize = words
            .next()
            .map_or(0, |count| count.parse().expect("a number"));
        match word {
            "who" => {
                let answer = format!("{} {}", self.scene.name, self.number);
                cx.transport.write(answer.as_bytes());
            }
            "keep" => self.packed.state = vec![b's'; count],
            "unread" => self.packed.unread = vec![b'u'; count],
            "hold" => self.packed.descriptors = (0..count).map(|_| file()).collect(),
            "stay" => self.stays = true,
            "leave" => self.ticket = None,
            "pretend" => {
                let handle = cx.transport.handle();
                self.ticket = Some(self.restart.movable::<UnixStream, Impostor>(handle));
            }
            "write" => {
                cx.transport.write(&vec![b'w'; count]);
            }
            // So that just so many bytes wait.
            "fill" => {
                let waiting = cx.transport.unsent_bytes();
                assert!(waiting <= count, "{waiting} wait");
                cx.transport.write(&vec![b'f'; count - waiting]);
            }
            "pass" => {
                let files = (0..count).map(|_| file().into()).collect();
                cx.transport
                    .write_with_descriptors(b"pass", files)
                    .expect("room");
            }
            other => panic!("{other}?"),
        }
    }

    fn connection_reattached(&mut self, cx: &mut Context<'_, UnixStream>) {
        self.scene.note(format!("{} reattached", self.number));
        let _ = cx;
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, UnixStream>, _: &bowline::CloseReason) {
        self.scene.note(format!("{} lost", self.number));
        let _ = cx;
    }
}

/// What no connection is.
struct Impostor;

impl Protocol<UnixStream> for Impostor {
    fn data_received(&mut self, _: &mut Context<'_, UnixStream>, _: &[u8]) {}
}

impl Movable for Impostor {
    const KIND: &'static str = "line";

    fn pack(&mut self) -> Option<Packed> {
        Some(Packed::default())
    }

    fn unpack(&mut self, _: Packed) {}
}

impl Movable for Line {
    const KIND: &'static str = "line";

    fn pack(&mut self) -> Option<Packed> {
        self.scene.note(format!("packs {}", self.number));
        (!self.stays).then(|| std::mem::take(&mut self.packed))
    }

    fn unpack(&mut self, packed: Packed) {
        self.packed = packed;
    }
}
