//! What connections do and hold, added up by kind, by listener and by pool.

use std::collections::BTreeMap;

use bowline_reactor::{Description, Fact, Section};
use serde_json::{Map, Value, json};

/// Who can have paused something: the protocol its reading, a policy or a layer the same,
/// and the peer a producer, since it does not read.
pub(crate) const PAUSED_BY: [&str; 3] = ["protocol", "policy", "peer"];

/// The sums over all connections that are described, and what is known of those that ended.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// Of the open ones.
    pub(crate) by_kind: BTreeMap<String, Sum>,
    pub(crate) listeners: Vec<Listener>,
    /// The channels of pools with their workers, by the numbers of the pools.
    channels: BTreeMap<u64, Sum>,
    /// The connections of listeners, by the tokens of these.
    accepted: BTreeMap<u64, Sum>,
}

/// A listener, as it describes itself, and all of its connections.
#[derive(Debug)]
pub(crate) struct Listener {
    token: u64,
    pub(crate) factory: String,
    pub(crate) local: String,
    pub(crate) is_accepting: bool,
    pub(crate) accepted: u64,
    pub(crate) all: Sum,
}

/// What connections have done, and what they hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) states: BTreeMap<String, u64>,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) sent_descriptors: u64,
    pub(crate) received_descriptors: u64,
    sent_messages: u64,
    received_messages: u64,
    pub(crate) buffered: u64,
    pub(crate) queued: u64,
    pub(crate) paused: [u64; PAUSED_BY.len()],
}

impl Totals {
    pub(crate) fn add(&mut self, description: &Description) {
        let Some(first) = description.sections().first() else {
            return;
        };
        match word(first.get("role")) {
            "listener" => self.listeners.push(Listener::new(first)),
            "connection" => {
                let sum = Sum::of_connection(first, description);
                if let Some(Fact::Count(listener)) = first.get("listener") {
                    self.accepted.entry(*listener).or_default().add(&sum);
                }
                if let Some(Fact::Count(pool)) = first.get("pool") {
                    self.channels.entry(*pool).or_default().add(&sum);
                }
                let kind = self.by_kind.entry(first.name().to_owned());
                kind.or_default().add(&sum);
            }
            _ => {}
        }
    }

    /// Brings together what was described, and what pools know: `parts` are those of the
    /// reactor.
    pub(crate) fn finish(&mut self, parts: &Description) {
        for listener in &mut self.listeners {
            if let Some(open) = self.accepted.get(&listener.token) {
                listener.all.add(open);
            }
        }
        let mut channels = BTreeMap::new();
        for ended in sections(parts, "Pool channels") {
            let number = count(ended.get("pool"));
            let mut all = Sum::of_ended(ended);
            if let Some(open) = self.channels.get(&number) {
                all.add(open);
            }
            channels.insert(number, all);
        }
        self.channels = channels;
    }

    /// What passes between a pool and its workers.
    pub(crate) fn channels_of(&self, pool: &Section) -> Option<&Sum> {
        self.channels.get(&count(pool.get("pool")))
    }

    /// Adds up what the page plots, over all kinds.
    pub(crate) fn sums(&self) -> Value {
        let mut all = Sum::default();
        self.by_kind.values().for_each(|sum| all.add(sum));
        json!({
            "sent": all.sent,
            "received": all.received,
            "buffered": all.buffered,
            "queued_descriptors": all.queued,
        })
    }

    /// What [`finish`](Self::finish) has brought together.
    pub(crate) fn listeners(&self) -> Value {
        let listeners = self.listeners.iter();
        listeners
            .map(|it| it.all.json(("token", it.token)))
            .collect()
    }

    pub(crate) fn pools(&self) -> Value {
        let pools = self.channels.iter();
        pools
            .map(|(number, sum)| sum.json(("pool", *number)))
            .collect()
    }
}

impl Listener {
    fn new(section: &Section) -> Self {
        Self {
            token: count(section.get("listener")),
            factory: word(section.get("factory")).to_owned(),
            local: word(section.get("local")).to_owned(),
            is_accepting: matches!(word(section.get("state")), "listening" | "draining"),
            accepted: count(section.get("accepted")),
            all: Sum::of_ended(section),
        }
    }
}

impl Sum {
    fn of_connection(section: &Section, all: &Description) -> Self {
        let here = |fact| count(section.get(fact));
        let reading = word(section.get("reading"));
        let is_peer = word(section.get("producer")).ends_with("paused");
        let paused = [reading == "paused", reading == "held", is_peer];
        Self {
            states: BTreeMap::from([(word(section.get("state")).to_owned(), 1)]),
            sent: here("sent_bytes"),
            received: here("received_bytes"),
            sent_descriptors: sections(all, "SendmsgMixin")
                .map(|layer| count(layer.get("sent_descriptors")))
                .sum(),
            received_descriptors: here("received_descriptors"),
            sent_messages: here("sent_messages"),
            received_messages: here("received_messages"),
            buffered: here("buffered_bytes"),
            queued: here("queued_descriptors"),
            paused: paused.map(u64::from),
        }
    }

    /// What the ones that have ended did, which hold nothing.
    fn of_ended(section: &Section) -> Self {
        let ended = |fact| count(section.get(fact));
        Self {
            sent: ended("ended_sent_bytes"),
            received: ended("ended_received_bytes"),
            sent_descriptors: ended("ended_sent_descriptors"),
            received_descriptors: ended("ended_received_descriptors"),
            sent_messages: ended("ended_sent_messages"),
            received_messages: ended("ended_received_messages"),
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (state, count) in &other.states {
            match self.states.get_mut(state) {
                Some(known) => *known += count,
                None => {
                    self.states.insert(state.clone(), *count);
                }
            }
        }
        self.sent += other.sent;
        self.received += other.received;
        self.sent_descriptors += other.sent_descriptors;
        self.received_descriptors += other.received_descriptors;
        self.sent_messages += other.sent_messages;
        self.received_messages += other.received_messages;
        self.buffered += other.buffered;
        self.queued += other.queued;
        for (all, one) in self.paused.iter_mut().zip(other.paused) {
            *all += one;
        }
    }

    fn json(&self, (name, number): (&str, u64)) -> Value {
        let paused = PAUSED_BY.iter().zip(self.paused);
        let paused = paused.map(|(by, count)| ((*by).to_owned(), count.into()));
        json!({
            name: number,
            "open": self.states.values().sum::<u64>(),
            "states": self.states,
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "sent_descriptors": self.sent_descriptors,
            "received_descriptors": self.received_descriptors,
            "sent_messages": self.sent_messages,
            "received_messages": self.received_messages,
            "buffered_bytes": self.buffered,
            "queued_descriptors": self.queued,
            "paused_by": paused.collect::<Map<_, _>>(),
        })
    }
}

/// The sections of this name.
pub(crate) fn sections<'a>(
    parts: &'a Description,
    name: &'a str,
) -> impl Iterator<Item = &'a Section> {
    parts.sections().iter().filter(move |it| it.name() == name)
}

/// A number among the facts of a section.
pub(crate) fn count(fact: Option<&Fact>) -> u64 {
    match fact {
        Some(Fact::Count(count)) => *count,
        Some(Fact::Flag(flag)) => u64::from(*flag),
        _ => 0,
    }
}

fn word(fact: Option<&Fact>) -> &str {
    match fact {
        Some(Fact::Text(text)) => text,
        _ => "",
    }
}
