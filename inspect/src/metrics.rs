//! The metrics, in the text format of Prometheus.
//!
//! The names are stable, so that alerts keep working.

use std::fmt::Write;

use bowline_reactor::{Budget, CallbackKind, Histogram, Reactor, Section};
use bowline_transport::{KindCounts, Transports};

use crate::totals::{Listener, PAUSED_BY, Sum, Totals, count, sections};

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
    listeners(&mut text, &totals.listeners);
    descriptors(&mut text, reactor);
    let parts = reactor.parts();
    let all: Vec<_> = sections(&parts, "Pool").collect();
    pools(&mut text, &all);
    channels(&mut text, &all, totals);
    restarts(&mut text, &sections(&parts, "Restart").collect::<Vec<_>>());
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
    let nothing = Sum::default();
    let open = |kind: &str| totals.by_kind.get(kind).unwrap_or(&nothing);
    let mut family = |name: &str, kind: &str, help: &str, count: &dyn Fn(&KindCounts) -> u64| {
        text.family(name, kind, help);
        for counts in &kinds {
            text.sample(name, &[("kind", counts.kind)], count(counts));
        }
    };
    let name = "bowline_connections";
    family(name, "gauge", "Open connections.", &|it| it.open());
    let name = "bowline_connections_made_total";
    family(name, "counter", "Connections made.", &|it| it.made);
    let name = "bowline_sent_bytes_total";
    family(name, "counter", "Bytes sent.", &|it| {
        it.sent_bytes.wrapping_add(open(it.kind).sent)
    });
    let name = "bowline_received_bytes_total";
    family(name, "counter", "Bytes delivered.", &|it| {
        it.received_bytes.wrapping_add(open(it.kind).received)
    });
    let name = "bowline_sent_descriptors_total";
    family(name, "counter", "Descriptors passed.", &|it| {
        let open = open(it.kind).sent_descriptors;
        it.sent_descriptors.wrapping_add(open)
    });
    let name = "bowline_received_descriptors_total";
    family(name, "counter", "Descriptors received.", &|it| {
        let open = open(it.kind).received_descriptors;
        it.received_descriptors.wrapping_add(open)
    });
    let (name, help) = ("bowline_buffered_bytes", "Bytes that wait to be sent.");
    family(name, "gauge", help, &|it| open(it.kind).buffered);
    let name = "bowline_queued_descriptors";
    let help = "Descriptors that wait to be passed.";
    family(name, "gauge", help, &|it| open(it.kind).queued);
    paused(text, totals);
    let name = "bowline_connections_by_state";
    text.family(name, "gauge", "Open connections by their state.");
    for (kind, sum) in &totals.by_kind {
        for (state, count) in &sum.states {
            text.sample(name, &[("kind", kind), ("state", state)], count);
        }
    }
}

fn paused(text: &mut Text, totals: &Totals) {
    let all = |by: usize| totals.by_kind.values().map(|it| it.paused[by]).sum();
    let help = "Connections whose reading is paused.";
    text.single("bowline_paused_connections", "gauge", help, all(0));
    let help = "Connections whose reading a policy or a layer holds.";
    text.single("bowline_held_connections", "gauge", help, all(1));
    let name = "bowline_paused";
    text.family(name, "gauge", "What is paused, by whom.");
    for (kind, sum) in &totals.by_kind {
        for (by, count) in PAUSED_BY.iter().zip(sum.paused) {
            text.sample(name, &[("kind", kind), ("by", by)], count);
        }
    }
}

/// Of each family of a listener or a pool: what it is called after that, whether it is a
/// gauge or a counter, its help text, and what it counts.
type Family = (&'static str, &'static str, &'static str, fn(&Sum) -> u64);

const FAMILIES: [Family; 6] = [
    ("sent_bytes_total", "counter", "Bytes sent.", |it| it.sent),
    (
        "received_bytes_total",
        "counter",
        "Bytes delivered.",
        |it| it.received,
    ),
    (
        "sent_descriptors_total",
        "counter",
        "Descriptors passed.",
        |it| it.sent_descriptors,
    ),
    (
        "received_descriptors_total",
        "counter",
        "Descriptors received.",
        |it| it.received_descriptors,
    ),
    (
        "buffered_bytes",
        "gauge",
        "Bytes that wait to be sent.",
        |it| it.buffered,
    ),
    (
        "queued_descriptors",
        "gauge",
        "Descriptors that wait to be passed.",
        |it| it.queued,
    ),
];

/// Several listeners may have the same factory and address.
fn listeners(text: &mut Text, all: &[Listener]) {
    let mut merged: Vec<((&str, &str), Sum, u64, u64)> = Vec::new();
    for it in all {
        let labels = (it.factory.as_str(), it.local.as_str());
        let (accepted, accepting) = (it.accepted, u64::from(it.is_accepting));
        match merged.iter_mut().find(|known| known.0 == labels) {
            Some(known) => {
                known.1.add(&it.all);
                known.2 += accepted;
                known.3 += accepting;
            }
            None => merged.push((labels, it.all.clone(), accepted, accepting)),
        }
    }
    let labels = |(factory, local)| [("factory", factory), ("local", local)];
    let name = "bowline_accepted_total";
    text.family(name, "counter", "Connections that listeners accepted.");
    for (whose, _, accepted, _) in &merged {
        text.sample(name, &labels(*whose), accepted);
    }
    let name = "bowline_listener_accepting";
    text.family(name, "gauge", "How many listeners accept now.");
    for (whose, .., accepting) in &merged {
        text.sample(name, &labels(*whose), accepting);
    }
    let name = "bowline_listener_connections";
    text.family(name, "gauge", "Open connections of a listener by state.");
    for (whose, sum, ..) in &merged {
        let [factory, local] = labels(*whose);
        for (state, count) in &sum.states {
            text.sample(name, &[factory, local, ("state", state)], count);
        }
    }
    let name = "bowline_listener_paused";
    text.family(name, "gauge", "What is paused of its connections, by whom.");
    for (whose, sum, ..) in &merged {
        let [factory, local] = labels(*whose);
        for (by, count) in PAUSED_BY.iter().zip(sum.paused) {
            text.sample(name, &[factory, local, ("by", by)], count);
        }
    }
    for (what, kind, help, count) in FAMILIES {
        let name = format!("bowline_listener_{what}");
        text.family(&name, kind, help);
        for (whose, sum, ..) in &merged {
            text.sample(&name, &labels(*whose), count(sum));
        }
    }
}

/// What passes between pools and their workers.
fn channels(text: &mut Text, pools: &[&Section], totals: &Totals) {
    let known = pools.iter().enumerate();
    let known = known.filter_map(|(at, pool)| Some((at.to_string(), totals.channels_of(pool)?)));
    let known: Vec<_> = known.collect();
    if known.is_empty() {
        return;
    }
    for (what, kind, help, count) in FAMILIES {
        let name = format!("bowline_pool_{what}");
        text.family(&name, kind, help);
        for (pool, sum) in &known {
            text.sample(&name, &[("pool", pool)], count(sum));
        }
    }
    let name = "bowline_pool_channels_paused";
    text.family(name, "gauge", "What is paused of its channels, by whom.");
    for (pool, sum) in &known {
        for (by, count) in PAUSED_BY.iter().zip(sum.paused) {
            text.sample(name, &[("pool", pool), ("by", by)], count);
        }
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
                text.sample(name, labels, count(pool.get(fact)));
            }
        }
    };
    let gauges = [
        ("workers", "Worker processes.", "workers"),
        ("live", "Connections that workers have.", "live"),
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
            count(restart.get("movable")),
        ),
        (
            "stayed_connections",
            "Connections that could not move.",
            count(restart.get("stayed")),
        ),
    ];
    for (name, help, value) in gauges {
        text.single(&format!("bowline_restart_{name}"), "gauge", help, value);
    }
    let name = "bowline_restart_moved_total";
    text.family(name, "counter", "Connections that have moved.");
    for (way, fact) in [("here", "moved_here"), ("away", "moved_away")] {
        text.sample(name, &[("way", way)], count(restart.get(fact)));
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
