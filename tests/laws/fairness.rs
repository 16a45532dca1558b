//! Turns are bounded: what is counted is turns and bytes, never time.

use std::cell::Cell;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream as Peer;
use std::rc::Rc;
use std::time::Duration;

use bowline::{
    Address, Context, Limits, Protocol, Reactor, Transport, TransportBudgets, TransportHandle,
    Transports, UnixAddress,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until, run_until_quiet, socketpair};

/// As much as one connection may read in one turn: four times its buffer.
const MOST_PER_TURN: usize = 4 * 65_536;

/// Counts what it received.
struct Counts {
    bytes: Rc<Cell<usize>>,
}

impl<T: Transport> Protocol<T> for Counts {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.bytes.set(self.bytes.get() + data.len());
    }
}

/// Fills the socket; how much went in.
fn fill(mut peer: &Peer) -> usize {
    let chunk = [0; 65_536];
    let mut all = 0;
    while let Ok(count) = peer.write(&chunk) {
        all += count;
    }
    all
}

/// A connected TCP pair with buffers of megabytes.
fn large_pair() -> (std::net::TcpStream, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&ours, 4 << 20).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 4 << 20).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// Contract F-29, W-42.
#[test]
fn greedy_peer_has_its_share_of_a_turn_and_no_more() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = large_pair();
    let greedy = Rc::new(Cell::new(0));
    let protocol = Counts {
        bytes: Rc::clone(&greedy),
    };
    reactor.adopt_tcp_stream(ours.into(), protocol).unwrap();
    let (ours, mut modest_peer) = socketpair();
    let modest = Rc::new(Cell::new(0));
    let protocol = Counts {
        bytes: Rc::clone(&modest),
    };
    reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
    reactor.turn(Some(Duration::ZERO));
    for turn in 1..=100 {
        while (&theirs).write(&[0; 65_536]).is_ok() {}
        modest_peer.write_all(b"x").unwrap();
        let before = greedy.get();
        reactor.turn(Some(Duration::ZERO));
        let read = greedy.get() - before;
        assert!(read <= MOST_PER_TURN, "{read} bytes in turn {turn}");
        assert_eq!(modest.get(), turn, "the modest one waits");
    }
    assert!(greedy.get() > 1_000_000);
    drop((reactor, theirs, modest_peer));
    ledger.assert_balanced();
}

/// Writes each thing it receives to another connection.
struct WritesTo {
    other: Rc<Cell<Option<TransportHandle>>>,
    bytes: Rc<Cell<usize>>,
}

impl<T: Transport> Protocol<T> for WritesTo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.bytes.set(self.bytes.get() + data.len());
        if let Some(other) = self.other.get().and_then(|it| cx.get(it)) {
            other.write(b"x");
        }
    }
}

/// Each visit of one to the other began a new budget of reads: the two kept the
/// turn until both sockets were empty.
#[test]
fn greedy_pair_that_writes_to_each_other_does_not_keep_the_turn() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let bytes = Rc::new(Cell::new(0));
    let names = [Rc::new(Cell::new(None)), Rc::new(Cell::new(None))];
    let mut peers = Vec::new();
    for number in 0..2 {
        let (ours, theirs) = large_pair();
        let protocol = WritesTo {
            other: Rc::clone(&names[1 - number]),
            bytes: Rc::clone(&bytes),
        };
        let handle = reactor.adopt_tcp_stream(ours.into(), protocol).unwrap();
        names[number].set(Some(handle));
        peers.push(theirs);
    }
    reactor.turn(Some(Duration::ZERO));
    for peer in &peers {
        while (&*peer).write(&[0; 65_536]).is_ok() {}
    }
    for turn in 1..=5 {
        let before = bytes.get();
        reactor.turn(Some(Duration::ZERO));
        let read = bytes.get() - before;
        assert!(read <= 2 * MOST_PER_TURN, "{read} bytes in turn {turn}");
    }
    drop((reactor, peers));
    ledger.assert_balanced();
}

#[test]
fn what_the_budget_left_is_read_without_a_new_event() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    let (ours, theirs) = large_pair();
    let bytes = Rc::new(Cell::new(0));
    let protocol = Counts {
        bytes: Rc::clone(&bytes),
    };
    reactor.adopt_tcp_stream(ours.into(), protocol).unwrap();
    let mut sent = 0;
    while let Ok(count) = (&theirs).write(&[0; 65_536]) {
        sent += count;
    }
    assert!(sent > MOST_PER_TURN);
    run_until(&mut reactor, |_| bytes.get() == sent);
    drop((reactor, theirs));
    ledger.assert_balanced();
}

/// Contract L-03.
#[test]
fn flood_of_connections_leaves_others_their_turn_and_is_accepted_whole() {
    const CLIENTS: usize = 350;
    let ledger = DescriptorLedger::open();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut reactor = Reactor::new().unwrap();
    let record = Record::default();
    let recorder = Recorder::new(&record);
    reactor
        .listen_unix(UnixAddress::Path(path.clone()), move |_: &Address| {
            recorder.clone()
        })
        .unwrap();
    let (ours, mut peer) = socketpair();
    let echoed = Record::default();
    reactor
        .adopt_unix_stream(ours.into(), Recorder::new(&echoed))
        .unwrap();
    reactor.turn(Some(Duration::ZERO));
    let clients: Vec<Peer> = (0..CLIENTS)
        .map(|_| Peer::connect(&path).unwrap())
        .collect();
    peer.write_all(b"x").unwrap();
    reactor.turn(Some(Duration::ZERO));
    let accepted = record.summary().len();
    assert!((1..=100).contains(&accepted), "{accepted} in one turn");
    assert_eq!(echoed.data(), b"x");
    // No further connection comes, and none is left behind.
    let mut turns = 1;
    while record.summary().len() < CLIENTS {
        reactor.turn(Some(Duration::ZERO));
        turns += 1;
        assert!(turns <= 4, "{} after {turns} turns", record.summary().len());
    }
    drop((reactor, clients, directory, peer));
    ledger.assert_balanced();
}

#[test]
fn more_ready_descriptors_than_a_poll_fetches_all_get_their_turn() {
    let ledger = DescriptorLedger::open();
    let mut reactor = Reactor::new().unwrap();
    reactor.set_limits(Limits::default().events(8));
    let mut all = Vec::new();
    for _ in 0..50 {
        let (ours, theirs) = socketpair();
        let bytes = Rc::new(Cell::new(0));
        let protocol = Counts {
            bytes: Rc::clone(&bytes),
        };
        reactor.adopt_unix_stream(ours.into(), protocol).unwrap();
        all.push((theirs, bytes));
    }
    reactor.turn(Some(Duration::ZERO));
    // All are ready all the time.
    for (peer, _) in &all {
        fill(peer);
    }
    for _ in 0..50usize.div_ceil(8) + 1 {
        reactor.turn(Some(Duration::ZERO));
        for (peer, _) in &all {
            fill(peer);
        }
    }
    assert!(all.iter().all(|(_, bytes)| bytes.get() > 0));
    drop(reactor);
    for (mut peer, _) in all {
        let _ = peer.read(&mut [0]);
    }
    ledger.assert_balanced();
}

/// Limits its reads to ten bytes and counts them.
struct SmallReader {
    reads: Rc<Cell<usize>>,
}

impl<T: Transport> Protocol<T> for SmallReader {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.set_read_limit(NonZeroUsize::new(10));
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        assert_eq!(data.len(), 10);
        self.reads.set(self.reads.get() + 1);
    }
}

/// L5: the budget of a connection's reads is what it says, whatever it is set
/// to. A read of ten bytes counts as 8 KiB.
#[test]
fn connection_reads_as_much_per_turn_as_its_budget_says() {
    let ledger = DescriptorLedger::open();
    let cases = [(None, 32), (Some(1), 1), (Some(0), 1), (Some(7 * 8_192), 7)];
    for (asked, budget) in cases {
        let reads = Rc::new(Cell::new(0));
        let mut reactor = Reactor::new().unwrap();
        if let Some(read_bytes) = asked {
            reactor.set_transport_budgets(TransportBudgets::default().read_bytes(read_bytes));
            assert_eq!(reactor.transport_budgets().read_bytes, read_bytes.max(1));
        }
        let (ours, mut theirs) = socketpair();
        let reader = SmallReader {
            reads: Rc::clone(&reads),
        };
        reactor.adopt_unix_stream(ours.into(), reader).unwrap();
        run_until_quiet(&mut reactor);
        theirs.write_all(&[0; 10 * 224]).unwrap();
        // 224 reads are a whole number of turns for each of the budgets.
        for turn in 1..=224 / budget {
            reactor.turn(Some(Duration::from_secs(1)));
            assert_eq!(reads.get(), turn * budget, "budget {budget}");
        }
    }
    ledger.assert_balanced();
}
