//! A broker: who publishes on a topic is heard by all that subscribe to it.
//!
//! ```text
//! cargo run --example pubsub -- --listen tcp:127.0.0.1:7004
//! ```
//!
//! In two other terminals, `nc 127.0.0.1 7004`, and `sub news` in one of them, `pub news
//! hello` in the other.
//!
//! What becomes of messages for a subscriber that does not read is the one question that
//! a broker has to answer. This one knows two answers, and `--load` shows both: it has a
//! publisher publish as fast as it may, one of the subscribers stop for a third of the
//! time, and draws what each of them got meanwhile.
//!
//! ```text
//! cargo run --release --example pubsub -- --load --plot pubsub.svg
//! ```
//!
//! `load.rs` makes the load and draws it; this file is the broker.

#![allow(clippy::print_stdout)]

#[path = "../common/mod.rs"]
mod common;
mod load;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use bowline::framing::{FrameContext, FrameReceiver, Framed, FramingError, LineFramer};
use bowline::{Address, AtDrain, CloseReason, Factory, ProducerKind, ProducerRef, Reactor};
use bowline::{Transport, TransportHandle, Transports};

use crate::common::{Arguments, Endpoint, Inspect};

const HELP: &str = "
Passes what is published on topics to those that subscribe to them.

Usage: pubsub --listen ENDPOINT [--tls CERT KEY] [--slow POLICY]
       pubsub --load [--seconds N] [--subscribers N] [--plot FILE]

  --listen ENDPOINT  where: tcp:127.0.0.1:7004, unix:/run/pubsub.sock
  --tls CERT KEY     with TLS, whatever the endpoint: two PEM files
  --slow POLICY      where a subscriber does not read: drop its messages, or have those
                     who publish for it wait [default: drop]
  --load             run a short load on each policy, and end
  --seconds N        how long each [default: 3]
  --subscribers N    how many there are, one of which stops for a while [default: 8]
  --plot FILE        write a plot of it there (SVG)
  --inspect PLACE    show what is inside: on a UNIX socket (a path),
                     or to browsers (an address)

Clients say `sub TOPIC`, `unsub TOPIC`, `pub TOPIC TEXT`, a line each, and hear
`msg TOPIC TEXT`, and `lost N` where messages were dropped.
";

/// The longest line, in bytes.
const MAX_LINE: usize = 16 * 1024;

/// What becomes of messages for a subscriber whose buffer is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slow {
    /// They are dropped and counted, and it is told how many when it reads again.
    Drop,
    /// Those who publish on its topics are not read from before it has read.
    Wait,
}

impl FromStr for Slow {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "drop" => Ok(Self::Drop),
            "wait" => Ok(Self::Wait),
            _ => Err("drop or wait"),
        }
    }
}

/// What all clients share. Callbacks never nest, so it is never borrowed twice.
struct Topics {
    slow: Slow,
    subscribers: BTreeMap<String, BTreeSet<TransportHandle>>,
    /// How many messages those have missed that do not read.
    lost: BTreeMap<TransportHandle, u64>,
    /// Who waits for whom.
    waiting: BTreeMap<TransportHandle, BTreeSet<TransportHandle>>,
}

type Shared = Rc<RefCell<Topics>>;
type Cx<'a, T> = FrameContext<'a, T, LineFramer>;

/// Builds the clients of a broker.
fn broker(slow: Slow) -> impl Factory<Protocol = Framed<LineFramer, Client>> {
    let topics = Rc::new(RefCell::new(Topics {
        slow,
        subscribers: BTreeMap::new(),
        lost: BTreeMap::new(),
        waiting: BTreeMap::new(),
    }));
    move |_: &Address| {
        let framer = LineFramer::with_delimiter(b"\n").with_max_length(MAX_LINE);
        let client = Client {
            topics: Rc::clone(&topics),
        };
        Framed::new(framer, client)
    }
}

/// One connection.
struct Client {
    topics: Shared,
}

impl<T: Transport> FrameReceiver<T, LineFramer> for Client {
    fn connection_made(&mut self, cx: &mut Cx<'_, T>) {
        // It hears then when it has read what was written to it.
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("it is the first one, and the connection is there");
    }

    fn frame_received(&mut self, cx: &mut Cx<'_, T>, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let me = cx.transport.handle();
        match text.trim_end().split_once(' ') {
            Some(("sub", topic)) => {
                let topics = &mut *self.topics.borrow_mut();
                let all = topics.subscribers.entry(topic.to_owned()).or_default();
                all.insert(me);
            }
            Some(("unsub", topic)) => self.topics.borrow_mut().leave(topic, me),
            Some(("pub", message)) if message.contains(' ') => self.publish(cx, message),
            _ => {
                cx.transport.write(b"error: sub, unsub, pub\n");
            }
        }
    }

    fn framing_failed(&mut self, cx: &mut Cx<'_, T>, error: FramingError, _: &[u8]) {
        cx.transport.write(format!("error: {error}\n").as_bytes());
        cx.transport.lose_connection();
    }

    /// This subscriber has read: it is told what it has missed, and those who waited for
    /// it go on.
    fn resume_producing(&mut self, cx: &mut Cx<'_, T>) {
        let me = cx.transport.handle();
        let topics = &mut *self.topics.borrow_mut();
        if let Some(lost) = topics.lost.remove(&me) {
            cx.transport.write(format!("lost {lost}\n").as_bytes());
        }
        for publisher in topics.no_more_waits_for(me) {
            match cx.get(publisher) {
                Some(publisher) => publisher.resume_producing(),
                None => log::debug!("{publisher:?} has not waited for the end of it"),
            }
        }
    }

    /// It produces for as long as it is there, so that it would never count as idle.
    fn draining(&mut self, cx: &mut Cx<'_, T>) -> AtDrain {
        cx.transport.unregister_producer();
        // Whoever does not read what is queued holds up nobody.
        cx.transport.lose_connection_within(Duration::from_secs(5));
        AtDrain::GoOn
    }

    fn connection_lost(&mut self, cx: &mut Cx<'_, T>, _: &CloseReason) {
        let me = cx.transport.handle();
        let topics = &mut *self.topics.borrow_mut();
        let all: Vec<_> = topics.subscribers.keys().cloned().collect();
        for topic in all {
            topics.leave(&topic, me);
        }
        topics.lost.remove(&me);
        for publisher in topics.no_more_waits_for(me) {
            if let Some(publisher) = cx.reactor.get(publisher) {
                publisher.resume_producing();
            }
        }
    }
}

impl Client {
    fn publish<T: Transport>(&self, cx: &mut Cx<'_, T>, message: &str) {
        let topics = &mut *self.topics.borrow_mut();
        let topic = message.split(' ').next().unwrap_or_default();
        let line = format!("msg {message}\n");
        let me = cx.transport.handle();
        let mut waits = false;
        for subscriber in topics.subscribers.get(topic).into_iter().flatten() {
            // It may be this very connection, or have ended in this turn.
            let Some(transport) = cx.get(*subscriber) else {
                continue;
            };
            if topics.slow == Slow::Drop && transport.is_send_buffer_full() {
                *topics.lost.entry(*subscriber).or_default() += 1;
                continue;
            }
            transport.write(line.as_bytes());
            if topics.slow == Slow::Wait && transport.is_send_buffer_full() {
                topics.waiting.entry(*subscriber).or_default().insert(me);
                waits = true;
            }
        }
        if waits {
            cx.transport.pause_producing();
        }
    }
}

impl Topics {
    fn leave(&mut self, topic: &str, who: TransportHandle) {
        if let Some(all) = self.subscribers.get_mut(topic) {
            all.remove(&who);
            if all.is_empty() {
                self.subscribers.remove(topic);
            }
        }
    }

    /// Those who have waited for `who` and for nobody else.
    fn no_more_waits_for(&mut self, who: TransportHandle) -> Vec<TransportHandle> {
        let publishers = self.waiting.remove(&who).unwrap_or_default();
        let still_waits = |it: &TransportHandle| self.waiting.values().any(|all| all.contains(it));
        publishers
            .into_iter()
            .filter(|it| !still_waits(it))
            .collect()
    }
}

fn main() -> common::Result {
    env_logger::init();
    let mut arguments = Arguments::parse(HELP);
    let inspect = Inspect::take(&mut arguments)?;
    let endpoint = Endpoint::take(&mut arguments)?;
    let slow = arguments.option("--slow")?.unwrap_or(Slow::Drop);
    let is_load = arguments.flag("--load");
    let seconds = arguments.option("--seconds")?.unwrap_or(3.0);
    let subscribers = arguments.option("--subscribers")?.unwrap_or(8);
    let plot: Option<PathBuf> = arguments.option("--plot")?;
    arguments.finish()?;
    if is_load {
        return load::run(
            Duration::try_from_secs_f64(seconds)?,
            subscribers,
            plot.as_deref(),
        );
    }
    let endpoint = endpoint.ok_or("--listen ENDPOINT, please; try --help")?;
    let mut reactor = Reactor::new()?;
    Inspect::show(inspect.as_ref(), &mut reactor)?;
    let listener = reactor.listen(endpoint, broker(slow))?;
    reactor.stop_on_signals()?;
    common::print_address(&mut reactor, listener);
    reactor.run()?;
    Ok(())
}
