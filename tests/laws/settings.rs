//! Every value of every setting is taken: the largest is how one says that there
//! is no limit, zero is what a mistake gives.

use std::any::Any;
use std::fs::File;
use std::io::Read;
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use bowline::Unix;
use bowline::descriptor::{Descriptor, Next, Readiness};
use bowline::endpoint::{UnixConnect, UnixListen};
use bowline::policies::{
    Backoff, IdleTimeout, LimitConnections, LimitHandshakes, Rate, Reconnecting, ThrottleReading,
    Timeout, TrafficLog,
};
use bowline::threads::ThreadPoolSettings;
use bowline::{
    Address, CloseReason, Context, DescriptorLimits, Factory, FileSender, Protocol, Reactor,
    Transport, Transports, UnixAddress, UnixTransport, Watermarks,
};

use crate::support::{DescriptorLedger, Record, Recorder, run_until_quiet, socketpair};

/// Zero, or the largest there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Zero,
    Largest,
}

impl Value {
    pub(crate) fn size(self) -> usize {
        self.of(0, usize::MAX)
    }
    pub(crate) fn number(self) -> u32 {
        self.of(0, u32::MAX)
    }
    pub(crate) fn time(self) -> Duration {
        self.of(Duration::ZERO, Duration::MAX)
    }
    pub(crate) fn of<T>(self, zero: T, largest: T) -> T {
        match self {
            Self::Zero => zero,
            Self::Largest => largest,
        }
    }
}

type Set = fn(Value, &mut Reactor);

const OF_THE_REACTOR: [(&str, Set); 13] = [
    ("events", |value, reactor| {
        let events = value.size();
        reactor.set_limits(reactor.limits().events(events));
    }),
    ("timers", |value, reactor| {
        let timers = value.size();
        reactor.set_limits(reactor.limits().timers(timers));
    }),
    ("timer_slack", |value, reactor| {
        let timer_slack = value.time();
        reactor.set_limits(reactor.limits().timer_slack(timer_slack));
    }),
    ("calls", |value, reactor| {
        let calls = value.size();
        reactor.set_limits(reactor.limits().calls(calls));
    }),
    ("notifications", |value, reactor| {
        let notifications = value.size();
        reactor.set_limits(reactor.limits().notifications(notifications));
    }),
    ("descriptor reserve", |value, reactor| {
        reactor.set_descriptor_reserve(value.size());
    }),
    ("read_bytes", |value, reactor| {
        let read_bytes = value.size();
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.read_bytes(read_bytes));
    }),
    ("writes, notices, accepts", |value, reactor| {
        let count = value.number();
        let budgets = reactor.transport_budgets();
        reactor.set_transport_budgets(budgets.writes(count).notices(count).accepts(count));
    }),
    ("threads", |value, reactor| {
        reactor.thread_pool().set_settings(
            ThreadPoolSettings::default()
                .max_threads(value.size())
                .max_queued(value.size())
                .idle_timeout(value.time()),
        );
        reactor.call_in_thread(|| (), |_, _| {});
    }),
    ("call_later", |value, reactor| {
        let call = reactor.call_later(value.time(), |_| {});
        let _ = call.delay(reactor, value.time());
        let _ = call.hasten(reactor, value.time());
        let _ = call.reset(reactor, value.time());
    }),
    ("call_every", |value, reactor| {
        let periodic = reactor.call_every(value.time(), |_, _| {});
        periodic.set_interval(reactor, value.time());
        reactor.call_later(Duration::from_millis(2), move |reactor| {
            periodic.stop(reactor)
        });
    }),
    ("turn", |value, reactor| {
        reactor.call_soon(|_| {});
        reactor.turn(Some(value.time()));
    }),
    ("notify_later", |value, reactor| {
        struct Nothing;
        impl Descriptor for Nothing {
            fn ready(&mut self, _: &mut Reactor, _: Readiness) -> Next {
                Next::Keep
            }
            fn facet(&mut self) -> &mut dyn Any {
                self
            }
        }
        let token = reactor.vacancy().unwrap().install(Box::new(Nothing));
        reactor.notify_later(value.time(), token);
    }),
];

/// Sets a limit of a connection that is open.
type SetOf = fn(Value, &mut dyn UnixTransport);

const OF_A_CONNECTION: [(&str, SetOf); 13] = [
    ("low", |value, it| {
        let watermarks = Watermarks::default().low(value.size());
        it.set_watermarks(watermarks);
    }),
    ("high", |value, it| {
        let watermarks = Watermarks::default().high(value.size());
        it.set_watermarks(watermarks);
    }),
    ("limit", |value, it| {
        let watermarks = Watermarks::default().limit(value.size());
        it.set_watermarks(watermarks);
    }),
    ("read_limit", |value, it| {
        it.set_read_limit(NonZeroUsize::new(value.size()))
    }),
    ("high of descriptors", |value, it| {
        let limits = DescriptorLimits::default().high(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("queued", |value, it| {
        let limits = DescriptorLimits::default().queued(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("per_message", |value, it| {
        let limits = DescriptorLimits::default().per_message(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("per_exact_message", |value, it| {
        let limits = DescriptorLimits::default().per_exact_message(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("received_per_read", |value, it| {
        let limits = DescriptorLimits::default().received_per_read(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("received_in_all", |value, it| {
        let limits = DescriptorLimits::default().received_in_all(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("unclaimed", |value, it| {
        let limits = DescriptorLimits::default().unclaimed(value.size());
        it.set_descriptor_limits(limits);
    }),
    ("lose_connection_within", |value, it| {
        it.write(b"hello");
        it.lose_connection_within(value.time());
    }),
    ("chunk_size", |value, it| {
        let file = File::open("/proc/self/comm").unwrap().take(3);
        FileSender::new(file)
            .chunk_size(value.size())
            .send(it, |_, _| {})
            .unwrap();
    }),
];

#[test]
fn any_value_of_a_setting_of_the_reactor_is_taken() {
    let ledger = DescriptorLedger::open();
    for (name, set) in OF_THE_REACTOR {
        for value in [Value::Zero, Value::Largest] {
            let mut reactor = Reactor::new().unwrap();
            reactor.start().unwrap();
            set(value, &mut reactor);
            goes_on(&mut reactor, &format!("{name}, {value:?}"), |_| {});
        }
    }
    ledger.assert_balanced();
}

#[test]
fn any_value_of_a_setting_of_a_connection_is_taken() {
    let ledger = DescriptorLedger::open();
    for (name, set) in OF_A_CONNECTION {
        for value in [Value::Zero, Value::Largest] {
            let mut reactor = Reactor::new().unwrap();
            reactor.start().unwrap();
            let what = format!("{name}, {value:?}");
            goes_on(&mut reactor, &what, |it| set(value, it));
        }
    }
    ledger.assert_balanced();
}

/// A connection sends and receives bytes and a descriptor, and another is served
/// whatever became of it.
fn goes_on(reactor: &mut Reactor, what: &str, set: impl FnOnce(&mut dyn UnixTransport)) {
    let records = [Record::default(), Record::default()];
    let mut set = Some(set);
    for (round, record) in records.iter().enumerate() {
        let (ours, theirs) = socketpair();
        let sink = Record::default();
        let sender = reactor
            .adopt_unix_stream(ours.into(), Recorder::new(record))
            .unwrap();
        reactor
            .adopt_unix_stream(theirs.into(), Recorder::new(&sink))
            .unwrap();
        let transport = reactor.get(sender).unwrap();
        if let Some(set) = set.take() {
            set(transport);
        }
        let null = File::open("/dev/null").unwrap().into();
        let sent = transport.write_with_descriptors(b"hello", vec![null]);
        run_until_quiet(reactor);
        if round == 1 {
            sent.unwrap();
            assert_eq!(sink.data(), b"hello", "{what}");
        }
    }
    assert_eq!(reactor.statistics().panics, 0, "{what}");
}

struct Peers {
    reactor: Reactor,
    directory: tempfile::TempDir,
}

impl Peers {
    /// Listens with `served`, connects with `dialled`.
    fn meet<S, D>(served: S, dialled: D)
    where
        S: Factory<Protocol: Protocol<bowline::UnixStream>>,
        D: Factory<Protocol: Protocol<bowline::UnixStream>>,
    {
        Self::meet_with(served, dialled, |it| it, |it| it);
    }

    /// The same, with endpoints that are set to something.
    fn meet_with<S, D>(
        served: S,
        dialled: D,
        listen: impl FnOnce(UnixListen) -> UnixListen,
        connect: impl FnOnce(UnixConnect) -> UnixConnect,
    ) where
        S: Factory<Protocol: Protocol<bowline::UnixStream>>,
        D: Factory<Protocol: Protocol<bowline::UnixStream>>,
    {
        let mut peers = Self {
            reactor: Reactor::new().unwrap(),
            directory: tempfile::tempdir().unwrap(),
        };
        let path = UnixAddress::Path(peers.directory.path().join("socket"));
        let reactor = &mut peers.reactor;
        reactor.start().unwrap();
        if reactor
            .listen(listen(Unix::at(path.clone())), served)
            .is_ok()
        {
            reactor.connect(connect(Unix::to(path)), dialled).unwrap();
        }
        for _ in 0..20 {
            reactor.turn(Some(Duration::from_millis(1)));
        }
        assert_eq!(reactor.statistics().panics, 0);
        reactor.stop().unwrap();
        while reactor.turn(Some(Duration::ZERO)) != bowline::Turn::Stopped {}
        assert_eq!(reactor.statistics().panics, 0);
    }
}

/// Writes at once, and ends the connection with what comes back.
#[derive(Clone)]
pub(crate) struct Talks;

impl<T: Transport> Protocol<T> for Talks {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.write(b"hello\r\n");
    }
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        cx.transport.lose_connection();
    }
}

pub(crate) fn talks(_: &Address) -> Talks {
    Talks
}

#[test]
fn any_value_of_a_setting_of_listeners_connectors_and_policies_is_taken() {
    let ledger = DescriptorLedger::open();
    for value in [Value::Zero, Value::Largest] {
        let (time, size, number) = (value.time(), value.size(), value.number());
        Peers::meet_with(talks, talks, |it| it.backlog(number), |it| it);
        Peers::meet_with(talks, talks, |it| it.mode(number), |it| it);
        Peers::meet_with(talks, talks, |it| it, |it| it.timeout(time));

        let idle = IdleTimeout::new(talks).period(time).close_within(time);
        Peers::meet(idle, talks);
        let limit = LimitConnections::new(talks)
            .total(Some(size))
            .per_peer(Some(size))
            .per_user(Some(size));
        Peers::meet(limit, talks);
        let limit = LimitHandshakes::new(|_: &Address, _| Talks)
            .most(size)
            .deadline(time);
        Peers::meet(limit, talks);
        let rate = NonZeroU64::new(value.of(1, u64::MAX)).unwrap();
        let rate = Some(Rate::per_second(rate).burst(value.of(0, u64::MAX)));
        let throttle = ThrottleReading::new(talks).total(rate).per_connection(rate);
        Peers::meet(throttle, talks);
        let log = TrafficLog::new(talks).shown_bytes(size);
        Peers::meet(log, talks);
        let backoff = Backoff::new()
            .first(time)
            .cap(time)
            .factor(value.of(0.0, f64::MAX));
        let again = Reconnecting::new(talks)
            .backoff(backoff)
            .settled_after(time);
        Peers::meet(talks, again);
        Peers::meet(move |_: &Address| HasLimit::new(value), talks);
    }
    ledger.assert_balanced();
}

/// Has a limit of its own.
struct HasLimit {
    value: Value,
    limit: Timeout,
}

impl HasLimit {
    fn new(value: Value) -> Self {
        let limit = Timeout::new().close_within(value.time());
        Self { value, limit }
    }
}

impl<T: Transport> Protocol<T> for HasLimit {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        self.limit.set(cx, Some(self.value.time()));
        cx.transport.write(b"hello\r\n");
    }
    fn data_received(&mut self, cx: &mut Context<'_, T>, _: &[u8]) {
        self.limit.reset(cx.reactor);
    }
    fn connection_lost(&mut self, cx: &mut Context<'_, T>, _: &CloseReason) {
        self.limit.cancel(cx.reactor);
    }
}
