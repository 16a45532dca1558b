//! The state of a reactor as JSON.

use std::time::Duration;

use bowline_reactor::{
    Budget, CallbackKind, Description, Fact, Histogram, Reactor, Section, SlowCallback, SlowTurn,
    Token, TurnTimes,
};
use bowline_transport::Transports;
use serde_json::{Map, Value, json};

/// Returns a duration in seconds, to the nanosecond.
pub(crate) fn seconds(duration: Duration) -> Value {
    json!(duration.as_secs_f64())
}

pub(crate) fn descriptor(
    reactor: &Reactor,
    token: Token,
    description: Option<&Description>,
    turn: u64,
) -> Value {
    let mut object = Map::new();
    object.insert("token".into(), token.to_bits().into());
    object.insert("turn".into(), turn.into());
    if let Some(age) = reactor.age(token) {
        object.insert("age".into(), seconds(age));
    }
    match description {
        Some(description) => {
            object.insert("kind".into(), description.kind().into());
            let sections = description.sections().iter().map(section);
            object.insert("sections".into(), sections.collect());
        }
        None => {
            object.insert("kind".into(), "running now".into());
        }
    }
    Value::Object(object)
}

fn section(section: &Section) -> Value {
    let facts = section.facts().map(|(name, fact)| {
        let fact = match fact {
            Fact::Count(count) => (*count).into(),
            Fact::Flag(flag) => (*flag).into(),
            Fact::Time(time) => seconds(*time),
            fact => fact.to_string().into(),
        };
        (name.to_owned(), fact)
    });
    json!({"name": section.name(), "facts": facts.collect::<Map<_, _>>()})
}

/// Returns the counts of a reactor.
pub(crate) fn summary(reactor: &mut Reactor) -> Value {
    let statistics = reactor.statistics();
    let descriptors = reactor.descriptor_counts();
    let kinds = reactor.kind_counts();
    let registered = reactor.registered();
    let (pending, late) = reactor.delayed_call_counts();
    let measured = reactor.measurements();
    let kinds = kinds.iter().map(|it| {
        let counts = json!({
            "made": it.made, "open": it.open(), "ended": it.ended,
            "ended_sent_bytes": it.sent_bytes as i64,
            "ended_received_bytes": it.received_bytes as i64,
            "ended_sent_descriptors": it.sent_descriptors as i64,
            "ended_received_descriptors": it.received_descriptors as i64,
        });
        (it.kind.to_owned(), counts)
    });
    let callbacks = CallbackKind::ALL.map(|kind| {
        (
            kind.name().to_owned(),
            histogram_of(measured.callbacks(kind)),
        )
    });
    let spent = Budget::ALL.map(|it| (it.name().to_owned(), measured.spent(it).into()));
    json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "registered": registered,
        "timers_pending": pending,
        "timers_late": late,
        "turns": statistics.turns,
        "events": statistics.events,
        "stale_events": statistics.stale_events,
        "timers": statistics.timers,
        "panics": statistics.panics,
        "budgets_spent": spent.into_iter().collect::<Map<_, _>>(),
        "descriptors": {
            "opened": descriptors.opened, "closed": descriptors.closed,
            "passed": descriptors.passed, "received": descriptors.received,
            "unclaimed": descriptors.unclaimed, "unsent": descriptors.unsent,
            "refused": descriptors.refused, "truncations": descriptors.truncations,
            "shed": descriptors.shed,
        },
        "kinds": kinds.collect::<Map<_, _>>(),
        "busy": seconds(measured.busy()),
        "turn_times": histogram_of(measured.turns()),
        "parts": reactor.parts().sections().iter().map(section).collect::<Vec<_>>(),
        "phases": phases(&measured.times()),
        "callbacks": callbacks.into_iter().collect::<Map<_, _>>(),
        "slowest": measured.slowest().iter().map(slow).collect::<Vec<_>>(),
        "slowest_turns": measured.slowest_turns().iter().map(slow_turn).collect::<Vec<_>>(),
    })
}

fn histogram_of(histogram: &Histogram) -> Value {
    json!({
        "count": histogram.count(),
        "total": seconds(histogram.total()),
        "p50": seconds(histogram.quantile(0.5)),
        "p99": seconds(histogram.quantile(0.99)),
        "longest": seconds(histogram.longest()),
    })
}

fn slow(slow: &SlowCallback) -> Value {
    json!({
        "ago": seconds(slow.at.elapsed()),
        "took": seconds(slow.took),
        "callback": slow.kind.name(),
        "name": slow.name,
        "token": slow.token.map(Token::to_bits),
        "age": slow.age.map(seconds),
    })
}

fn slow_turn(turn: &SlowTurn) -> Value {
    json!({
        "ago": seconds(turn.at.elapsed()),
        "took": seconds(turn.times.total()),
        "events": turn.events,
        "timers": turn.timers,
        "phases": phases(&turn.times),
        "ran": turn.ran.iter().map(slow).collect::<Vec<_>>(),
    })
}

fn phases(times: &TurnTimes) -> Map<String, Value> {
    let phases = times.phases();
    phases
        .map(|(name, it)| (name.to_owned(), seconds(it)))
        .collect()
}

/// Returns the last turns.
pub(crate) fn turns(reactor: &Reactor) -> Value {
    let turns = reactor.measurements().last_turns().map(|turn| {
        json!({
            "ago": seconds(turn.ago),
            "took": seconds(turn.times.total()),
            "events": turn.events,
            "timers": turn.timers,
            "phases": phases(&turn.times),
        })
    });
    json!({"turns": turns.collect::<Vec<_>>()})
}
