//! bowline, as its guide says.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::iter;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ::bowline::{
    AfterReadClosed, Context, DescriptorLimits, Linger, ListenerHandle, PassedDescriptor,
    ProducerKind, ProducerRef, Protocol, Reactor, ReceivedDescriptors, Tcp, Transport, Transports,
    Unix, UnixTransport,
};

use super::{Family, Job, Server, Task, Wait};
use crate::sys::{MAX_DESCRIPTORS, own_cpu_time};
use crate::timers::{self, Timed};

const CHUNK_BYTES: usize = 65_536;
const WRITES: usize = 10;

/// Under callgrind everything is some fifty times slower. With this, and not with the
/// default of 1 ms, it is looked for slow callbacks as often as it is otherwise.
#[cfg(feature = "inspect")]
pub(crate) const SLOW: Duration = Duration::from_millis(50);

pub(super) fn build(job: Job, listener: Option<OwnedFd>) -> io::Result<Box<dyn Server>> {
    let mut reactor = Reactor::new()?;
    #[cfg(feature = "inspect")]
    reactor.set_slow_limits(bowline::inspect::SlowLimits::default().callback(SLOW));
    if let Some(listener) = listener {
        let listener = match job.family {
            Family::Tcp => listen_tcp(&mut reactor, job.task, listener),
            _ => listen_unix(&mut reactor, job.task, listener)?,
        };
        // The generator that made it has let go of it.
        let listener = reactor.get(listener).expect("it was just made");
        listener.assume_sole_holder();
    }
    reactor.start().map_err(io::Error::other)?;
    Ok(Box::new(Bowline { reactor, job }))
}

struct Bowline {
    reactor: Reactor,
    job: Job,
}

impl Server for Bowline {
    fn adopt(&mut self, socket: OwnedFd) -> io::Result<()> {
        match self.job.family {
            Family::Tcp => drop(self.reactor.adopt_tcp_stream(socket, Echo)),
            Family::Unix if self.job.task == Task::EchoMixin => {
                drop(self.reactor.adopt_unix_stream(socket, Echo));
            }
            _ => drop(self.reactor.adopt_unix_stream(socket, PlainEcho)),
        }
        Ok(())
    }

    fn listen(&mut self, listener: OwnedFd) -> io::Result<()> {
        let listener = listen_tcp(&mut self.reactor, self.job.task, listener);
        if let Some(listener) = self.reactor.get(listener) {
            listener.assume_sole_holder();
        }
        Ok(())
    }

    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => Some(Duration::ZERO),
            Wait::Forever => None,
        };
        self.reactor.turn(timeout);
        Ok(())
    }
}

fn listen_tcp(reactor: &mut Reactor, task: Task, listener: OwnedFd) -> ListenerHandle {
    let adopted = match task {
        Task::Ten => reactor.listen(Tcp::listening(listener), |_: &_| Ten),
        Task::Sink => reactor.listen(Tcp::listening(listener), |_: &_| Sink { count: 0 }),
        Task::Source => reactor.listen(Tcp::listening(listener), |_: &_| Source::new()),
        _ => reactor.listen(Tcp::listening(listener), |_: &_| Echo),
    };
    adopted.expect("the parent left a listener")
}

fn listen_unix(reactor: &mut Reactor, task: Task, listener: OwnedFd) -> io::Result<ListenerHandle> {
    let file = Rc::new(OwnedFd::from(File::open("/dev/null")?));
    if matches!(task, Task::Echo | Task::Ten | Task::Sink | Task::Source) {
        // These want no descriptors, and say so once for all who connect.
        crate::sys::refuse_descriptors(listener.as_raw_fd())?;
    }
    let adopted = match task {
        Task::Ten => reactor.listen(Unix::listening(listener), |_: &_| Ten),
        Task::Sink => reactor.listen(Unix::listening(listener), |_: &_| Sink { count: 0 }),
        Task::Source => reactor.listen(Unix::listening(listener), |_: &_| Source::new()),
        Task::ReceiveDescriptors => reactor.listen(Unix::listening(listener), |_: &_| Receiver {
            count: 0,
            linger: Linger::Clear,
        }),
        Task::ReceiveTrusted => reactor.listen(Unix::listening(listener), |_: &_| Receiver {
            count: 0,
            linger: Linger::Keep,
        }),
        Task::SendDescriptors => reactor.listen(Unix::listening(listener), move |_: &_| Sender {
            count: 0,
            file: Rc::clone(&file),
        }),
        Task::Echo | Task::EchoMixin | Task::Pass | Task::SinkMerged => {
            reactor.listen(Unix::listening(listener), |_: &_| Echo)
        }
    };
    Ok(adopted.expect("the parent left a listener"))
}

struct Echo;

impl<T: Transport> Protocol<T> for Echo {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

/// An echo that wants no descriptors.
struct PlainEcho;

impl<T: UnixTransport> Protocol<T> for PlainEcho {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        // Where the kernel cannot, reading goes on looking for them.
        let _ = cx.transport.set_descriptors_accepted(false);
    }

    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        cx.transport.write(data);
    }
}

struct Ten;

impl<T: Transport> Protocol<T> for Ten {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        for _ in 0..WRITES {
            cx.transport.write(data);
        }
    }
}

struct Sink {
    count: usize,
}

impl<T: Transport> Protocol<T> for Sink {
    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.count += data.len();
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        cx.transport.write(&self.count.to_le_bytes());
        AfterReadClosed::LoseConnection
    }
}

struct Source {
    count: usize,
    chunk: Box<[u8]>,
}

impl Source {
    fn new() -> Self {
        Self {
            count: 0,
            chunk: vec![0; CHUNK_BYTES].into(),
        }
    }
}

impl<T: Transport> Protocol<T> for Source {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.count = usize::from_le_bytes(data.try_into().expect("one number is sent"));
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("the first producer");
        <Self as Protocol<T>>::resume_producing(self, cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        while self.count > 0 {
            let length = self.count.min(CHUNK_BYTES);
            self.count -= length;
            if !cx.transport.write(&self.chunk[..length]).is_ready() {
                break;
            }
        }
        if self.count == 0 {
            cx.transport.unregister_producer();
            cx.transport.lose_connection();
        }
    }
}

struct Receiver {
    count: usize,
    linger: Linger,
}

impl<T: UnixTransport> Protocol<T> for Receiver {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport.set_received_linger(self.linger);
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, _: &[u8]) {}

    fn descriptors_received(
        &mut self,
        _: &mut Context<'_, T>,
        descriptors: &mut ReceivedDescriptors<'_>,
        _: &[u8],
    ) {
        self.count += descriptors.count();
    }

    fn read_connection_lost(&mut self, cx: &mut Context<'_, T>) -> AfterReadClosed {
        cx.transport.write(&self.count.to_le_bytes());
        AfterReadClosed::LoseConnection
    }
}

struct Sender {
    count: usize,
    file: Rc<OwnedFd>,
}

impl<T: UnixTransport> Protocol<T> for Sender {
    fn data_received(&mut self, cx: &mut Context<'_, T>, data: &[u8]) {
        self.count = usize::from_le_bytes(data.try_into().expect("one number is sent"));
        cx.transport.set_descriptor_limits(
            DescriptorLimits::default()
                .high(4 * MAX_DESCRIPTORS)
                .per_message(MAX_DESCRIPTORS),
        );
        cx.transport
            .register_producer(ProducerRef::Protocol, ProducerKind::Push)
            .expect("the first producer");
        <Self as Protocol<T>>::resume_producing(self, cx);
    }

    fn resume_producing(&mut self, cx: &mut Context<'_, T>) {
        while self.count > 0 {
            let count = self.count.min(MAX_DESCRIPTORS);
            self.count -= count;
            let shared = || PassedDescriptor::shared(&self.file);
            let descriptors = iter::repeat_with(shared).take(count).collect();
            let status = cx
                .transport
                .write_with_descriptors(&[0; MAX_DESCRIPTORS][..count], descriptors)
                .expect("the queue is far from its limit");
            if !status.is_ready() {
                break;
            }
        }
        if self.count == 0 {
            cx.transport.unregister_producer();
            cx.transport.lose_connection();
        }
    }
}

pub(super) fn time(timed: Timed, count: usize) -> io::Result<Vec<f64>> {
    let mut reactor = Reactor::new()?;
    reactor.start().map_err(io::Error::other)?;
    let result: Rc<Cell<Vec<f64>>> = Rc::default();
    let answer = Rc::clone(&result);
    // In a callback, as all of a program's timers are: the clock is read once.
    reactor.call_soon(move |reactor| match timed {
        Timed::Fire => fire(reactor, count, &answer),
        Timed::Cancel => cancel(reactor, count, &answer),
        Timed::Pending => pending(reactor, count, &answer),
        Timed::Reset => reset(reactor, count, &answer),
        Timed::Lateness => lateness(reactor, count, &answer),
    });
    loop {
        reactor.turn(None);
        let values = result.take();
        if !values.is_empty() {
            return Ok(values);
        }
    }
}

type Answer = Rc<Cell<Vec<f64>>>;

fn fire(reactor: &mut Reactor, count: usize, answer: &Answer) {
    let before = own_cpu_time();
    let fired = Rc::new(Cell::new(0));
    for delay in timers::delays(count) {
        let fired = Rc::clone(&fired);
        reactor.call_later(delay, move |_| fired.set(fired.get() + 1));
    }
    // Runs behind all of them.
    let answer = Rc::clone(answer);
    reactor.call_later(timers::SPAN, move |_| {
        assert_eq!(fired.get(), count, "calls that ran");
        answer.set(timers::per_operation(before, count));
    });
}

fn cancel(reactor: &mut Reactor, count: usize, answer: &Answer) {
    let before = own_cpu_time();
    // Each with a word of its own, as at the limit.
    let calls: Vec<_> = (0_u64..)
        .zip(timers::far_delays(count))
        .map(|(number, delay)| {
            reactor.call_later(delay, move |_| unreachable!("call {number} was cancelled"))
        })
        .collect();
    for call in calls {
        call.cancel(reactor).expect("it waits");
    }
    answer.set(timers::per_operation(before, count));
}

fn pending(reactor: &mut Reactor, count: usize, answer: &Answer) {
    for delay in timers::far_delays(count) {
        reactor.call_later(delay, |_| {});
    }
    let before = own_cpu_time();
    for (number, delay) in (0_u64..).zip(timers::far_delays(timers::BESIDE_PENDING)) {
        reactor
            .call_later(delay, move |_| unreachable!("call {number} was cancelled"))
            .cancel(reactor)
            .expect("it waits");
    }
    answer.set(timers::per_operation(before, timers::BESIDE_PENDING));
}

fn reset(reactor: &mut Reactor, count: usize, answer: &Answer) {
    let calls: Vec<_> = timers::far_delays(count)
        .map(|delay| reactor.call_later(delay, |_| {}))
        .collect();
    let before = own_cpu_time();
    for (call, delay) in calls.into_iter().zip(timers::moved_delays(count)) {
        call.reset(reactor, delay).expect("it waits");
    }
    answer.set(timers::per_operation(before, count));
}

fn lateness(reactor: &mut Reactor, count: usize, answer: &Answer) {
    let late = Rc::new(RefCell::new(Vec::with_capacity(count)));
    let now = reactor.now();
    for delay in timers::delays(count) {
        let due = now + delay;
        let late = Rc::clone(&late);
        let answer = Rc::clone(answer);
        reactor.call_later(delay, move |_| {
            let mut late = late.borrow_mut();
            late.push(Instant::now().saturating_duration_since(due));
            if late.len() == count {
                answer.set(timers::lateness(mem::take(&mut late)));
            }
        });
    }
}
