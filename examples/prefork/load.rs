//! A short load, which runs in the acceptor's process and on its reactor.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bowline::handoff::pool::Pool;
use bowline::{Address, BuildContext, CloseReason, ConnectError, Context, Factory, Protocol};
use bowline::{Reactor, Transport, Transports};

type Call = Box<dyn FnOnce(&mut Reactor)>;

/// How many connections there are, one request on each, and how many of them
/// at a time.
const CONNECTIONS: usize = 4_000;
const AT_A_TIME: usize = 32;

/// How long all of it may take.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);

pub(crate) type SharedLoad = Rc<RefCell<Load>>;

pub(crate) struct Load {
    address: SocketAddr,
    /// Not begun, and running.
    left: usize,
    running: usize,
    /// How many each process has answered.
    pub(crate) answers: BTreeMap<u32, u64>,
    pub(crate) failures: u64,
    when_done: Option<Call>,
    /// Called once when a worker has taken the place of the killed one.
    when_replaced: Option<Call>,
}

/// Half of the load; then a worker is killed; once it was replaced, the rest.
pub(crate) fn start(reactor: &mut Reactor, pool: &Pool, address: SocketAddr) -> SharedLoad {
    let load = Rc::new(RefCell::new(Load {
        address,
        left: 0,
        running: 0,
        answers: BTreeMap::new(),
        failures: 0,
        when_done: None,
        when_replaced: None,
    }));
    let (pool, second) = (pool.clone(), Rc::clone(&load));
    run_load(reactor, &load, CONNECTIONS / 2, move |_| {
        if let Some(worker) = pool.statistics().workers.first() {
            println!("killing worker {} halfway", worker.pid);
            pool.kill(worker.id);
        }
        let rest = Rc::clone(&second);
        second.borrow_mut().when_replaced = Some(Box::new(move |reactor| {
            run_load(reactor, &rest, CONNECTIONS - CONNECTIONS / 2, |reactor| {
                // An error says that it is stopping already.
                let _ = reactor.stop();
            });
        }));
    });
    let late = Rc::clone(&load);
    reactor.call_later(LOAD_DEADLINE, move |reactor| {
        let mut late = late.borrow_mut();
        late.failures += (late.left + late.running).max(1) as u64;
        let _ = reactor.stop();
    });
    load
}

/// A worker is there: the rest of the load may begin, if it is its turn.
pub(crate) fn worker_ready(reactor: &mut Reactor, load: &SharedLoad) {
    if let Some(call) = load.borrow_mut().when_replaced.take() {
        reactor.defer(call);
    }
}

fn run_load(
    reactor: &mut Reactor,
    load: &SharedLoad,
    connections: usize,
    when_done: impl FnOnce(&mut Reactor) + 'static,
) {
    load.borrow_mut().left = connections;
    load.borrow_mut().when_done = Some(Box::new(when_done));
    for _ in 0..AT_A_TIME {
        next_connection(reactor, load);
    }
}

fn next_connection(reactor: &mut Reactor, load: &SharedLoad) {
    let mut state = load.borrow_mut();
    if state.left == 0 {
        if state.running == 0
            && let Some(when_done) = state.when_done.take()
        {
            reactor.defer(when_done);
        }
        return;
    }
    state.left -= 1;
    match reactor.connect_tcp(state.address, Client(Rc::clone(load))) {
        Ok(_) => state.running += 1,
        Err(error) => {
            log::error!("cannot connect: {error}");
            state.failures += 1;
        }
    }
}

/// Makes one connection.
struct Client(SharedLoad);

/// Asks once, and reads the answer to its end.
struct Request {
    load: SharedLoad,
    answer: Vec<u8>,
}

impl Factory for Client {
    type Protocol = Request;

    fn build_protocol(&mut self, _: &mut BuildContext<'_>, _: &Address) -> Option<Request> {
        Some(Request {
            load: Rc::clone(&self.0),
            answer: Vec::new(),
        })
    }

    fn connection_failed(&mut self, cx: &mut BuildContext<'_>, error: &ConnectError) {
        log::warn!("{error}");
        finished(cx.reactor, &self.0, None);
    }
}

impl<T: Transport> Protocol<T> for Request {
    fn connection_made(&mut self, cx: &mut Context<'_, T>) {
        cx.transport
            .write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    }

    fn data_received(&mut self, _: &mut Context<'_, T>, data: &[u8]) {
        self.answer.extend_from_slice(data);
    }

    fn connection_lost(&mut self, cx: &mut Context<'_, T>, reason: &CloseReason) {
        let answer = String::from_utf8_lossy(&self.answer);
        let by = answer
            .strip_prefix("HTTP/1.1 200 OK\r\n")
            .and_then(|rest| rest.split_once("\r\n\r\nprocess "))
            .and_then(|(_, process)| process.trim_end().parse().ok());
        if by.is_none() {
            log::warn!("no answer: {reason}");
        }
        finished(cx.reactor, &self.load, by);
    }
}

fn finished(reactor: &mut Reactor, load: &SharedLoad, by: Option<u32>) {
    let mut state = load.borrow_mut();
    state.running -= 1;
    match by {
        Some(process) => *state.answers.entry(process).or_default() += 1,
        None => state.failures += 1,
    }
    drop(state);
    next_connection(reactor, load);
}
