//! Floods of datagrams beside who is honest.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use bowline::{
    Address, AddressRef, CloseReason, Context, Datagram, DatagramProtocol, DatagramTransport,
    Protocol, Reactor, SendStatus, Transport, Transports, Udp, UnixDatagram, UnsentDatagram,
};

use crate::children::Peer;
use crate::support::figures::{Bound, Figures, scaled};
use crate::support::own_process::{in_own_process, resident_bytes};
use crate::support::{DEADLINE, run_until_within};

/// What one socket delivers in a turn at the most: its budget of 256 KiB, of which a
/// datagram costs 1 KiB at the least.
const MOST_PER_TURN: u64 = 256;

/// How long the whole may take on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// How many attackers each kind of socket has.
const ATTACKERS: usize = 2;

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// What became of what a socket was sent, and of its answers.
#[derive(Default)]
struct Account {
    received: Cell<u64>,
    /// Of those: that are not what was sent.
    wrong: Cell<u64>,
    /// Answers that were taken, and not.
    taken: Cell<u64>,
    refused: Cell<u64>,
    /// Answers that came back.
    failed: Cell<u64>,
    /// At any moment, the most of what waited to be sent.
    waiting: Cell<usize>,
    waiting_bytes: Cell<usize>,
    /// In any turn, the most that were delivered.
    turn: Cell<u64>,
    of_turn: Cell<u64>,
    most_of_turn: Cell<u64>,
    /// What comes next from each sender, whose datagrams cannot be dropped.
    next: RefCell<HashMap<Address, u64>>,
    stopped: Cell<bool>,
}

fn add(to: &Cell<u64>, count: u64) {
    to.set(to.get() + count);
}

/// Answers each datagram with itself, whoever sends it.
struct Answerer {
    account: Rc<Account>,
    /// Whether senders wait for room, so that every number has to come.
    is_lossless: bool,
}

impl Answerer {
    /// Whether these are the bytes of a flood, and the next ones of it.
    fn is_right(&self, from: AddressRef<'_>, data: &[u8]) -> bool {
        let Some((number, rest)) = data.split_first_chunk::<8>() else {
            return false;
        };
        let number = u64::from_be_bytes(*number);
        let mut next = self.account.next.borrow_mut();
        let expected = next.entry(from.to_address()).or_insert(0);
        let is_next = match self.is_lossless {
            true => number == *expected,
            false => number >= *expected,
        };
        *expected = number + 1;
        is_next && rest.iter().all(|byte| *byte == number as u8)
    }

    fn count_in_turn(&self, turn: u64) {
        let account = &self.account;
        if account.turn.replace(turn) != turn {
            account.of_turn.set(0);
        }
        add(&account.of_turn, 1);
        let most = account.most_of_turn.get().max(account.of_turn.get());
        account.most_of_turn.set(most);
    }
}

impl<T: DatagramTransport> DatagramProtocol<T> for Answerer {
    fn datagram_received(&mut self, cx: &mut Context<'_, T>, datagram: &mut Datagram<'_>) {
        let account = &self.account;
        add(&account.received, 1);
        self.count_in_turn(cx.reactor.statistics().turns);
        let is_right = !datagram.is_truncated() && self.is_right(datagram.from, datagram.data);
        add(&account.wrong, u64::from(!is_right));
        match cx.transport.send_to(datagram.data, datagram.from) {
            SendStatus::Refused(_) => add(&account.refused, 1),
            SendStatus::Ready | SendStatus::Full => add(&account.taken, 1),
        }
        let waiting = cx.transport.unsent_datagrams();
        account.waiting.set(account.waiting.get().max(waiting));
        let bytes = cx.transport.unsent_bytes();
        account
            .waiting_bytes
            .set(account.waiting_bytes.get().max(bytes));
    }

    fn send_failed(&mut self, _: &mut Context<'_, T>, _: UnsentDatagram<'_>, _: &std::io::Error) {
        add(&self.account.failed, 1);
    }

    fn stopped(&mut self, _: &mut Context<'_, T>, _: &CloseReason) {
        self.account.stopped.set(true);
    }
}

fn answerer(account: &Rc<Account>, is_lossless: bool) -> Answerer {
    Answerer {
        account: Rc::clone(account),
        is_lossless,
    }
}

/// Reliability T-43: processes send to a UDP socket and to a UNIX one as fast as they can
/// and never read an answer; beside them streams are opened and answered. What was sent is
/// delivered, or was dropped by the kernel, which counts it; what was to be answered has
/// left, came back, or was refused.
#[test]
fn floods_of_datagrams_cost_streams_nothing_and_lose_nothing_silently() {
    let name = "floods_of_datagrams_cost_streams_nothing_and_lose_nothing_silently";
    in_own_process(module_path!(), name, || {
        let (pings, least) = (scaled(300, 10_000), scaled(20_000, 1_000_000));
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let mut reactor = Reactor::new().unwrap();
        let (inet, local): (Rc<Account>, Rc<Account>) = Default::default();
        let udp = Udp::at(([127, 0, 0, 1], 0).into());
        let udp = reactor.listen(udp, answerer(&inet, false)).unwrap();
        let port = reactor.get(udp).unwrap().host().as_inet().unwrap();
        let unix = UnixDatagram::at(path("datagrams"));
        let unix = reactor.listen(unix, answerer(&local, true)).unwrap();
        reactor
            .listen_unix(path("streams"), |_: &Address| Echo)
            .unwrap();

        let flood = |words: &[&str]| Peer::start("flood-datagrams", words);
        let mut over_udp: Vec<_> = (0..ATTACKERS)
            .map(|_| flood(&["udp", &port.to_string()]))
            .collect();
        let mut over_unix: Vec<_> = (0..ATTACKERS)
            .map(|number| flood(&["unix", &path("datagrams"), &path(&format!("from-{number}"))]))
            .collect();
        let flooded = |least: u64| inet.received.get() > least && local.received.get() > least;
        // By then both sockets have made what they receive into.
        run_until_within(LONG, &mut reactor, &"no flood", |_| flooded(5_000));
        let before = resident_bytes();
        let client = Peer::start("echo", &[&path("streams"), &pings.to_string()]);
        let client = client.numbers_later();
        run_until_within(LONG, &mut reactor, &"the client", |_| client.is_finished());
        let grown = resident_bytes().saturating_sub(before) as f64 / 1_048_576.0;
        run_until_within(LONG, &mut reactor, &"the flood", |_| flooded(least));
        let (_client, answers) = client.join().unwrap();

        // What is on its way when the last of them has sent is still received.
        over_udp
            .iter_mut()
            .chain(&mut over_unix)
            .for_each(Peer::tell);
        let mut sent_by = |peers: Vec<Peer>| -> (Vec<Peer>, u64) {
            let later: Vec<_> = peers.into_iter().map(Peer::numbers_later).collect();
            let is_done = |_: &mut Reactor| later.iter().all(|it| it.is_finished());
            run_until_within(LONG, &mut reactor, &"their end", is_done);
            let said = later.into_iter().map(|it| it.join().unwrap());
            let (peers, sent): (Vec<_>, Vec<_>) = said.unzip();
            (peers, sent.iter().map(|it| it[0] as u64).sum())
        };
        let (over_udp, sent_udp) = sent_by(over_udp);
        let (over_unix, sent_unix) = sent_by(over_unix);
        let dropped = |reactor: &mut Reactor| {
            let transport = reactor.get(udp).unwrap();
            u64::from(transport.dropped_by_kernel().unwrap())
        };
        run_until_within(DEADLINE, &mut reactor, &"what is on its way", |reactor| {
            inet.received.get() + dropped(reactor) == sent_udp && local.received.get() == sent_unix
        });
        let dropped = dropped(&mut reactor);
        // Those that are gone cannot be answered, which is told.
        drop((over_udp, over_unix));
        run_until_within(DEADLINE, &mut reactor, &"answers that wait", |reactor| {
            reactor.get(udp).unwrap().unsent_datagrams() == 0
                && reactor.get(unix).unwrap().unsent_datagrams() == 0
        });
        let of_inet = reactor.get(udp).unwrap().counts();
        let of_local = reactor.get(unix).unwrap().counts();
        let limits = reactor.get(unix).unwrap().queue_limits();
        let both = |of: fn(&Account) -> u64| of(&inet) + of(&local);
        let most = |of: fn(&Account) -> u64| of(&inet).max(of(&local));
        let number = |count: u64| count as usize;
        Figures::of("T-43")
            .must(
                "datagrams delivered, UDP",
                number(inet.received.get()),
                Bound::AtLeast,
                number(least),
            )
            .must(
                "datagrams delivered, UNIX",
                number(local.received.get()),
                Bound::AtLeast,
                number(least),
            )
            .must(
                "UDP datagrams neither delivered nor counted as dropped by the kernel",
                number(sent_udp - inet.received.get() - dropped),
                Bound::Exactly,
                0,
            )
            .must(
                "UNIX datagrams not delivered",
                number(sent_unix - local.received.get()),
                Bound::Exactly,
                0,
            )
            .must(
                "wrong, or out of order",
                number(both(|it| it.wrong.get())),
                Bound::Exactly,
                0,
            )
            .must(
                "answers taken",
                number(both(|it| it.taken.get())),
                Bound::AtLeast,
                number(least),
            )
            .must(
                "of them neither sent nor given back",
                number(
                    both(|it| it.taken.get())
                        - of_inet.sent
                        - of_local.sent
                        - both(|it| it.failed.get()),
                ),
                Bound::Exactly,
                0,
            )
            .must(
                "answers refused, which was said",
                number(both(|it| it.refused.get())),
                Bound::AtLeast,
                1,
            )
            .must(
                "refusals that were not counted",
                number(both(|it| it.refused.get()).abs_diff(of_inet.refused + of_local.refused)),
                Bound::Exactly,
                0,
            )
            .must(
                "delivered by a socket in one turn at most",
                number(most(|it| it.most_of_turn.get())),
                Bound::AtMost,
                number(MOST_PER_TURN),
            )
            .must(
                "answers that waited at most",
                number(most(|it| it.waiting.get() as u64)),
                Bound::AtMost,
                limits.most,
            )
            .must(
                "bytes of them at most",
                number(most(|it| it.waiting_bytes.get() as u64)),
                Bound::AtMost,
                limits.most_bytes,
            )
            .must(
                "honest pings answered",
                answers[1] as usize,
                Bound::Exactly,
                pings,
            )
            .measured("growth of memory", grown, "MiB", Bound::Below, 10.0)
            .measured(
                "honest connect and ping, p99",
                answers[0],
                "ms",
                Bound::Below,
                50.0,
            )
            .remark(&format!(
                "{dropped} of {sent_udp} UDP datagrams were dropped by the kernel"
            ));
    });
}
