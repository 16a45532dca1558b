//! Two processes that flood each other with messages and descriptors.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::{Command, Stdio, exit};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bowline::handoff::channel::{Channel, ChannelReceiver, ChannelSettings, Peer, Role};
use bowline::handoff::wire::{self, Incoming, Message, PayloadReader, PayloadWriter, WireError};
use bowline::process::{spawn_with_descriptors, take_granted};
use bowline::{Context, PassedDescriptor, Reactor, Transports, UnixTransport};
use rustix::fs::MemfdFlags;

use crate::support::figures::{Bound, Figures, scaled};
use crate::support::{DescriptorLedger, open_descriptors};

/// Says to a process that it is the other one, and how many messages there are.
const OTHER: &str = "BOWLINE_TEST_FLOOD";

/// The number of its channel.
const CHANNEL: u32 = 3;

/// How many bytes a message has: with 10,000 of them, 100 MB.
const FILLING: usize = 10_000;

/// How many may be unanswered, as with worker pools.
const WINDOW: u32 = 64;

/// How many different descriptors are passed: files of so many bytes.
const FILES: u32 = 16;

const LEFT: Role = Role(0x8000);
const RIGHT: Role = Role(0x8001);

enum Flood {
    /// With the descriptor of a file of `number % FILES` bytes.
    Data { number: u32, filling: Vec<u8> },
    /// The answer.
    Seen { number: u32 },
}

impl Message for Flood {
    fn kind(&self) -> u16 {
        match self {
            Self::Data { .. } => 0x8000,
            Self::Seen { .. } => 0x8001,
        }
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        match self {
            Self::Data { number, filling } => {
                payload.u32(*number);
                payload.bytes(filling);
            }
            Self::Seen { number } => payload.u32(*number),
        }
    }

    fn decode(kind: u16, _: u16, payload: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        match kind {
            0x8000 => Ok(Self::Data {
                number: payload.u32()?,
                filling: payload.bytes()?.to_vec(),
            }),
            0x8001 => Ok(Self::Seen {
                number: payload.u32()?,
            }),
            kind => Err(WireError::UnknownKind { kind }),
        }
    }
}

#[derive(Default)]
struct Progress {
    sent: u32,
    answered: u32,
    received: u32,
    bytes: u64,
    wrong: u32,
    is_over: bool,
}

/// Sends as fast as the window lets it, and answers at once whatever else waits.
struct End {
    progress: Rc<RefCell<Progress>>,
    files: Vec<Rc<OwnedFd>>,
    total: u32,
}

impl End {
    fn new(total: u32) -> Self {
        let file = |size: u32| {
            let file = rustix::fs::memfd_create("passed", MemfdFlags::CLOEXEC).expect("a memfd");
            rustix::fs::ftruncate(&file, size.into()).expect("it grows");
            Rc::new(file)
        };
        Self {
            progress: Rc::default(),
            files: (0..FILES).map(file).collect(),
            total,
        }
    }

    fn send_more<T: UnixTransport + ?Sized>(&self, cx: &mut Context<'_, T>) {
        let mut progress = self.progress.borrow_mut();
        while progress.sent < self.total && progress.sent - progress.answered < WINDOW {
            let number = progress.sent;
            let filling = vec![number as u8; FILLING];
            let file = PassedDescriptor::shared(&self.files[(number % FILES) as usize]);
            wire::send(cx.transport, &Flood::Data { number, filling }, vec![file]).expect("open");
            progress.sent += 1;
        }
    }
}

impl<T: UnixTransport + ?Sized> ChannelReceiver<T> for End {
    type Message = Flood;

    fn channel_made(&mut self, cx: &mut Context<'_, T>, _: &Peer) {
        self.send_more(cx);
    }

    fn message_received(&mut self, cx: &mut Context<'_, T>, incoming: Incoming<Flood>) {
        match incoming.message {
            Flood::Data { number, filling } => {
                let size = |fd: &OwnedFd| rustix::fs::fstat(fd.as_fd()).expect("open").st_size;
                let sizes: Vec<_> = incoming.descriptors.iter().map(size).collect();
                let mut progress = self.progress.borrow_mut();
                let is_right = number == progress.received
                    && filling.iter().all(|byte| *byte == number as u8)
                    && sizes == [i64::from(number % FILES)];
                progress.wrong += u32::from(!is_right);
                progress.received += 1;
                progress.bytes += filling.len() as u64;
                drop(progress);
                wire::send(cx.transport, &Flood::Seen { number }, Vec::new()).expect("open");
            }
            Flood::Seen { number } => {
                let mut progress = self.progress.borrow_mut();
                progress.wrong += u32::from(number != progress.answered);
                progress.answered += 1;
                drop(progress);
                self.send_more(cx);
            }
        }
        let mut progress = self.progress.borrow_mut();
        if progress.received == self.total && progress.answered == self.total {
            progress.is_over = true;
            drop(progress);
            // With the last answer, which the other one waits for.
            cx.transport.lose_connection();
        }
    }
}

/// Runs one end until both are done; how long that took.
fn run(socket: OwnedFd, role: Role, peer: Role, total: u32) -> (Rc<RefCell<Progress>>, Duration) {
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 1).expect("a socket");
    let mut reactor = Reactor::new().expect("a reactor");
    let end = End::new(total);
    let progress = Rc::clone(&end.progress);
    let channel = Channel::new(ChannelSettings::new(role, peer), end);
    reactor
        .adopt_unix_stream(socket, channel)
        .expect("a socket");
    let began = Instant::now();
    while reactor.registered() > 0 {
        reactor.turn(Some(Duration::from_millis(100)));
        assert!(began.elapsed() < Duration::from_secs(300), "a deadlock");
    }
    (progress, began.elapsed())
}

/// Reliability T-28: with the smallest buffers, and both sides sending all the
/// time, everything arrives, in order, each message with its own descriptor.
#[test]
fn two_processes_that_flood_each_other_both_finish() {
    if let Ok(total) = std::env::var(OTHER) {
        let total = total.parse().expect("a number");
        let socket = take_granted(CHANNEL).expect("it was given");
        let (progress, _) = run(socket, RIGHT, LEFT, total);
        let progress = progress.borrow();
        let is_good = progress.is_over && progress.wrong == 0;
        // The descriptor of the harness's own, beside the three streams.
        let is_clean = open_descriptors().iter().all(|fd| *fd as u32 != CHANNEL);
        exit(i32::from(!(is_good && is_clean)));
    }
    let ledger = DescriptorLedger::open();
    let total = scaled(500, 10_000);
    let (ours, theirs) = StdUnixStream::pair().expect("a pair");
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1).expect("a socket");
    let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
    command
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .arg("flood::two_processes_that_flood_each_other_both_finish")
        .env(OTHER, total.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut child = spawn_with_descriptors(command, &[(theirs.as_fd(), CHANNEL)]).expect("starts");
    drop(theirs);
    let (progress, took) = run(ours.into(), LEFT, RIGHT, total);
    let progress = progress.borrow();
    assert!(child.wait().expect("ours").success());
    assert!(progress.is_over);
    Figures::of("T-28")
        .must(
            "descriptors each way",
            progress.received as usize,
            Bound::Exactly,
            total as usize,
        )
        .must(
            "bytes each way",
            progress.bytes as usize,
            Bound::Exactly,
            total as usize * FILLING,
        )
        .must(
            "wrong, or out of order",
            progress.wrong as usize,
            Bound::Exactly,
            0,
        )
        .measured("time", took.as_secs_f64(), "s", Bound::Below, 60.0);
    drop(progress);
    ledger.assert_balanced();
}
