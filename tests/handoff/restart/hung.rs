//! Successors that hang once connections move (T-30): one made by hand, which goes
//! exactly as far as a test wants.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use bowline::handoff::channel::{Hello, Role};
use bowline::handoff::wire::{Message, PayloadReader, PayloadWriter, WireError, encode_frame};
use rustix::process::Signal;

use super::client::{Server, took};
use super::server::LIMIT;
use crate::support::DescriptorLedger;
use crate::support::figures::{Bound, Figures};

/// Has all listeners, says so, and never is ready.
pub(crate) const HAS_ALL: &str = "hangs with all listeners";

/// Hangs before it says that the first connections are its own.
pub(crate) const TOLD_TO_GO: &str = "hangs when it is told to go";

/// Hangs when the first connections are its own and the next come.
pub(crate) const LIVE: &str = "hangs when some connections are live";

/// A frame is the length of its payload in four bytes, its kind in two, and more.
const HEADER: usize = 8;

/// As many as one message moves.
const BATCH: usize = 64;

/// What the successor says: a kind, and its numbers.
struct Say(u16, &'static [u32], Option<u32>);

impl Message for Say {
    fn kind(&self) -> u16 {
        self.0
    }

    fn encode(&self, payload: &mut PayloadWriter<'_>) {
        for number in self.2.iter().chain(self.1) {
            payload.u32(*number);
        }
    }

    fn decode(kind: u16, _: u16, _: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Err(WireError::UnknownKind { kind })
    }
}

/// The successor: answers until `fault` says to hang. It lets go of every descriptor it
/// is sent, which is nobody's loss but its own.
pub(crate) fn run<N>(directory: &Path, fault: &str, hang: impl Fn() -> N) {
    let mut socket = UnixStream::connect(directory.join("control/control")).expect("it serves");
    let hello = Hello {
        versions: 1..=1,
        role: Role::SUCCESSOR,
        pid: std::process::id(),
        max_payload: 1 << 20,
    };
    let take = Say(0x0200, &[], Some(0));
    let greeting = [frame(&hello), frame(&take)].concat();
    socket.write_all(&greeting).expect("room");
    let mut batches = 0;
    loop {
        // Read without room for descriptors: the kernel closes them.
        let mut header = [0; HEADER];
        socket.read_exact(&mut header).expect("it serves");
        let [a, b, c, d, e, f, _, _] = header;
        let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
        socket.read_exact(&mut payload).expect("it serves");
        let kind = u16::from_be_bytes([e, f]);
        let number = payload
            .first_chunk()
            .map_or(0, |it| u32::from_be_bytes(*it));
        let answer = match kind {
            // How many messages of listeners follow.
            0x0211 => {
                batches = number;
                continue;
            }
            0x0212 => vec![Say(0x0201, &[], Some(number))],
            // Connections, the first of which are 1.
            0x0214 if number > 1 && fault == LIVE => {
                hang();
                unreachable!("it hangs");
            }
            0x0214 => vec![Say(0x0204, &[0], Some(number))],
            0x0215 if fault == TOLD_TO_GO => {
                hang();
                unreachable!("it hangs");
            }
            0x0215 => vec![Say(0x0205, &[], Some(number))],
            _ => continue,
        };
        let is_ready = kind == 0x0212 && number + 1 == batches;
        let ready = is_ready.then_some(Say(0x0202, &[], None));
        let hangs = is_ready && fault == HAS_ALL;
        for message in answer.into_iter().chain(ready.filter(|_| !hangs)) {
            socket.write_all(&frame(&message)).expect("room");
        }
        if hangs {
            hang();
        }
    }
}

fn frame(message: &impl Message) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_frame(message, 0, &mut frame).expect("short");
    frame
}

/// Reliability T-30: a successor that hangs when it is told that connections are its own
/// is killed, and everybody is served on by the old process.
#[test]
fn successor_that_hangs_before_it_is_live_costs_no_connection() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    // One that has taken over has a timer descriptor already.
    server.restart();
    let old = server.pid();
    let mut clients: Vec<_> = (0..2 * BATCH).map(|_| server.connect_unix()).collect();
    clients.iter_mut().for_each(|client| client.echo(b"before"));
    // In the middle of something.
    clients[3].begin(b'e', b"half of it", None);
    let descriptors = server.descriptors();
    server.set_fault(TOLD_TO_GO);
    server.signal(Signal::HUP);
    let child = server.child_of(old);
    server.wait_for(&format!("{child} hangs"));
    server.hurry();
    let told = server.wait_for(&format!("{old} goes on: the other process is gone"));
    // Each step has its limit, and so has the whole.
    let took = took(&told);
    assert!(took >= LIMIT && took < LIMIT * 8, "{told}");
    clients[3].end();
    assert_eq!(clients[3].receive().expect("an answer"), b"half of it");
    for client in &mut clients {
        assert_eq!(client.ask_pid().expect("an answer"), old);
    }
    assert!(!Path::new(&format!("/proc/{child}")).exists(), "it is dead");
    assert_eq!(server.descriptors(), descriptors);
    server.set_fault("");
    server.restart();
    for client in &mut clients {
        assert_eq!(client.ask_pid().expect("it has moved"), server.pid());
    }
    Figures::of("T-30").must(
        "connections of a successor that hung before they were its own, and not lost",
        clients.len(),
        Bound::Exactly,
        2 * BATCH,
    );
}

/// Reliability T-30: one that hangs later is killed with the connections that it has said
/// to serve; nobody else may touch those. The others stay.
#[test]
fn successor_that_hangs_when_it_is_live_costs_what_it_had() {
    let _ledger = DescriptorLedger::open();
    let server = Server::start();
    let old = server.pid();
    let mut clients: Vec<_> = (0..2 * BATCH).map(|_| server.connect_unix()).collect();
    clients.iter_mut().for_each(|client| client.echo(b"before"));
    server.set_fault(LIVE);
    server.signal(Signal::HUP);
    let child = server.child_of(old);
    server.wait_for(&format!("{child} hangs"));
    server.hurry();
    server.wait_for(&format!("{old} goes on: the other process took too long"));
    let (mut kept, mut lost) = (0, 0);
    for client in &mut clients {
        match client.ask_pid() {
            Ok(pid) => {
                assert_eq!(pid, old);
                kept += 1;
            }
            // Said, and not left waiting.
            Err(_) => lost += 1,
        }
    }
    assert_eq!((kept, lost), (BATCH, BATCH));
    let mut new = server.connect_tcp("one");
    assert_eq!(new.ask_pid().expect("an answer"), old);
    Figures::of("T-30").must(
        "connections lost to a successor that hung when they were its own, of 128",
        lost,
        Bound::Exactly,
        BATCH,
    );
}
