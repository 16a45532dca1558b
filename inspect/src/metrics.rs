//! The metrics, in the text format of Prometheus.
//!
//! The names are stable, so that alerts keep working.

use std::collections::BTreeMap;
use std::fmt::Write;

use bowline_reactor::{Budget, CallbackKind, Description, Fact, Histogram, Reactor, Section};
use bowline_transport::Transports;
use serde_json::{Value, json};

/// The sums over the open connections, by kind.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    by_kind: BTreeMap<String, Total>,
    /// By kind and state.
    by_state: BTreeMap<(String, String), u64>,
    /// What listeners have accepted, by their factory and their address.
    accepted: BTreeMap<(String, String), u64>,
    paused: u64,
    held: u64,
}

#[derive(Debug, Default)]
struct Total {
    sent: u64,
    received: u64,
    buffered: u64,
    queued: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, description: &Description) {
        let count = |fact: &str| match description.get(fact) {
            Some(Fact::Count(count)) => *count,
            _ => 0,
        };
        let word = |fact: &str| match description.get(fact) {
            Some(Fact::Text(text)) => text.clone().into_owned(),
            _ => String::new(),
        };
        match word("role").as_str() {
            "listener" => {
                let listener = (word("factory"), word("local"));
                *self.accepted.entry(listener).or_default() += count("accepted");
                return;
            }
            "connection" => {}
            _ => return,
        }
        let state = (description.kind().to_owned(), word("state"));
        *self.by_state.entry(state).or_default() += 1;
        let total = self
            .by_kind
            .entry(description.kind().to_owned())
            .or_default();
        total.sent += count("sent_bytes");
        total.received += count("received_bytes");
        total.buffered += count("buffered_bytes");
        total.queued += count("queued_descriptors");
        let reading = word("reading");
        self.paused += u64::from(reading == "paused");
        self.held += u64::from(reading == "held");
    }

    /// Adds up what the page plots, over all kinds.
    pub(crate) fn sums(&self) -> Value {
        let sum = |of: fn(&Total) -> u64| self.by_kind.values().map(of).sum::<u64>();
        json!({
            "sent": sum(|it| it.sent),
            "received": sum(|it| it.received),
            "buffered": sum(|it| it.buffered),
            "queued_descriptors": sum(|it| it.queued),
        })
    }
}

/// One family of metrics after the other, each with its help text.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0 += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"");
            let value = value.replace('\n', "\\n");
            self.0 += if index == 0 { "{" } else { "," };
            self.0 += &format!("{label}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: u64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let mut below = 0;
        let mut labels = labels.to_vec();
        // One bucket for each factor of four, which is what a plot shows.
        for (index, (bound, count)) in histogram.buckets().enumerate() {
            below += count;
            if index % 8 == 0 {
                let bound = bound.as_secs_f64().to_string();
                let mut labels = labels.clone();
                labels.push(("le", &bound));
                self.sample(&format!("{name}_bucket"), &labels, below);
            }
        }
        labels.push(("le", "+Inf"));
        self.sample(&format!("{name}_bucket"), &labels, histogram.count());
        labels.pop();
        let sum = histogram.total().as_secs_f64();
        self.sample(&format!("{name}_sum"), &labels, sum);
        self.sample(&format!("{name}_count"), &labels, histogram.count());
    }
}

pub(crate) fn text(reactor: &mut Reactor, totals: &Totals) -> String {
    let mut text = Text(String::new());
    loop_counts(&mut text, reactor);
    times(&mut text, reactor);
    connections(&mut text, reactor, totals);
    descriptors(&mut text, reactor);
    let parts = reactor.parts();
    let of = |name: &str| {
        let sections = parts.sections().iter();
        sections.filter(|it| it.name() == name).collect::<Vec<_>>()
    };
    pools(&mut text, &of("Pool"));
    restarts(&mut text, &of("Restart"));
    text.0
}

fn loop_counts(text: &mut Text, reactor: &Reactor) {
    let it = reactor.statistics();
    let counts = [
        ("turns", "Turns of the loop.", it.turns),
        ("events", "Events delivered to descriptors.", it.events),
        (
            "stale_events",
            "Events for descriptors that were gone.",
            it.stale_events,
        ),
        ("timers_run", "Delayed calls that ran.", it.timers),
        ("panics", "Callbacks that panicked.", it.panics),
    ];
    for (name, help, count) in counts {
        text.single(&format!("bowline_{name}_total"), "counter", help, count);
    }
    let (pending, late) = reactor.delayed_call_counts();
    let registered = reactor.registered() as u64;
    text.single(
        "bowline_timers_pending",
        "gauge",
        "Delayed calls that wait.",
        pending as u64,
    );
    text.single(
        "bowline_timers_late",
        "gauge",
        "Delayed calls that are due and have not run.",
        late as u64,
    );
    text.single(
        "bowline_registered",
        "gauge",
        "Registered descriptors.",
        registered,
    );
    let name = "bowline_budget_spent_total";
    text.family(name, "counter", "Turns in which a budget ran out.");
    for budget in Budget::ALL {
        let spent = reactor.measurements().spent(budget);
        text.sample(name, &[("budget", budget.name())], spent);
    }
}

fn times(text: &mut Text, reactor: &Reactor) {
    let measured = reactor.measurements();
    let name = "bowline_turn_seconds";
    text.family(name, "histogram", "What turns took, without waiting.");
    text.histogram(name, &[], measured.turns());
    let name = "bowline_callback_seconds";
    text.family(name, "histogram", "What callbacks took, by a sample.");
    for kind in CallbackKind::ALL {
        text.histogram(name, &[("kind", kind.name())], measured.callbacks(kind));
    }
    let name = "bowline_busy_seconds_total";
    text.family(name, "counter", "What all turns took, without waiting.");
    text.sample(name, &[], measured.busy().as_secs_f64());
    let name = "bowline_phase_seconds_total";
    text.family(name, "counter", "What the phases of turns took together.");
    for (phase, took) in measured.times().phases() {
        text.sample(name, &[("phase", phase)], took.as_secs_f64());
    }
}

fn connections(text: &mut Text, reactor: &mut Reactor, totals: &Totals) {
    let kinds = reactor.kind_counts();
    let nothing = Total::default();
    let total = |kind: &str| totals.by_kind.get(kind).unwrap_or(&nothing);
    let mut family = |name: &str, kind: &str, help: &str, count: &dyn Fn(usize) -> u64| {
        text.family(name, kind, help);
        for (index, counts) in kinds.iter().enumerate() {
            text.sample(name, &[("kind", counts.kind)], count(index));
        }
    };
    family(
        "bowline_connections",
        "gauge",
        "Open connections.",
        &|index| kinds[index].open(),
    );
    family(
        "bowline_connections_made_total",
        "counter",
        "Connections made.",
        &|index| kinds[index].made,
    );
    family(
        "bowline_sent_bytes_total",
        "counter",
        "Bytes sent.",
        &|index| {
            kinds[index]
                .sent_bytes
                .wrapping_add(total(kinds[index].kind).sent)
        },
    );
    family(
        "bowline_received_bytes_total",
        "counter",
        "Bytes delivered.",
        &|index| {
            kinds[index]
                .received_bytes
                .wrapping_add(total(kinds[index].kind).received)
        },
    );
    family(
        "bowline_buffered_bytes",
        "gauge",
        "Bytes that wait to be sent.",
        &|index| total(kinds[index].kind).buffered,
    );
    let help = "Connections whose reading is paused.";
    text.single("bowline_paused_connections", "gauge", help, totals.paused);
    let help = "Connections whose reading a policy or a layer holds.";
    text.single("bowline_held_connections", "gauge", help, totals.held);
    let name = "bowline_connections_by_state";
    text.family(name, "gauge", "Open connections by their state.");
    for ((kind, state), count) in &totals.by_state {
        text.sample(name, &[("kind", kind), ("state", state)], count);
    }
    let name = "bowline_accepted_total";
    text.family(name, "counter", "Connections that listeners accepted.");
    for ((factory, local), count) in &totals.accepted {
        text.sample(name, &[("factory", factory), ("local", local)], count);
    }
}

/// A number among the facts of a section.
fn count_of(section: &Section, fact: &str) -> u64 {
    match section.get(fact) {
        Some(Fact::Count(count)) => *count,
        Some(Fact::Flag(flag)) => u64::from(*flag),
        _ => 0,
    }
}

/// Pools have the numbers of their order, the oldest first.
fn pools(text: &mut Text, pools: &[&Section]) {
    let mut family = |name: &str, kind: &str, help: &str, label: &str, facts: &[&str]| {
        if !pools.is_empty() {
            text.family(name, kind, help);
        }
        for (number, pool) in pools.iter().enumerate() {
            let number = number.to_string();
            for fact in facts {
                let labels = [("pool", number.as_str()), (label, fact)];
                let labels = &labels[..if label.is_empty() { 1 } else { 2 }];
                text.sample(name, labels, count_of(pool, fact));
            }
        }
    };
    let gauges = [
        ("workers", "Worker processes.", "workers"),
        ("waiting", "Connections that wait for a worker.", "waiting"),
        (
            "in_flight",
            "Connections that no worker has answered for.",
            "in_flight",
        ),
        ("paused", "Whether the pool accepts nothing.", "paused"),
    ];
    for (name, help, fact) in gauges {
        family(&format!("bowline_pool_{name}"), "gauge", help, "", &[fact]);
    }
    family(
        "bowline_pool_connections_total",
        "counter",
        "What became of connections.",
        "outcome",
        &[
            "sent",
            "acknowledged",
            "refused",
            "resent",
            "rescued",
            "undelivered",
        ],
    );
    family(
        "bowline_pool_worker_events_total",
        "counter",
        "What became of workers.",
        "event",
        &["started", "not_started", "deaths", "hangs", "recalls"],
    );
}

fn restarts(text: &mut Text, restarts: &[&Section]) {
    let Some(restart) = restarts.first() else {
        return;
    };
    let is_serving = restart.get("state") == Some(&"serving".into());
    let gauges = [
        (
            "serving",
            "Whether this is the process that serves.",
            u64::from(is_serving),
        ),
        (
            "took_over",
            "Whether it has taken over from another.",
            u64::from(restart.get("predecessor").is_some()),
        ),
        (
            "movable_connections",
            "Connections that can move.",
            count_of(restart, "movable"),
        ),
        (
            "stayed_connections",
            "Connections that could not move.",
            count_of(restart, "stayed"),
        ),
    ];
    for (name, help, value) in gauges {
        text.single(&format!("bowline_restart_{name}"), "gauge", help, value);
    }
    let name = "bowline_restart_moved_total";
    text.family(name, "counter", "Connections that have moved.");
    for (way, fact) in [("here", "moved_here"), ("away", "moved_away")] {
        text.sample(name, &[("way", way)], count_of(restart, fact));
    }
}

fn descriptors(text: &mut Text, reactor: &mut Reactor) {
    let counts = reactor.descriptor_counts();
    let name = "bowline_descriptors_total";
    text.family(name, "counter", "What became of descriptors.");
    let fates = [
        ("opened", counts.opened),
        ("closed", counts.closed),
        ("passed", counts.passed),
        ("received", counts.received),
        ("unclaimed", counts.unclaimed),
        ("unsent", counts.unsent),
        ("refused", counts.refused),
        ("shed", counts.shed),
    ];
    for (fate, count) in fates {
        text.sample(name, &[("fate", fate)], count);
    }
    let help = "Reads in which the kernel lost descriptors.";
    text.single(
        "bowline_truncations_total",
        "counter",
        help,
        counts.truncations,
    );
}
