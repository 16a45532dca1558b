//! Sockets that others hold too: what they do with them does not reach our
//! loop.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bowline::{
    Address, Context, Pipe, Protocol, Reactor, Tcp, Transport, TransportHandle, Transports,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::PipeFlags;

use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, Record, Recorder, run_until, socketpair};

/// Echoes.
struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// Says to the test binary that it is the new owner of sockets.
const OWNER: &str = "BOWLINE_TEST_OWNER";

/// The process that is passed sockets, on its standard input: it echoes what comes on
/// each until its end, one after the other.
#[test]
fn owner_of_passed_sockets() {
    if std::env::var_os(OWNER).is_none() {
        return;
    }
    let channel = io::stdin();
    while let Some(passed) = receive_one(&channel) {
        let mut stream = StdUnixStream::from(passed);
        // As any other stream socket, which it may be.
        stream.set_nonblocking(false).expect("a socket");
        let mut bytes = [0; 64];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            if stream.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
    }
}

/// The descriptor of the next message; none at the end.
fn receive_one(channel: impl AsFd) -> Option<OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let bytes = &mut [io::IoSliceMut::new(&mut byte)];
    recvmsg(channel, bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC).expect("a channel");
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

/// How we let go of what we have passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// By `detach`, which is what gives the socket.
    Detached,
    /// By a plain close; the new owner has a copy.
    Closed,
    /// By an abort; the same.
    Aborted,
}

/// Both ends of a new connection, ours first.
fn pair(over_tcp: bool) -> (OwnedFd, Box<dyn Both>) {
    if !over_tcp {
        let (ours, far) = socketpair();
        far.set_nonblocking(false).expect("a socket");
        return (ours.into(), Box::new(far));
    }
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).expect("loopback");
    let far = StdTcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    far.set_nodelay(true).expect("TCP");
    let (ours, _) = listener.accept().expect("one waits");
    (ours.into(), Box::new(far))
}

/// Reliability T-23: a socket that was passed to another process and closed here,
/// whichever way, stays silent while traffic on it goes on there.
#[test]
fn a_passed_socket_stays_silent_while_its_new_owner_uses_it() {
    let ledger = DescriptorLedger::open();
    let passes = scaled(500, 10_000);
    let mut reactor = Reactor::new().unwrap();
    let (channel, theirs) = StdUnixStream::pair().expect("a pair");
    let mut owner = std::process::Command::new(std::env::current_exe().expect("Linux knows"))
        .args(["--exact", "sharing::owner_of_passed_sockets", "--nocapture"])
        .env(OWNER, "1")
        .stdin(OwnedFd::from(theirs))
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    let channel = reactor
        .adopt_unix_stream(channel.into(), Recorder::default())
        .expect("a socket");
    let (mut silent, mut told) = (0, 0);
    for pass in 0..passes {
        let leaving = [Leaving::Detached, Leaving::Closed, Leaving::Aborted][pass % 3];
        let over_tcp = pass % 2 == 1;
        let (ours, mut far) = pair(over_tcp);
        let record = Record::default();
        let protocol = Recorder::new(&record);
        let copy = ours.try_clone().expect("room");
        if over_tcp {
            reactor.adopt_tcp_stream(ours, protocol).expect("a stream");
        } else {
            reactor.adopt_unix_stream(ours, protocol).expect("a stream");
        }
        far.write_all(b"here").expect("it is open");
        run_until(&mut reactor, |_| record.data() == b"here");

        let handle = record.handle(0);
        let passed = match leaving {
            Leaving::Detached => {
                drop(copy);
                detached(&mut reactor, handle)
            }
            Leaving::Closed => {
                reactor.get(handle).expect("open").lose_connection();
                run_until(&mut reactor, |_| record.is_lost());
                copy
            }
            Leaving::Aborted => {
                reactor.get(handle).expect("open").abort_connection();
                run_until(&mut reactor, |_| record.is_lost());
                copy
            }
        };
        let to_owner = reactor.get(channel).expect("it is open");
        to_owner
            .write_with_descriptors(b"!", vec![passed.into()])
            .expect("queued");
        run_until(&mut reactor, |reactor| {
            let to_owner = reactor.get(channel).expect("it is open");
            to_owner.unsent_descriptors() == 0
        });

        let before = reactor.statistics();
        for _ in 0..3 {
            far.write_all(b"there").expect("it is open");
            reactor.turn(Some(Duration::ZERO));
            let mut bytes = [0; 5];
            far.read_exact(&mut bytes).expect("the owner echoes");
            reactor.turn(Some(Duration::ZERO));
        }
        drop(far);
        reactor.turn(Some(Duration::ZERO));
        let after = reactor.statistics();
        let events = after.events - before.events + after.stale_events - before.stale_events;
        silent += usize::from(events == 0);
        // Of its own end only, and never after it.
        let lost = record.count(|event| matches!(event, crate::support::Event::Lost(_)));
        told += lost - usize::from(leaving != Leaving::Detached);
        assert_eq!(record.data(), b"here", "{leaving:?}");
    }
    Figures::of("T-23")
        .must("passes", passes, Bound::AtLeast, 500)
        .must(
            "without an event afterwards",
            silent,
            Bound::Exactly,
            passes,
        )
        .must("protocols told of another's end", told, Bound::Exactly, 0)
        .remark("to another process; by detach, close and abort, over UNIX sockets and TCP");
    drop(reactor);
    assert!(owner.wait().expect("ours").success());
    ledger.assert_balanced();
}

/// The socket of a connection that is given away.
fn detached(reactor: &mut Reactor, handle: TransportHandle) -> OwnedFd {
    let given = Rc::new(RefCell::new(None));
    let giving = Rc::clone(&given);
    reactor.detach::<Recorder>(handle, move |_, result| {
        *giving.borrow_mut() = result.ok().map(|detached| detached.fd);
    });
    run_until(reactor, |_| given.borrow().is_some());
    given.take().expect("detached")
}

/// Another holder that cannot make up its mind whether the socket blocks.
struct Toggler {
    stop: Arc<AtomicBool>,
    times: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Toggler {
    fn start(sockets: Vec<OwnedFd>) -> Self {
        let (stop, times) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&times));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for socket in &sockets {
                    let flags = fcntl_getfl(socket).expect("open");
                    fcntl_setfl(socket, flags ^ OFlags::NONBLOCK).expect("open");
                }
                counted.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        });
        Self {
            stop,
            times,
            thread,
        }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic");
        self.times.load(Ordering::Relaxed)
    }
}

/// Turns as fast as it goes until the client is done, which everything came back to; what is `measured` of the
/// turns is how many blocked, and the longest.
#[track_caller]
fn assert_no_turn_blocks(
    reactor: &mut Reactor,
    client: JoinHandle<()>,
    toggler: Toggler,
    measured: [&str; 2],
) {
    let mut longest = Duration::ZERO;
    while !client.is_finished() {
        let turn = Instant::now();
        reactor.turn(Some(Duration::ZERO));
        longest = longest.max(turn.elapsed());
    }
    client.join().expect("everything came back");
    let times = toggler.stop();
    assert!(times >= 1_000, "toggled {times} times");
    let [blocked, longest_turn] = measured;
    let blocks = usize::from(longest > BLOCKED);
    let milliseconds = longest.as_secs_f64() * 1e3;
    Figures::of("T-24")
        .must(blocked, blocks, Bound::Exactly, 0)
        .measured(longest_turn, milliseconds, "ms", Bound::Below, 20.0);
}

/// How long a turn may take before it has blocked, whatever the machine does.
const BLOCKED: Duration = Duration::from_secs(2);

/// How long a client waits for an answer, on whatever machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Reliability T-24: connections whose other holders make them block, and not,
/// and block; sockets and pipes.
#[test]
fn connections_do_not_block_whatever_their_other_holders_do() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut tcp = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let (ours, mut unix) = socketpair();
    unix.set_nonblocking(false).unwrap();
    // A loop that blocks gets nothing, and answers nothing: it is to be seen, and not
    // waited for.
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.set_write_timeout(Some(PATIENCE)).unwrap();
    unix.set_read_timeout(Some(PATIENCE)).unwrap();
    unix.set_write_timeout(Some(PATIENCE)).unwrap();
    let (asked, ask) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (hear, told) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    let mut pipes = Pipes {
        reading: hear.into(),
        writing: ask.into(),
    };
    let shared = vec![
        accepted.try_clone().unwrap().into(),
        ours.try_clone().unwrap().into(),
        asked.try_clone().unwrap(),
        told.try_clone().unwrap(),
    ];
    reactor.adopt_tcp_stream(accepted.into(), Echo).unwrap();
    reactor.adopt_unix_stream(ours.into(), Echo).unwrap();
    reactor.adopt(Pipe::pair(), (asked, told), Echo).unwrap();
    let toggler = Toggler::start(shared);
    let toggled = Arc::clone(&toggler.times);
    let rounds = scaled(100, 2_000);
    // Small ones, and such as do not fit: reads and writes that have to wait.
    let client = thread::spawn(move || {
        let mut back = vec![0; 1 << 20];
        // Until the other holder has had its turn, too.
        let busy = |round| round < rounds || toggled.load(Ordering::Relaxed) < 1_000;
        for round in (0_u32..).take_while(|round| busy(*round)) {
            let length = if round % 50 == 0 { 1 << 20 } else { 10 };
            let bytes = vec![round as u8; length];
            let half = length / 2;
            for stream in [&mut tcp as &mut dyn Both, &mut unix, &mut pipes] {
                for part in [&bytes[..half], &bytes[half..]] {
                    stream.write_all(part).unwrap();
                    stream.read_exact(&mut back[..part.len()]).unwrap();
                    assert_eq!(part, &back[..part.len()]);
                }
            }
        }
    });
    let measured = ["turns that blocked, on connections", "longest turn"];
    assert_no_turn_blocks(&mut reactor, client, toggler, measured);
    drop((reactor, listener));
    ledger.assert_balanced();
}

/// The other ends of two pipes, with a limit as of sockets.
struct Pipes {
    reading: File,
    writing: File,
}

/// What a pipe takes at once when it takes anything.
const PIPE_BYTES: usize = 4_096;

fn wait_for(file: &File, what: PollFlags) -> io::Result<()> {
    let limit = Timespec::try_from(PATIENCE).expect("short");
    match poll(&mut [PollFd::new(file, what)], Some(&limit))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

impl Read for Pipes {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        wait_for(&self.reading, PollFlags::IN)?;
        self.reading.read(bytes)
    }
}

impl Write for Pipes {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        wait_for(&self.writing, PollFlags::OUT)?;
        self.writing.write(&bytes[..bytes.len().min(PIPE_BYTES)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

trait Both: Read + Write {}
impl<S: Read + Write> Both for S {}

/// Reliability T-24: and listeners, which have no call that does not block.
#[test]
fn listeners_do_not_block_whatever_their_other_holders_do() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let listener = StdTcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let shared = vec![listener.try_clone().unwrap().into()];
    reactor
        .listen(Tcp::listening(listener.into()), |_: &Address| Echo)
        .unwrap();
    let toggler = Toggler::start(shared);
    let toggled = Arc::clone(&toggler.times);
    let rounds = scaled(200, 5_000);
    let client = thread::spawn(move || {
        let busy = |round| round < rounds || toggled.load(Ordering::Relaxed) < 1_000;
        for _ in (0_u32..).take_while(|round| busy(*round)) {
            let mut stream = StdTcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(b"x").unwrap();
            // Not answered while the loop waits for another connection.
            stream.read_exact(&mut [0]).unwrap();
        }
    });
    let measured = [
        "turns that blocked, on listeners",
        "longest turn, accepting",
    ];
    assert_no_turn_blocks(&mut reactor, client, toggler, measured);
    drop(reactor);
    ledger.assert_balanced();
}
