//! A chat room on several machines: servers share it through NATS.
//!
//! ```text
//! nats-server -js -sd /tmp/nats
//! cargo run --example chat_nats -- --listen tcp:7002 --nats tcp:host=127.0.0.1:port=4222
//! cargo run --example chat_nats -- --listen tcp:7003 --nats tcp:host=127.0.0.1:port=4222
//! ```
//!
//! `nc 127.0.0.1 7002` and `nc 127.0.0.1 7003`; say `NAME 0` first, then what you like.
//!
//! Every line is stored by the broker, which numbers it. Everybody gets it with its number:
//! `7 ann: hello`. Its author gets `+ 7` once it is stored: from then on no member misses
//! it, whatever is killed. Who comes back says the last number that they have, `ann 7`, and
//! gets what came since. `nats.rs` is the client of NATS.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod nats;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;
use std::time::Duration;

use bowline::endpoint::{ClientEndpoint, ServerEndpoint};
use bowline::framing::{FrameContext, FrameReceiver, Framed, LineFramer};
use bowline::policies::{Backoff, Reconnecting};
use bowline::{Address, AtDrain, CloseReason, Reactor, Transport};
use bowline::{TransportHandle, TransportState, Transports, Watermarks, WriteStatus};

use crate::common::{Arguments, Inspect};
use crate::nats::Nats;

const HELP: &str = "
A chat room on several machines, which servers share through NATS.

Usage: chat_nats --listen ENDPOINT --nats ENDPOINT [--replicas N]

  --listen ENDPOINT  where members come
  --nats ENDPOINT    a NATS server with JetStream
  --replicas N       on how many servers of a cluster each line is stored [default: 1]
  --inspect PLACE    show what is inside: on a UNIX socket (a path),
                     or to browsers (an address)
";

/// How many lines a member may have said that are not stored. No more is read of it then.
const MAX_UNSTORED: u32 = 16;
/// How many lines are kept for those who come back; the broker keeps as many.
pub(crate) const KEPT: usize = 10_000;
/// How much may wait for a member who does not read, in bytes: all lines that are kept.
const MAX_UNSENT: usize = 4 * 1024 * 1024;
const MAX_LINE: usize = 400;

pub(crate) type Shared = Rc<RefCell<Room>>;
type Cx<'a, T> = FrameContext<'a, T, LineFramer>;

/// What all connections of this server have in common.
pub(crate) struct Room {
    /// Makes the names of our lines unlike those of any other server.
    pub(crate) id: u64,
    pub(crate) replicas: u32,
    /// How many there have been to the broker.
    pub(crate) connections: u64,
    /// The broker, while it takes lines.
    pub(crate) nats: Option<TransportHandle>,
    /// Said and not known to be stored, by a number of ours.
    pub(crate) unstored: BTreeMap<u64, (TransportHandle, String)>,
    next: u64,
    /// The last lines, by the broker's numbers.
    lines: VecDeque<(u64, String)>,
    members: BTreeMap<TransportHandle, Seat>,
}

struct Seat {
    /// The last number that it has.
    has: u64,
    unstored: u32,
}

impl Room {
    /// The number of the last line that we have.
    pub(crate) fn last(&self) -> u64 {
        self.lines.back().map_or(0, |(number, _)| *number)
    }

    /// The broker has stored a line of ours.
    pub(crate) fn stored(&mut self, reactor: &mut Reactor, key: u64, number: u64) {
        let Some((author, _)) = self.unstored.remove(&key) else {
            return; // it has said so before
        };
        if let Some(seat) = self.members.get_mut(&author)
            && let Some(transport) = reactor.get(author)
        {
            seat.unstored -= 1;
            transport.write(format!("+ {number}\n").as_bytes());
            transport.resume_producing();
        }
    }

    /// A line has come, of anybody's.
    pub(crate) fn deliver(&mut self, reactor: &mut Reactor, number: u64, text: String) {
        if number <= self.last() {
            return; // once more, after the broker was away
        }
        for (&member, seat) in &mut self.members {
            if seat.has < number
                && let Some(transport) = reactor.get(member)
            {
                seat.has = number;
                send(transport, number, &text);
            }
        }
        self.lines.push_back((number, text));
        if self.lines.len() > KEPT {
            self.lines.pop_front();
        }
    }
}

fn send(transport: &mut dyn Transport, number: u64, text: &str) {
    let status = transport.write(format!("{number} {text}\n").as_bytes());
    if status == WriteStatus::Refused && transport.state() == TransportState::Connected {
        // Does not read. It may come back, and say what it has.
        transport.abort_connection();
    }
}

struct Member {
    room: Shared,
    /// None before the first line.
    name: Option<String>,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Member {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        let watermarks = Watermarks::default().limit(MAX_UNSENT);
        cx.transport.set_watermarks(watermarks);
        cx.transport
            .write(b"* your name, and the last number that you have\n");
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, line: &[u8]) {
        let line = String::from_utf8_lossy(line).trim().to_owned();
        let Some(name) = &self.name else {
            return self.join(cx, &line);
        };
        let room = &mut *self.room.borrow_mut();
        let me = cx.transport.handle();
        let Some(seat) = room.members.get_mut(&me) else {
            return;
        };
        seat.unstored += 1;
        if seat.unstored >= MAX_UNSTORED {
            cx.transport.pause_producing();
        }
        room.next += 1;
        let (key, text) = (room.next, format!("{name}: {line}"));
        // Kept until it is stored, and said again if the broker was away.
        if let Some(nats) = room.nats.and_then(|nats| cx.get(nats)) {
            nats.write(&nats::publish(room, key, &text));
        }
        room.unstored.insert(key, (me, text));
    }

    fn draining(&mut self, cx: &mut Cx<'_, T>) -> AtDrain {
        cx.transport
            .write(b"* this server ends; come back to another\n");
        cx.transport.lose_connection();
        AtDrain::LoseWhenIdle
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        self.room
            .borrow_mut()
            .members
            .remove(&cx.transport.handle());
    }
}

impl Member {
    fn join<T: Transport>(&mut self, cx: &mut Cx<'_, T>, line: &str) {
        let (name, has) = line.split_once(' ').unwrap_or((line, "0"));
        let (false, Ok(has)) = (name.is_empty(), has.parse::<u64>()) else {
            cx.transport.write(b"* such as: ann 0\n");
            return;
        };
        self.name = Some(name.to_owned());
        let mut room = self.room.borrow_mut();
        if let Some(first) = room.lines.front().filter(|(first, _)| *first > has + 1) {
            let gone = format!("* {} to {} are gone\n", has + 1, first.0 - 1);
            cx.transport.write(gone.as_bytes());
        }
        for (number, text) in room.lines.iter().filter(|(number, _)| *number > has) {
            send(cx.transport.as_dyn(), *number, text);
        }
        let has = has.max(room.last());
        let seat = Seat { has, unstored: 0 };
        room.members.insert(cx.transport.handle(), seat);
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let listen = arguments.option::<ServerEndpoint>("--listen")?;
    let nats = arguments.option::<ClientEndpoint>("--nats")?;
    let replicas = arguments.option("--replicas")?.unwrap_or(1);
    arguments.finish()?;
    let listen = listen.ok_or("--listen ENDPOINT, please; try --help")?;
    let nats = nats.ok_or("--nats ENDPOINT, please; try --help")?;
    let room = Rc::new(RefCell::new(Room {
        id: RandomState::new().build_hasher().finish(),
        replicas,
        connections: 0,
        nats: None,
        unstored: BTreeMap::new(),
        next: 0,
        lines: VecDeque::new(),
        members: BTreeMap::new(),
    }));
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let shared = Rc::clone(&room);
    let backoff = Backoff::new()
        .first(Duration::from_millis(50))
        .cap(Duration::from_secs(1));
    let client = Reconnecting::new(move |_: &Address| Nats::new(&shared)).backoff(backoff);
    reactor.connect(nats, client)?;
    let listener = reactor.listen(listen, move |_: &Address| {
        let room = Rc::clone(&room);
        let framer = LineFramer::with_delimiter(b"\n").with_max_length(MAX_LINE);
        Framed::new(framer, Member { room, name: None })
    })?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
